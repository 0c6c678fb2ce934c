"""Records whose videos are heard: ``"video_audio": true`` from the record to the sample."""

from __future__ import annotations

import json
import tarfile

import pytest

from llava_scale.data.audio import AudioTransform
from llava_scale.data.check import check_dataset
from llava_scale.data.dataset import open_dataset
from llava_scale.data.indexing import build_index
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.records import FRAMES_EXT, parse_record
from llava_scale.data.repack import reshard
from llava_scale.data.write import pack
from llava_scale.errors import SampleError
from tests.data.media_files import numbered_video, pitch, tone_file

SPOKEN = numbered_video(times_ms=tuple(range(0, 1000, 50)), sound="aac")
SILENT = numbered_video(times_ms=tuple(range(0, 500, 50)))
SOUND = tone_file(seconds=0.5)


def record(key, question, **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a tone"}]
    return {"id": key, "conversations": turns, **media}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tracks")
    for name, data in (("spoken.mp4", SPOKEN), ("silent.mp4", SILENT), ("sound.wav", SOUND)):
        (root / name).write_bytes(data)
    both = {"video": "spoken.mp4", "audio": "sound.wav", "video_audio": True}
    records = [
        record("heard", "what?", video="spoken.mp4", video_audio=True),
        record("both", "<video><audio> and <audio>", **both),
        record("seen", "what?", video="spoken.mp4", video_audio=False),
        record("silent", "what?", video="silent.mp4", video_audio=True),
        record("unmarked", "what?", **both),
        record("none", "what?", video_audio=True),
        record("odd", "what?", video="spoken.mp4", video_audio="yes"),
    ]
    (root / "in.json").write_text(json.dumps(records))
    return root


def packed(folder, out, **options):
    outcome = pack(
        folder / "in.json", out, media_root=folder, shard_size=10, workers=1, options=MediaOptions(**options)
    )
    return outcome, open_dataset(str(out))


@pytest.fixture(scope="module")
def shards(folder):
    return packed(folder, folder / "shards")


def test_the_sound_track_of_a_video_is_a_sound_of_its_sample(shards):
    _, data = shards
    assert [data.key(number) for number in range(len(data))] == ["heard", "both", "seen"]
    heard, both, seen = data.samples(range(3))
    assert heard.turns[0].text == "<video><audio>\nwhat?"
    assert heard.media["audio"] == heard.media["video"] == (("mp4", SPOKEN),)
    assert [ext for ext, _ in both.media["audio"]] == ["mp4", "wav"]
    assert "audio" not in seen.media
    assert seen.turns[0].text == "<video>\nwhat?"
    infos = data.media_infos(1)
    assert [info.kind for info in infos] == ["video", "audio", "audio"]
    assert infos[1].duration_s == pytest.approx(1.0, abs=0.1)
    assert infos[2].duration_s == pytest.approx(0.5)
    wave = AudioTransform()(heard.media["audio"][0][1]).data
    assert pitch(wave[2_000:14_000]) == pytest.approx(500, abs=5)


def test_records_that_cannot_be_heard_say_why(shards):
    outcome, _ = shards
    reasons = {bad.id: bad.reason for bad in outcome.bad}
    assert "sound track of video 'silent.mp4'" in reasons["silent"]
    assert "mark every one with <audio>, sound tracks first" in reasons["unmarked"]
    assert "no video" in reasons["none"]
    assert "must be true or false" in reasons["odd"]


def test_a_track_takes_no_bytes_of_the_shard_and_survives_a_new_index_and_new_shards(folder, shards, tmp_path):
    _, data = shards
    path = folder / "shards" / data.shard_name(0)
    with tarfile.open(path) as tar:
        assert [name for name in tar.getnames() if name.startswith("heard")] == ["heard.mp4", "heard.json"]
    content = path.read_bytes()
    index = build_index(lambda offset, size: content[offset : offset + size], len(content), name=path.name)
    stored = data.index(0)
    assert [index.entry(number) for number in range(3)] == [stored.entry(number) for number in range(3)]
    reshard(str(folder / "shards"), tmp_path / "new", shard_size=2, on_progress=lambda done, total: None)
    again = open_dataset(str(tmp_path / "new"))
    assert list(again.samples(range(3)))[1].media == data.sample(1).media
    assert not check_dataset(str(folder / "shards")).problems


def test_beside_stored_frames_the_track_is_stored_as_a_sound(folder, tmp_path):
    outcome, data = packed(folder, tmp_path / "frames", image_size=32, video_frames=4)
    assert len(outcome.bad) == 4
    heard, both, _ = data.samples(range(3))
    assert heard.media["video"][0][0] == FRAMES_EXT
    assert [ext for ext, _ in heard.media["audio"]] == ["flac"]
    assert [ext for ext, _ in both.media["audio"]] == ["flac", "wav"]
    assert data.media_infos(0)[1].duration_s == pytest.approx(1.0, abs=0.1)
    wave = AudioTransform()(heard.media["audio"][0][1]).data
    assert pitch(wave[2_000:14_000]) == pytest.approx(500, abs=5)


def test_tracks_stand_behind_their_videos_wherever_these_stand():
    two = record("k", "first <video> then <video>", video_audio=True)
    turns = parse_record(two, {"video": 2, "audio": 2})
    assert turns[0].text == "first <video><audio> then <video><audio>"
    unplaced = parse_record(record("k", "what?", video_audio=True), {"video": 2, "audio": 2, "image": 1})
    assert unplaced[0].text == "<image>\n<video><audio>\n<video><audio>\nwhat?"
    with pytest.raises(SampleError, match="3 <audio> placeholders but 2 audio"):
        parse_record(record("k", "<video><audio><audio><audio>", video_audio=True), {"video": 1, "audio": 2})
