from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from llava_scale.config import ModelConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.decoding import decode_others
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.toy.sounds import make_sound
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, SampleError
from llava_scale.eval.tasks import questions_of
from llava_scale.model import build_model
from llava_scale.serving.batch import read_request
from llava_scale.serving.chat import AnswerSettings, ChatSession
from llava_scale.serving.engine import Engine, GenerationRequest
from llava_scale.serving.prompts import CutMedium, load_media, make_prompt
from llava_scale.types import Turn
from tests.data.media_files import numbered_video, tone_file


@pytest.fixture(scope="module")
def parts():
    return build_model(ModelConfig(preset="tiny", audio_tower="tiny"), chat_template="native", seed=3)


@pytest.fixture(scope="module")
def requests():
    video = numbered_video(times_ms=tuple(range(0, 2000, 125)), sound="aac")
    sound = tone_file("mp3", "libmp3lame", seconds=2.0)
    other = make_sound(random.Random(2), "train", 1).media[0][2]
    return [
        GenerationRequest(turns=(Turn("user", "which one?"),), media={"video": (video,), "audio": (sound,)}),
        GenerationRequest(turns=(Turn("user", "<audio> or <audio>"),), media={"audio": (sound, other)}),
        GenerationRequest(turns=(Turn("user", "hello"),)),
        GenerationRequest(turns=(Turn("user", "which one?"),), media={"video": (video,)}),
    ]


def test_videos_and_sounds_in_one_batch_are_answered_as_alone(parts, requests):
    engine = Engine(*parts)
    alone = [engine.generate([request], max_new_tokens=6)[0] for request in requests]
    assert engine.generate(requests, max_new_tokens=6, batch_size=4) == alone


def test_a_prompt_is_what_the_processor_makes(parts, requests):
    model, processor = parts
    prompt = make_prompt(requests[0], processor)
    media = requests[0].media
    turns = [{"type": "video", "video": media["video"][0]}, {"type": "audio", "audio": media["audio"][0]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*turns, {"type": "text", "text": "which one?"}]}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    for kind in ("video", "audio"):
        token = getattr(model.config, f"{kind}_token_id")
        assert prompt.input_ids.count(token) == int((inputs["input_ids"] == token).sum()) > 0


def test_a_line_of_a_file_names_videos_and_sounds(tmp_path):
    record = {"question": "which?", "video": "a.mp4", "audio": ["a.wav", "b.mp3"]}
    request = read_request(record, tmp_path)
    assert request.media["video"] == [tmp_path / "a.mp4"]
    assert request.media["audio"] == [tmp_path / "a.wav", tmp_path / "b.mp3"]
    with pytest.raises(SampleError, match="'audio' must be a path"):
        read_request({"question": "which?", "audio": 3}, tmp_path)


def test_a_conversation_takes_videos_and_sounds(parts, requests, tmp_path):
    session = ChatSession(Engine(*parts), AnswerSettings(max_new_tokens=3))
    for kind, name in (("video", "a.mp4"), ("audio", "a.wav")):
        (tmp_path / name).write_bytes(requests[0].media[kind][0])
        assert session.add(kind, tmp_path / name).duration_s > 1
    "".join(session.ask("which one?"))
    assert {kind: len(items) for kind, items in session.media.items()} == {"video": 1, "audio": 1}


def test_a_model_that_does_not_hear_says_so(requests):
    engine = Engine(*build_model(ModelConfig(preset="tiny"), chat_template="native", seed=3))
    with pytest.raises(SampleError, match="audio"):
        engine.generate(requests[:1], max_new_tokens=2)


def media_of(request, processor):
    prompt = make_prompt(request, processor)
    return prompt, load_media(prompt, processor)(0)


def test_blank_media_tell_nothing_of_what_was_there(parts, requests):
    """As many tokens as before, and the same for any clip and sound of that length."""
    _, processor = parts
    seen_prompt, seen = media_of(requests[0], processor)
    blank_prompt, blank = media_of(replace(requests[0], change="blank"), processor)
    assert blank_prompt.input_ids == seen_prompt.input_ids
    assert blank_prompt.signature != seen_prompt.signature
    frames = blank["pixel_values_videos"]
    assert frames.shape == seen["pixel_values_videos"].shape
    assert (frames.flatten(2) == frames[:1, :, :1, 0]).all()
    windows = blank["audio_values"]
    assert windows.shape == seen["audio_values"].shape
    assert not torch.equal(windows, seen["audio_values"])
    assert windows.flatten(1).std(dim=1).max() < seen["audio_values"].flatten(1).std(dim=1).max() / 10


def test_shuffled_frames_are_the_same_frames_in_another_order(parts, requests):
    _, processor = parts
    request = replace(requests[3], change="shuffle")
    _, seen = media_of(requests[3], processor)
    _, shuffled = media_of(request, processor)
    before, after = seen["pixel_values_videos"], shuffled["pixel_values_videos"]
    assert not torch.equal(before, after)
    order = [next(place for place, frame in enumerate(before) if torch.equal(frame, other)) for other in after]
    assert len(set(order)) >= len(before) // 2
    assert torch.equal(after, media_of(request, processor)[1]["pixel_values_videos"])


def test_a_video_is_heard_where_that_is_asked_for(parts, requests, tmp_path):
    _, processor = parts
    video = requests[3].media["video"][0]
    heard = replace(requests[3], video_audio=True)
    prompt = make_prompt(heard, processor)
    explicit = GenerationRequest(
        turns=(Turn("user", "<video><audio>\nwhich one?"),), media={"video": (video,), "audio": (video,)}
    )
    assert prompt.input_ids == make_prompt(explicit, processor).input_ids
    (tmp_path / "clip.mp4").write_bytes(video)
    line = {"question": "which one?", "video": "clip.mp4", "video_audio": True}
    assert make_prompt(read_request(line, tmp_path), processor).input_ids == prompt.input_ids
    with pytest.raises(SampleError, match="true or false"):
        read_request(line | {"video_audio": 1}, tmp_path)


def test_a_conversation_about_a_video_with_its_sound_is_saved_as_a_record_says_it(parts, requests, tmp_path):
    files = {"clip.mp4": requests[3].media["video"][0], "tone.wav": requests[1].media["audio"][1]}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    session = ChatSession(Engine(*parts), AnswerSettings(max_new_tokens=2), video_audio=True)
    session.add("video", tmp_path / "clip.mp4")
    answer = "".join(session.ask("which one?"))
    expected = Engine(*parts).generate([replace(requests[3], video_audio=True)], max_new_tokens=2)[0]
    assert answer.strip() == expected.strip()
    session.turns = session.turns or (Turn("user", "<video><audio>\nwhich one?"), Turn("assistant", "?"))
    session.media = session.media or dict.fromkeys(("video", "audio"), session.waiting["video"])
    session.save(tmp_path / "talk.json")
    (saved,) = json.loads((tmp_path / "talk.json").read_text())
    assert saved["video_audio"] is True
    assert "audio" not in saved
    session.media["audio"] = tuple(reversed((*session.media["audio"], replace(session.media["audio"][0], path="x"))))
    with pytest.raises(ConfigError, match="sounds stand before"):
        session.save(tmp_path / "other.json")


def test_a_clip_is_answered_as_a_file_that_holds_no_more(parts, requests):
    _, processor = parts
    video, sound = (requests[0].media[kind][0] for kind in ("video", "audio"))
    cut = {"video": (CutMedium(video, (1.0, 2.0)),), "audio": (CutMedium(sound, (0.5, None)),)}
    prompt = make_prompt(replace(requests[0], media=cut), processor)
    whole = make_prompt(requests[0], processor)
    assert [info.duration_s for _, _, info in prompt.media] == pytest.approx([1.0, 1.5], abs=0.06)
    assert prompt.signature != whole.signature
    made = load_media(prompt, processor)(0)
    how = processor.video_transform
    assert torch.equal(made["pixel_values_videos"], how(video, start_s=1.0, end_s=2.0).data)
    assert made["audio_lengths"].sum() < load_media(whole, processor)(0)["audio_lengths"].sum()
    silent = load_media(make_prompt(replace(requests[0], media=cut, change="blank"), processor), processor)(0)
    assert torch.equal(silent["audio_lengths"], made["audio_lengths"])


def test_a_line_of_a_file_may_use_clips(tmp_path):
    record = {"question": "which?", "video": "a.mp4", "audio": ["a.wav", "b.mp3"], "video_audio": True}
    request = read_request({**record, "video_clips": [2, 4.5], "audio_clips": [None, [0, 1]]}, tmp_path)
    assert request.media["video"] == [CutMedium(tmp_path / "a.mp4", (2.0, 4.5))]
    assert request.media["audio"] == [tmp_path / "a.wav", CutMedium(tmp_path / "b.mp3", (0.0, 1.0))]
    with pytest.raises(SampleError, match="video_clips"):
        read_request({**record, "video_clips": [[1, 2], [3, 4]]}, tmp_path)


def test_frames_stored_ahead_are_asked_as_they_are_trained(parts, tmp_path):
    _, processor = parts
    (tmp_path / "a.mp4").write_bytes(numbered_video(times_ms=tuple(range(0, 2000, 125))))
    turns = [{"from": "human", "value": "<video> which?"}, {"from": "gpt", "value": "one"}]
    (tmp_path / "in.json").write_text(json.dumps([{"id": "k", "video": "a.mp4", "conversations": turns}]))
    options = MediaOptions(image_size=processor.image_size, video_frames=12)
    pack(tmp_path / "in.json", tmp_path / "out", media_root=tmp_path, options=options)
    data = open_dataset(str(tmp_path / "out"))
    sample, (info,) = data.sample(0), data.media_infos(0)
    (question,) = questions_of(sample, 0)
    prompt = make_prompt(GenerationRequest(turns=question.turns, media=question.media), processor)
    assert prompt.media[0][2] == info
    trained = decode_others(sample, [info], processor.media_transforms).frames[0]
    assert torch.equal(load_media(prompt, processor)(0)["pixel_values_videos"], trained)
