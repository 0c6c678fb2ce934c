"""Videos and sounds on the page of samples."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from llava_scale.config import ModelConfig
from llava_scale.config.model import VideoConfig
from llava_scale.data.dataset import open_dataset
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.write import pack
from llava_scale.model.build import build_processor
from llava_scale.viz import dataset_media
from llava_scale.viz.dataset import ModelSide, view_tokens, write_samples_page
from llava_scale.viz.dataset_media import spectrogram
from tests.data.media_files import numbered_video, tone_file

CLIP = numbered_video(times_ms=tuple(range(0, 2000, 100)), sound="aac")


def packed(folder, name, clips=None, **options):
    for file, data in (("clip.mp4", CLIP), ("tone.flac", tone_file("flac", "flac", 16_000, seconds=1.0))):
        (folder / file).write_bytes(data)
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a tone"}]
    records = [
        {"id": "both", "video": "clip.mp4", "video_audio": True, "conversations": turns, **(clips or {})},
        {"id": "tone", "audio": "tone.flac", "conversations": turns},
    ]
    (folder / "in.json").write_text(json.dumps(records))
    pack(folder / "in.json", folder / name, media_root=folder, options=MediaOptions(**options))
    return open_dataset(str(folder / name))


@pytest.fixture(scope="module")
def tiny():
    video = VideoConfig(num_frames=4, timestamps=True)
    processor = build_processor(ModelConfig(preset="tiny", audio_tower="tiny", video=video), chat_template="native")
    return ModelSide(
        name="tiny",
        encoder=processor.chat_encoder,
        counter=processor.token_counter,
        transform=processor.image_transform,
        video=processor.video_transform,
    )


def test_a_video_is_played_and_its_frames_are_those_of_the_model(tiny, tmp_path):
    data = packed(tmp_path, "shards")
    page = write_samples_page(data, [0, 1], tmp_path / "page.html", tiny).read_text()
    assert page.count("<video") == 1
    assert 'src="data:video/mp4;base64,' in page
    for time in ("0.20 s", "0.70 s", "1.20 s", "1.70 s"):
        assert f">{time}<" in page
    counted = tiny.counter.count(data.media_infos(0)[0], step=None)
    assert f"{counted.num_tokens} tokens and {counted.num_positions - counted.num_tokens} of time stamps" in page
    views = view_tokens(data.sample(0), data.media_infos(0), tiny)
    assert [view.num_tokens for view in views if view.kind == "video"] == [counted.num_positions]


def test_of_a_clip_only_its_frames_and_its_sound_are_shown(tiny, tmp_path):
    data = packed(tmp_path, "shards", clips={"video_clips": [1.0, 1.8]})
    page = write_samples_page(data, [0], tmp_path / "page.html", tiny).read_text()
    for time in ("1.10 s", "1.30 s", "1.50 s", "1.70 s"):
        assert f">{time}<" in page
    assert page.count("from 1 s on") >= 2  # of the video and of the sound
    assert ">0.80 s<" in page


def test_a_sound_is_played_drawn_and_counted(tiny, tmp_path):
    page = write_samples_page(packed(tmp_path, "shards"), [0, 1], tmp_path / "page.html", tiny).read_text()
    assert page.count("<audio") == 2
    assert 'src="data:audio/flac;base64,' in page
    assert 'src="data:audio/wav;base64,' in page  # the video's track, which is no file of its own
    assert page.count('class="wave"') == page.count('class="bands"') == 2
    assert "(sound track)" in page
    assert "features → 12 tokens" in page


def test_without_a_model_frames_are_spread_over_the_video(tmp_path):
    page = write_samples_page(packed(tmp_path, "shards"), [0], tmp_path / "page.html", ModelSide()).read_text()
    assert "frames from it: 8 frames" in page


@pytest.mark.parametrize("known", [True, False])
def test_stored_frames_are_shown_without_a_player(tiny, tmp_path, known):
    data = packed(tmp_path, "frames", image_size=32, video_frames=4)
    side = tiny if known else ModelSide()
    page = write_samples_page(data, [0], tmp_path / "page.html", side).read_text()
    assert "<video" not in page
    assert page.count("<figcaption>frame ") == 4
    assert page.count("<audio") == 1


def test_a_file_that_is_too_large_for_a_page_is_not_carried(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_media, "_MAX_PLAYED", 100)
    page = write_samples_page(packed(tmp_path, "shards"), [1], tmp_path / "page.html", tiny).read_text()
    assert "<audio" not in page
    assert "too large to be played in this page" in page


def test_a_spectrogram_is_brightest_at_its_tone():
    time = torch.arange(16_000) / 16_000
    low, high = (spectrogram(0.5 * torch.sin(2 * torch.pi * hertz * time)) for hertz in (300.0, 6_000.0))
    rows = [np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean(1).argmax() for data in (low, high)]
    assert rows[0] > 90
    assert rows[1] < 40
    assert spectrogram(torch.zeros(100))
