from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.data.audio import AudioTransform
from llava_scale.data.dataset import open_dataset
from llava_scale.data.media import ImageTransform
from llava_scale.data.ppm import ppm_file, ppm_pixels
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.video import VideoTransform
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, SampleError
from tests.data.media_files import numbered_video, read_number, tone_file

SIZE = 96
SIZES = ((200, 150), (150, 200), (96, 50), (50, 96), (96, 96), (31, 7))


def talk(*kinds):
    markers = "".join(f"<{kind}>\n" for kind in kinds)
    return [{"from": "human", "value": f"{markers}What?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture
def source(tmp_path):
    """Two videos in one sample, a sound in another."""
    files = {"a.mp4": numbered_video(), "b.webm": numbered_video(container="webm", codec="libvpx-vp9")}
    files["c.mp3"] = tone_file("mp3", "libmp3lame", 44_100, gains=(1.0, 1.0))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    records = [
        {"id": "videos", "video": ["a.mp4", "b.webm"], "conversations": talk("video", "video")},
        {"id": "sound", "audio": "c.mp3", "conversations": talk("audio")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def packed(source, **options):
    out = source.parent / "shards"
    result = pack(source, out, media_root=source.parent, options=MediaOptions(**options))
    assert not result.bad
    return open_dataset(str(out))


def test_videos_are_stored_as_frames_with_their_times(source):
    dataset = packed(source, image_size=SIZE, video_frames=4)
    sample = dataset.sample(0)
    assert sample.extra["frame_times_s"] == [[0.25, 0.75, 1.25, 1.75]] * 2
    for info in dataset.media_infos(0):
        assert (info.kind, info.width, info.height, info.num_frames) == ("video", SIZE, SIZE, 4)
    how = VideoTransform(image=ImageTransform(size=SIZE), sampling=FrameSampling(num_frames=4))
    for (ext, data), original in zip(sample.media["video"], ("a.mp4", "b.webm"), strict=True):
        assert ext == "frames"
        stored = how.stored(data, sample.extra["frame_times_s"][0], planned=dataset.media_infos(0)[0])
        assert [read_number(picture, SIZE) for picture in stored.data] == [5, 15, 25, 35]
        decoded = how((source.parent / original).read_bytes())
        assert stored.times_s == pytest.approx(decoded.times_s, abs=1e-3)
        assert (stored.data.float() - decoded.data.float()).abs().mean() < 3


def test_frames_may_be_stored_by_rate(source):
    dataset = packed(source, image_size=SIZE, video_fps=5.0)
    assert [info.num_frames for info in dataset.media_infos(0)] == [10, 10]


def test_sounds_are_stored_as_flac_at_the_models_rate(source):
    dataset = packed(source, audio_rate=16_000)
    ((ext, data),) = dataset.sample(1).media["audio"]
    assert ext == "flac"
    stored = AudioTransform()(data).data
    decoded = AudioTransform()((source.parent / "c.mp3").read_bytes()).data
    torch.testing.assert_close(stored, decoded, rtol=0, atol=1 / 32_768)
    (info,) = dataset.media_infos(1)
    assert info.duration_s == pytest.approx(3.0)
    assert dataset.sample(0).media["video"][0][1] == (source.parent / "a.mp4").read_bytes()


def test_the_same_input_gives_the_same_shards(source, tmp_path):
    options = MediaOptions(image_size=SIZE, video_frames=2, audio_rate=8_000)
    for name in ("x", "y"):
        pack(source, tmp_path / name, media_root=source.parent, options=options)
    assert (tmp_path / "x" / "shard-00000.tar").read_bytes() == (tmp_path / "y" / "shard-00000.tar").read_bytes()
    described = json.loads((tmp_path / "x" / "dataset.json").read_text())["prepared"]
    assert described["video_frames"] == 2
    assert described["audio_rate"] == 8_000


def test_damaged_videos_and_sounds_are_bad_records(source):
    (source.parent / "b.webm").write_bytes(b"broken")
    (source.parent / "c.mp3").write_bytes(b"broken too")
    (source.parent / "good.json").write_text(
        json.dumps([{"id": "t", "conversations": talk()}, *json.loads(source.read_text())])
    )
    options = MediaOptions(image_size=SIZE, video_frames=2, audio_rate=16_000)
    result = pack(source.parent / "good.json", source.parent / "out", media_root=source.parent, options=options)
    assert [bad.id for bad in result.bad] == ["videos", "sound"]
    assert "video 'b.webm': unreadable video file" in result.bad[0].reason
    assert "audio 'c.mp3': unreadable sound file" in result.bad[1].reason


@pytest.mark.parametrize(
    "options",
    [
        {"video_frames": 4},
        {"image_size": 8, "video_frames": -1},
        {"image_size": 8, "video_frames": 2, "video_fps": 1.0},
        {"audio_rate": -1},
    ],
)
def test_contradicting_options_are_refused(options):
    with pytest.raises(ConfigError):
        MediaOptions(**options)


@pytest.mark.parametrize(("text", "number"), [("3", 3), ("fps=2", 4)])
def test_the_command_stores_frames_and_sounds(source, text, number):
    out = source.parent / "out"
    options = ("--image-size", SIZE, "--video-frames", text, "--audio-rate", 16_000, "--workers", 1)
    done = CliRunner().invoke(build_app(), ["data", "pack", *map(str, (source, out, *options))])
    assert done.exit_code == 0, done.output
    dataset = open_dataset(str(out))
    assert dataset.media_infos(0)[0].num_frames == number
    assert dataset.sample(1).media["audio"][0][0] == "flac"


@pytest.mark.parametrize("text", ["0", "fps=x", "many", "-2"])
def test_the_command_refuses_other_numbers_of_frames(source, text):
    done = CliRunner().invoke(
        build_app(),
        ["data", "pack", str(source), str(source.parent / "out"), "--image-size", "8", "--video-frames", text],
    )
    assert done.exit_code != 0
    assert "--video-frames must be a number of frames or fps=RATE" in str(done.exception)


def test_pictures_without_compression_are_the_very_pixels_that_their_files_give(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for number, (width, height) in enumerate(SIZES):
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / name)
        records.append({"id": str(number), "image": name, "conversations": talk("image")})
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = MediaOptions(image_size=SIZE, image_format="ppm", image_background=(9, 8, 7))
    pack(tmp_path / "data.json", tmp_path / "out", media_root=tmp_path, options=options)
    transform = ImageTransform(SIZE, "pad", (9, 8, 7))
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.info.prepared["image_format"] == "ppm"
    for number, record in enumerate(records):
        ((extension, data),) = dataset.sample(number).media["image"]
        wanted = transform((tmp_path / record["image"]).read_bytes())
        assert extension == "ppm"
        assert torch.equal(transform(data), wanted)
        block = torch.full((1, SIZE, SIZE, 3), 77, dtype=torch.uint8).permute(0, 3, 1, 2)
        assert torch.equal(transform(data, block[0]), wanted)
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) == SIZE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["jpg", "ppm"])
def test_decoding_in_place_gives_the_same_as_decoding(kind, size):
    rng = np.random.default_rng(1)
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(buffer, format="JPEG" if kind == "jpg" else "PPM")
    for aspect in ("pad", "resize"):
        transform = ImageTransform(SIZE, aspect, (9, 8, 7))
        out = torch.full((1, SIZE, SIZE, 3), 77, dtype=torch.uint8).permute(0, 3, 1, 2)[0]
        assert torch.equal(transform(buffer.getvalue(), out), transform(buffer.getvalue()))


def test_a_short_or_unusual_ppm_is_left_to_pillow():
    whole = ppm_file(np.full((2, 3, 3), 5, np.uint8))
    assert np.array_equal(ppm_pixels(whole), np.full((2, 3, 3), 5))
    for data in (whole[:-1], whole + b"x", b"P6\n# note\n3 2\n255\n" + bytes(18), b"P6\n3 2\n31\n" + bytes(18), b""):
        assert ppm_pixels(data) is None
    with pytest.raises(SampleError, match="PPM"):
        ImageTransform(SIZE)(whole[:-1])
