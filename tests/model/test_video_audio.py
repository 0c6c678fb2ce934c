from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from llava_scale.config import DataConfig, ModelConfig
from llava_scale.data.decoding import OtherMedia
from llava_scale.data.media import probe
from llava_scale.data.toy.sounds import make_sound
from llava_scale.errors import CheckpointError, ConfigError, SampleError, ShapeError
from llava_scale.model import build_model, load_model, row_inputs
from llava_scale.types import IGNORE_INDEX, AudioFeatures, MediaInfo, PackedRow
from tests.data.media_files import numbered_video, tone_file


@pytest.fixture(scope="module")
def hearing():
    """The tiny preset with ears, without gradients of its own; leave its weights alone."""
    return build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=0)


@pytest.fixture(scope="module")
def files():
    """A video with sound, its sound as a file, and another sound."""
    video = numbered_video(times_ms=tuple(range(0, 2000, 125)), sound="aac")
    return video, tone_file("mp3", "libmp3lame", seconds=2.0), make_sound(random.Random(2), "train", 1).media[0][2]


def features_of(processor, kind, data):
    info = probe("mp4" if kind == "video" else "wav", data)
    found = processor.media_transforms[kind](data, planned=info)
    return found, processor.token_counter.count(info, step=None)


def row_of(processor, samples):
    """Packed row of samples, each a list of (kind, file)."""
    ids, labels, positions, offsets = [], [], [], [0]
    videos, sounds = [], []
    grids = {"video": [], "audio": []}
    for number, sample in enumerate(samples):
        own = [5 + number]
        for kind, data in sample:
            found, counted = features_of(processor, kind, data)
            (videos if kind == "video" else sounds).append(found)
            grids[kind].append(counted.grid)
            own += [processor.chat_encoder.placeholder_ids[kind]] * counted.num_tokens
        answer = [7, 8 + number, 9]
        ids += own + answer
        labels += [IGNORE_INDEX] * len(own) + answer
        positions += range(len(own) + len(answer))
        offsets.append(len(ids))
    windows = AudioFeatures.joined(sounds) if sounds else None
    return PackedRow(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        position_ids=torch.tensor(positions),
        cu_seq_lens=torch.tensor(offsets, dtype=torch.int32),
        pixel_values_videos=torch.cat([video.data for video in videos]) if videos else None,
        video_grids=tuple(grids["video"]),
        audio_values=windows and windows.values,
        audio_lengths=windows and windows.lengths,
        audio_grids=tuple(grids["audio"]),
    )


def summed_loss(model, row):
    return model(**row_inputs(row), num_items_in_batch=1).loss


def test_the_loss_of_a_packed_row_is_that_of_its_samples_one_by_one(hearing, files):
    model, processor = hearing
    video, sound, other = files
    samples = [[("video", video), ("audio", sound)], [], [("audio", other)], [("audio", sound), ("video", video)]]
    together = summed_loss(model, row_of(processor, samples))
    alone = 0.0
    for number, sample in enumerate(samples):
        row = row_of(processor, [sample])
        ids = row.input_ids.clone()
        ids[0], ids[-2] = 5 + number, 8 + number
        labels = row.labels.clone()
        labels[-2] = 8 + number
        alone += summed_loss(model, replace(row, input_ids=ids, labels=labels))
    torch.testing.assert_close(together, alone)


def test_another_video_and_sound_leave_the_neighbours_logits_as_they_were(hearing, files):
    model, processor = hearing
    video, sound, other = files
    row = row_of(processor, [[("video", video), ("audio", sound)], [("audio", other)]])
    start = int(row.cu_seq_lens[1])

    def logits(given):
        inputs = {name: value for name, value in row_inputs(given).items() if name != "labels"}
        return model(**inputs).logits[0]

    changed = row.audio_values.clone()
    changed[0] += 1
    again = logits(replace(row, audio_values=changed, pixel_values_videos=255 - row.pixel_values_videos))
    before = logits(row)
    assert not torch.equal(before[:start], again[:start])
    assert torch.equal(before[start:], again[start:])


def test_parts_without_input_take_part_with_zero_gradient(hearing, files):
    model, processor = hearing
    _, sound, _ = files
    model.train()
    try:
        for sample, silent in (([("audio", sound)], "projector"), ([], "audio_projector")):
            model.zero_grad()
            summed_loss(model, row_of(processor, [sample])).backward()
            found = [p.grad for name, p in model.named_parameters() if name.startswith(f"{silent}.")]
            assert found
            assert all(grad is not None and not grad.any() for grad in found)
            ears = [p for name, p in model.named_parameters() if name.startswith("audio_tower.") and p.requires_grad]
            assert all(p.grad is not None for p in ears)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


@pytest.mark.parametrize("seconds", [0.1, 0.5, 2.0, 3.0, 3.01, 7.7])
def test_counted_tokens_are_those_that_the_model_makes(hearing, seconds):
    model, processor = hearing
    wave = torch.randn(round(seconds * 16_000)) * 0.1
    inputs = processor("<audio> what?", audio=wave)
    (tokens,) = model.get_audio_features(
        inputs["audio_values"], inputs["audio_lengths"], [tuple(inputs["audio_grids"][0].tolist())]
    )
    assert len(tokens) == int((inputs["input_ids"] == model.config.audio_token_id).sum())


def test_two_seconds_of_sound_take_twelve_tokens_in_the_preset(hearing):
    counter = hearing[1].token_counter
    assert counter.count(MediaInfo(kind="audio", duration_s=2.0), step=None).num_tokens == 12
    assert counter.count(MediaInfo(kind="video", num_frames=16, duration_s=2.0), step=None).grid == (8, 2, 2)
    with pytest.raises(SampleError, match="duration"):
        counter.count(MediaInfo(kind="audio"), step=None)


def test_a_saved_model_hears_and_answers_as_before(hearing, files, tmp_path):
    model, processor = hearing
    video, sound, _ = files
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = load_model(tmp_path)
    prompts, given = ["<video><audio> what?", "<audio> is"], {"videos": [video], "audio": [sound, video]}
    before, after = processor(prompts, **given), its_processor(prompts, **given)
    assert before.keys() == after.keys()
    assert torch.equal(model(**before).logits, loaded(**after).logits)
    answers = [m.generate(**i, max_new_tokens=4, do_sample=False) for m, i in ((model, before), (loaded, after))]
    assert torch.equal(*answers)
    assert its_processor.token_counter == processor.token_counter


def test_missing_weights_of_the_audio_tower_are_refused(hearing, tmp_path):
    model, processor = hearing
    weights = {name: value for name, value in model.state_dict().items() if "audio_tower.model.conv1" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    processor.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing keys"):
        load_model(tmp_path)


def test_beams_keep_their_own_media(hearing, files):
    model, processor = hearing
    video, sound, other = files
    inputs = processor(["<video> a <audio>", "<audio> b"], videos=[video], audio=[sound, other])
    together = model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    alone = model.generate(**processor("<audio> b", audio=[other]), max_new_tokens=4, num_beams=2, do_sample=False)
    assert together[1, -4:].tolist() == alone[0, -4:].tolist()


def test_the_chat_template_takes_videos_and_sounds(hearing, files, tmp_path):
    _, processor = hearing
    path = tmp_path / "sound.wav"
    path.write_bytes(files[1])
    content = [
        {"type": "video", "video": files[0]},
        {"type": "audio", "path": str(path)},
        {"type": "text", "text": "what?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert inputs["video_grids"].tolist() == [[8, 2, 2]]
    assert inputs["audio_grids"].shape == (1, 3)


def test_an_earlier_checkpoint_is_given_hearing(tmp_path, files):
    model, processor = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(SampleError, match="does not hear"):
        processor("<audio>", audio=[files[1]])
    config = ModelConfig(init_from=str(tmp_path), audio_tower="tiny")
    hearing, its_processor = build_model(config, chat_template="native", seed=3)
    inputs = its_processor("<audio> what?", audio=[files[1]])
    assert hearing(**inputs).logits.isfinite().all()
    assert torch.equal(hearing.projector.layers[0].weight, model.projector.layers[0].weight)


def test_audio_settings_without_a_tower_are_refused():
    with pytest.raises(ConfigError, match="audio_tower"):
        ModelConfig(preset="tiny", audio_compressor={"type": "pool"})


def test_compressors_that_need_a_vision_tower_are_refused():
    for section in ({"type": "tome"}, {"type": "visionzip"}, {"type": "stc"}):
        config = ModelConfig(preset="tiny", audio_tower="tiny", audio_compressor=section)
        with pytest.raises(ConfigError, match="audio_compressor"):
            build_model(config, chat_template="native", seed=0)


def test_grids_that_do_not_add_up_are_refused(hearing):
    model, processor = hearing
    found = processor("<audio>", audio=torch.zeros(16_000))
    with pytest.raises(ShapeError, match="announced"):
        model.get_audio_features(found["audio_values"], found["audio_lengths"], [(1, 1, 3)])


def test_other_media_are_empty_where_there_are_none():
    assert OtherMedia() == OtherMedia([], [])


def test_a_run_says_which_media_are_too_long_or_too_damaged(hearing):
    processor = hearing[1].with_template("plain")
    assert processor.media_transforms["video"].partial == "forbid"
    processor.set_limits(DataConfig(partial="allow", max_media_seconds=60.0, max_image_pixels=1_000))
    again = processor.with_template("native")
    for kind, transform in again.media_transforms.items():
        if kind == "image":
            assert transform.max_pixels == 1_000
            continue
        how = transform.transform if kind == "audio" else transform
        assert (how.partial, how.limits.max_seconds) == ("allow", 60.0)
    assert (again.video, again.audio) == (processor.video, processor.audio)
    assert hearing[1].media_transforms["video"].partial == "forbid"
