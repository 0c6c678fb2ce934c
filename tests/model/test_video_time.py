"""Time stamps between frames, sound in turn with frames, and the vision tower on some frames at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from llava_scale.config import DataConfig, ModelConfig
from llava_scale.config.compressor import DivPruneConfig, PoolConfig, TomeConfig, VisionZipConfig
from llava_scale.config.data import PackingConfig, SourceConfig
from llava_scale.config.model import VideoConfig
from llava_scale.data.loader import open_stream
from llava_scale.data.media import probe
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, SampleError
from llava_scale.model import build_model, load_model, row_inputs
from llava_scale.serving.engine import Engine
from llava_scale.serving.prompts import GenerationRequest, make_prompt
from llava_scale.types import MediaInfo, Turn
from tests.data.media_files import numbered_video

STAMPED = VideoConfig(num_frames=4, timestamps=True, sound_order="interleave")
CLIP = numbered_video(times_ms=tuple(range(0, 5000, 100)), sound="aac")


def built(video=STAMPED, **fields):
    config = ModelConfig(preset="tiny", audio_tower="tiny", video=video, **fields)
    return build_model(config, chat_template="native", seed=0)


@pytest.fixture(scope="module")
def timed():
    return built()


def test_each_frame_is_told_its_time_and_the_sound_takes_turns(timed):
    model, processor = timed
    turns = (Turn("user", "<video><audio>what?"),)
    prompt = make_prompt(GenerationRequest(turns=turns, media={"video": [CLIP], "audio": [CLIP]}), processor)
    shown = processor.tokenizer.decode(prompt.input_ids)
    times = [shown.index(f"<{time} seconds>") for time in ("0.6", "1.9", "3.1", "4.4")]
    assert times == sorted(times)
    first_sound = shown.index("<audio>")
    assert times[1] < first_sound < times[2]
    info = probe("mp4", CLIP)
    counted = processor.token_counter.count(info, step=None)
    assert prompt.input_ids.count(model.config.video_token_id) == counted.num_tokens == 4 * 4
    assert prompt.media_spans[0] == prompt.media_spans[1]
    sound = processor.token_counter.count(probe("wav", CLIP), step=None)
    assert prompt.media_spans[0][1] == counted.num_positions + sound.num_tokens
    assert prompt.num_media_tokens == counted.num_tokens + sound.num_tokens


def test_training_processor_and_serving_see_the_same_positions(timed, tmp_path):
    model, processor = timed
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a ring"}]
    record = {"id": "a", "video": "clip.mp4", "video_audio": True, "conversations": turns}
    (tmp_path / "in.json").write_text(json.dumps([record, record | {"id": "b"}]))
    pack(tmp_path / "in.json", tmp_path / "shards", media_root=tmp_path)
    config = DataConfig(
        eval_sources=(SourceConfig(path=str(tmp_path / "shards")),),
        num_workers=0,
        cache_dir=str(tmp_path / "cache"),
        packing=PackingConfig(row_length=1024),
    )
    stream = open_stream(
        config,
        seed=0,
        rows_per_step=1,
        encoder=processor.chat_encoder,
        counter=processor.token_counter,
        image_transform=processor.image_transform,
        transforms=processor.media_transforms,
        split="eval",
    )
    with stream:
        rows = [row for batch in stream for row in batch.rows]
    assert not [skipped for row in rows for skipped in row.skipped]
    row = rows[0]
    assert len(row.input_ids) <= 1024
    sample = row.input_ids[: int(row.cu_seq_lens[1])].tolist()
    request = GenerationRequest(turns=(Turn("user", "what?"),), media={"video": [CLIP]}, video_audio=True)
    prompt = make_prompt(request, processor)
    assert sample[: len(prompt.input_ids)] == prompt.input_ids
    text = processor.chat_encoder.render_prompt((Turn("user", "<video><audio>\nwhat?"),))
    inputs = processor(text, videos=[CLIP], audio=[CLIP])
    assert inputs["input_ids"][0].tolist() == prompt.input_ids
    loss = model(**row_inputs(row)).loss
    assert loss.isfinite()
    engine = Engine(model, processor)
    answer = engine.generate([request, replace(request, video_audio=False)], max_new_tokens=4)
    assert answer[0] == engine.generate([request], max_new_tokens=4)[0]


def test_a_checkpoint_keeps_its_stamps_and_older_ones_have_none(timed, tmp_path):
    model, processor = timed
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    _, again = load_model(tmp_path)
    info = MediaInfo(kind="video", num_frames=50, duration_s=5.0)
    assert again.token_counter.count(info, step=None) == processor.token_counter.count(info, step=None)
    assert again.token_counter.fingerprint() == processor.token_counter.fingerprint()
    old = build_model(ModelConfig(preset="tiny"), chat_template="native", seed=0)[1]
    old.video = {"scheme": "time", "num_frames": 4, "fps": 1.0, "max_frames": 32}
    assert old.token_counter.count(info, step=None).parts == ()
    assert old.token_counter.fingerprint() != processor.token_counter.fingerprint()


def test_stamps_of_pooled_frames_tell_the_first_of_each_group():
    _, processor = built(compressor=PoolConfig(type="pool", window=(2, 1, 1)))
    counted = processor.token_counter.count(MediaInfo(kind="video", num_frames=50, duration_s=4.0), step=None)
    assert [part.time_s for part in counted.parts] == [0.5, 2.5]
    assert sum(part.num_tokens for part in counted.parts) == counted.num_tokens


@pytest.mark.parametrize("compressor", [DivPruneConfig(type="divprune"), VisionZipConfig(type="visionzip")])
def test_tokens_of_no_certain_frame_cannot_be_stamped(compressor):
    with pytest.raises(ConfigError, match="tokens that belong to certain frames"):
        _ = built(compressor=compressor)[1].token_counter
    with pytest.raises(ConfigError, match="spread evenly over time"):
        _ = built(audio_compressor=DivPruneConfig(type="divprune"))[1].token_counter
    with pytest.raises(ConfigError, match="goes by index"):
        VideoConfig(scheme="uniform", timestamps=True)


def test_frames_without_times_are_refused_where_times_are_read(timed):
    _, processor = timed
    with pytest.raises(ConfigError, match="give the video as a file"):
        processor("<video>", videos=[torch.zeros(4, 3, 48, 48, dtype=torch.uint8)])
    with pytest.raises(SampleError, match="duration of the video is unknown"):
        processor.token_counter.count(MediaInfo(kind="video", num_frames=4), step=None)


@pytest.mark.parametrize(
    "compressor",
    [
        None,
        TomeConfig(type="tome", ratio=0.5),
        PoolConfig(type="pool", window=(2, 2, 2)),
        VisionZipConfig(type="visionzip"),
    ],
)
def test_some_frames_at_once_give_the_same_tokens(compressor):
    frames = torch.randint(0, 256, (7, 3, 48, 48), dtype=torch.uint8)
    whole, _ = built(VideoConfig(), compressor=compressor)
    parts, _ = built(VideoConfig(frames_at_once=3), compressor=compressor)
    seen = []
    forward = parts.vision_tower.forward
    parts.vision_tower.forward = lambda pixels: seen.append(len(pixels)) or forward(pixels)
    with torch.no_grad():
        expected, found = (model.get_video_features(frames)[0] for model in (whole, parts))
    assert seen == [3, 3, 1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_some_frames_at_once_give_the_same_gradients_and_hold_less_for_them():
    frames = torch.randint(0, 256, (6, 3, 48, 48), dtype=torch.uint8)
    found = []
    for size in (0, 2):
        model, _ = built(VideoConfig(frames_at_once=size))
        model.requires_grad_(True).train()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: (held.append(x.numel()), x)[1], lambda x: x):
            loss = model.get_video_features(frames)[0].pow(2).mean()
        loss.backward()
        found.append((model.vision_tower, sum(held)))
    (whole, all_held), (parts, held) = found
    assert held < all_held / 3
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
