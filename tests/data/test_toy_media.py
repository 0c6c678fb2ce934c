from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from llava_scale.data.audio import AudioTransform
from llava_scale.data.media import ImageTransform, probe
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.toy import clips, sight_and_sound, sounds
from llava_scale.data.toy.clips import NUM_SLOTS, combination_of, draw_clip, make_clip
from llava_scale.data.toy.questions import NUMBERS
from llava_scale.data.toy.scenes import COLORS, IMAGE_SIZE
from llava_scale.data.toy.sight_and_sound import draw_scene, make_sight_and_sound
from llava_scale.data.toy.sounds import PITCHES, TIMBRES, draw_sound, make_sound
from llava_scale.data.video import VideoTransform

MAKERS = [make_clip, make_sound, make_sight_and_sound]
FRAMES = VideoTransform(image=ImageTransform(size=IMAGE_SIZE), sampling=FrameSampling(num_frames=NUM_SLOTS))
SLOT_S = 0.25


def drawn(maker, number, split="train", turns=6):
    return [maker(random.Random(seed), split, turns) for seed in range(number)]


def frames_of(sample):
    """Float ``(8, H, W, 3)`` of the sample's video, as training decodes it."""
    (data,) = [data for kind, _, data in sample.media if kind == "video"]
    return FRAMES(data).data.permute(0, 2, 3, 1).float().numpy()


def wave_of(sample):
    *_, data = [data for kind, _, data in sample.media if kind == "audio" or sample.video_audio]
    return AudioTransform()(data).data.numpy()


def coverage(picture, color):
    """Where a frame has nearly this colour."""
    return np.abs(picture - np.array(COLORS[color])).sum(-1) < 110


def centre(picture, color):
    rows, cols = np.nonzero(coverage(picture, color))
    return cols.mean(), rows.mean()


def loud_slots(wave):
    """Slots in which something sounds."""
    power = np.abs(wave[: NUM_SLOTS * 4_000]).reshape(NUM_SLOTS, -1)[:, 400:2_800].max(axis=1)
    return {int(slot) for slot in np.flatnonzero(power > 0.08)}


def asked(samples, task):
    found = [(sample, question) for sample in samples for question in sample.questions if question.task == task]
    assert len(found) > 3, task
    return found


@pytest.mark.parametrize("maker", MAKERS)
def test_the_same_seed_gives_the_same_files(maker):
    assert drawn(maker, 4) == drawn(maker, 4)
    assert drawn(maker, 4) != drawn(maker, 4, split="test")


@pytest.fixture
def unencoded(monkeypatch):
    """Makers that leave the files empty: for what only the questions tell."""
    for module in (clips, sounds, sight_and_sound):
        for name in ("render_clip", "render_sound", "encode_video", "encode_sound"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *args: b"")


@pytest.mark.parametrize("maker", MAKERS)
def test_samples_have_questions_with_different_texts(maker, unencoded):
    for sample in drawn(maker, 30):
        texts = [question.text for question in sample.questions]
        assert 1 <= len(texts) == len(set(texts)) <= 6
    assert len({question.task for sample in drawn(maker, 60) for question in sample.questions}) >= 4


@pytest.mark.parametrize(
    ("draw", "key"),
    [
        (draw_clip, combination_of),
        (draw_sound, lambda sound: sound.combination),
        (draw_scene, lambda scene: (combination_of(scene), scene.notes[0].timbre, scene.source)),
    ],
)
def test_training_and_test_never_share_a_combination(draw, key):
    shown = {split: {key(draw(random.Random(seed), split)) for seed in range(400)} for split in ("train", "test")}
    assert not shown["train"] & shown["test"]
    assert min(map(len, shown.values())) > 15


@pytest.mark.parametrize("maker", MAKERS)
def test_no_answer_is_nearly_always_right(maker, unencoded):
    answers: dict[str, Counter] = {}
    for sample in drawn(maker, 300):
        for question in sample.questions:
            answers.setdefault(question.task, Counter())[question.answer] += 1
    for task, counts in answers.items():
        assert counts.most_common(1)[0][1] <= 0.72 * counts.total(), (task, counts)


def test_the_header_tells_what_is_planned_on():
    for sample in drawn(make_sight_and_sound, 6):
        video, *sounds = (probe(ext, data) for _, ext, data in sample.media)
        assert (video.width, video.height, video.num_frames) == (IMAGE_SIZE, IMAGE_SIZE, 16)
        assert video.duration_s == pytest.approx(2.0, abs=1e-3)
        assert all(sound.duration_s == pytest.approx(2.0, abs=0.06) for sound in sounds)


def test_things_move_as_the_answers_say():
    samples = drawn(make_clip, 30)
    for sample, question in asked(samples, "direction"):
        if question.text.startswith("What moves"):
            continue
        color = question.text.split()[4]
        frames = frames_of(sample)
        (x0, y0), (x1, y1) = centre(frames[0], color), centre(frames[-1], color)
        moved = {"right": x1 - x0, "left": x0 - x1, "down": y1 - y0, "up": y0 - y1}
        assert max(moved, key=moved.get) == question.answer
        assert moved[question.answer] > 0.1 * IMAGE_SIZE


def test_things_bounce_as_often_as_the_answers_say():
    for sample, question in asked(drawn(make_clip, 40), "bounces"):
        (data,) = [data for _, _, data in sample.media]
        every = VideoTransform(image=FRAMES.image, sampling=FrameSampling(num_frames=16))(data)
        frames = every.data.permute(0, 2, 3, 1).float().numpy()
        color = question.text.split()[5]
        places = np.array([centre(frame, color) for frame in frames])
        steps = np.diff(places[:, int(np.ptp(places, axis=0).argmax())])
        steps = np.sign(steps[np.abs(steps) > 1.0])
        assert NUMBERS[int((steps[1:] != steps[:-1]).sum())] == question.answer


def test_things_take_turns_as_the_answers_say():
    for sample, question in asked(drawn(make_clip, 40), "turn"):
        frame = frames_of(sample)[0 if "first" in question.text else -1]
        color = max(COLORS, key=lambda name: coverage(frame, name).sum())
        assert question.answer.startswith(color)


def test_sounds_beep_as_often_as_the_answers_say():
    checked, found = 0, asked(drawn(make_sound, 25), "beeps")
    for sample, question in found:
        loud = np.abs(wave_of(sample)) > 0.1
        blocks = loud[: len(loud) // 320 * 320].reshape(-1, 320).any(axis=1)  # 20 ms
        blocks = np.convolve(blocks, np.ones(3), "same") > 0
        number = int((blocks[1:] & ~blocks[:-1]).sum()) + int(blocks[0])
        checked += NUMBERS[number] == question.answer
    assert checked >= 0.9 * len(found)


def test_pitches_rise_or_fall_as_the_answers_say():
    for sample, question in asked(drawn(make_sound, 30), "melody"):
        wave = wave_of(sample)
        thirds = [wave[3_200:8_000], wave[22_000:27_000]]
        low = [np.abs(np.fft.rfft(part * np.hanning(len(part)), 16_000))[200:1_100].argmax() + 200 for part in thirds]
        assert question.answer == ("rise" if low[1] > low[0] else "fall")


def test_instruments_differ_in_their_sound():
    spectra: dict[str, list] = {}
    for sample, question in asked(drawn(make_sound, 50), "timbre"):
        wave = wave_of(sample)
        start = int(np.flatnonzero(np.abs(wave) > 0.1)[0])
        part = np.abs(np.fft.rfft(wave[start : start + 2_400] * np.hanning(2_400)))
        spectra.setdefault(question.answer, []).append(float((part**2).sum() ** 2 / (part**4).sum()))
    assert set(spectra) == set(TIMBRES)
    assert min(spectra["drum"]) > max(spectra["flute"])  # noise fills the spectrum, a flute is one line
    assert set(PITCHES) == {"low", "middle", "high"}


def test_the_sound_comes_with_the_jumps_of_its_source():
    samples = drawn(make_sight_and_sound, 24)
    for sample, question in asked(samples, "source") + asked(samples, "sync"):
        frames, heard = frames_of(sample), loud_slots(wave_of(sample))
        name = question.answer if question.task == "source" else question.text.removeprefix("Does the ")
        sizes = np.array([coverage(frame, name.split()[0]).sum() for frame in frames])
        jumps = {int(slot) for slot in np.flatnonzero(sizes > 1.4 * np.min(sizes))}
        assert (jumps == heard) == (question.answer != "no"), (jumps, heard, question)
        if question.answer == "no":
            assert not jumps & heard


def test_sounds_are_tracks_of_videos_or_files_of_their_own():
    forms = Counter()
    for sample in drawn(make_sight_and_sound, 12):
        forms[sample.video_audio] += 1
        assert len(sample.media) == 1 + (not sample.video_audio)
        assert torch.from_numpy(wave_of(sample)).abs().max() > 0.1
    assert min(forms[True], forms[False]) > 2
