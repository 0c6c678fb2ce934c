"""Records that use some seconds of their videos and sounds: from the record to what is decoded."""

from __future__ import annotations

import json

import pytest

from llava_scale.data.audio import AudioTransform
from llava_scale.data.check import check_dataset
from llava_scale.data.dataset import open_dataset
from llava_scale.data.decoding import decode_others
from llava_scale.data.indexing import build_index
from llava_scale.data.media import ImageTransform, probe
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.records import FRAMES_EXT, clips_of, encoded_media, parse_record
from llava_scale.data.sampling import FrameSampling
from llava_scale.data.video import VideoTransform
from llava_scale.data.write import pack
from llava_scale.errors import SampleError
from tests.data.media_files import numbered_video, pitch, read_number, tone_file

SIZE = 160
VIDEO = numbered_video(times_ms=tuple(range(0, 9000, 100)), sound="aac")
SOUND = tone_file("flac", "flac", seconds=5.0)


class Heard:
    """Stands for the model's way to features: the samples themselves."""

    def __call__(self, data, *, planned):
        start_s, end_s = planned.clip or (0.0, None)
        number = round(planned.duration_s * 16_000)
        return AudioTransform()(data, num_samples=number, start_s=start_s, end_s=end_s).data


def record(key, question="<video><audio>\nwhat?", **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a tone"}]
    return {"id": key, "conversations": turns, **media}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    (root / "a.mp4").write_bytes(VIDEO)
    (root / "b.flac").write_bytes(SOUND)
    both = {"video": "a.mp4", "audio": "b.flac"}
    records = [
        record("cut", **both, video_clips=[[6.0, 8.0]], audio_clips=[2.25, 2.75]),
        record("open", **both, video_clips=[7.0, None], audio_clips=[None]),
        record("heard", **{**both, "audio": []}, video_audio=True, video_clips=[3.15, 3.95]),
        record("whole", **both),
        record("late", **both, audio_clips=[5.5, 6.0]),
        record("none", **both, video_clips=[12.0, 13.0]),
        record("many", **both, video_clips=[[0, 1], [1, 2]]),
        record("turned", **both, video_clips=[3.0, 1.0]),
        record("words", **both, audio_clips="all"),
    ]
    (root / "in.json").write_text(json.dumps(records))
    return root


def packed(folder, out, **options):
    result = pack(folder / "in.json", out, media_root=folder, shard_size=20, workers=1, options=MediaOptions(**options))
    return {bad.id: bad.reason for bad in result.bad}, open_dataset(str(out))


@pytest.fixture(scope="module")
def shards(folder):
    return packed(folder, folder / "shards")


def decoded(data, number, num_frames=4):
    video = VideoTransform(image=ImageTransform(size=SIZE), sampling=FrameSampling(num_frames=num_frames))
    media = decode_others(data.sample(number), data.media_infos(number), {"video": video, "audio": Heard()})
    return [[read_number(frame, SIZE) for frame in frames] for frames in media.frames], media.sounds


def test_a_clip_is_indexed_with_its_own_length_and_decoded_alone(shards):
    _, data = shards
    video, sound = data.media_infos(0)
    assert (video.num_frames, video.duration_s) == (20, 2.0)
    assert sound.duration_s == 0.5
    frames, (wave,) = decoded(data, 0)
    assert frames == [[62, 67, 72, 77]]
    assert len(wave) == 8_000
    assert pitch(wave) == pytest.approx(700, abs=5)  # the third second


def test_an_open_clip_ends_with_the_file_and_null_takes_all_of_it(shards):
    _, data = shards
    video, sound = data.media_infos(1)
    assert (video.num_frames, sound.duration_s) == (20, 5.0)
    frames, (wave,) = decoded(data, 1)
    assert frames == [[72, 77, 82, 87]]
    assert len(wave) == 80_000


def test_the_sound_track_is_cut_like_its_video(shards):
    _, data = shards
    video, sound = data.media_infos(2)
    assert video.duration_s == sound.duration_s == pytest.approx(0.8)
    frames, (wave,) = decoded(data, 2, num_frames=2)
    assert frames == [[33, 37]]
    assert len(wave) == 12_800
    assert pitch(wave) == pytest.approx(800, abs=5)


def test_records_whose_clips_cannot_be_used_say_why(shards):
    bad, data = shards
    assert [data.key(number) for number in range(len(data))] == ["cut", "open", "heard", "whole"]
    assert "begins at 5.5 s, but the sound lasts 5.00 s" in bad["late"]
    assert "no frame between 12 s" in bad["none"]
    assert "for each of its 1 media" in bad["many"]
    assert "[3.0, 1.0], which is no [start, end]" in bad["turned"]
    assert "for each of its 1 media" in bad["words"]


def test_a_new_index_says_the_same_and_the_check_is_content(folder, shards):
    _, data = shards
    content = (folder / "shards" / data.shard_name(0)).read_bytes()
    index = build_index(lambda offset, size: content[offset : offset + size], len(content), name=data.shard_name(0))
    assert [index.entry(number) for number in range(4)] == [data.index(0).entry(number) for number in range(4)]
    assert not check_dataset(str(folder / "shards")).problems


def test_media_stored_ahead_are_those_of_the_clip_and_the_record_no_longer_cuts(folder, tmp_path):
    _, data = packed(folder, tmp_path / "stored", image_size=SIZE, video_frames=4, audio_rate=16_000)
    cut, _, heard, _ = data.samples(range(4))
    assert not {"video_clips", "audio_clips"} & set(cut.extra)
    assert cut.extra["frame_times_s"] == [[0.2, 0.7, 1.2, 1.7]]
    assert cut.media["video"][0][0] == FRAMES_EXT
    assert decoded(data, 0)[0] == [[62, 67, 72, 77]]
    assert [len(wave) for wave in (*decoded(data, 0)[1], *decoded(data, 2)[1])] == [8_000, 12_800]
    assert heard.media["audio"][0][0] == "flac"


def test_only_what_is_stored_ahead_loses_its_clip(folder, tmp_path):
    _, data = packed(folder, tmp_path / "frames", image_size=SIZE, video_frames=2)
    sample = data.sample(0)
    assert "video_clips" not in sample.extra
    assert [medium.clip for medium in encoded_media(sample)["audio"]] == [(2.25, 2.75)]
    assert len(decoded(data, 0, num_frames=2)[1][0]) == 8_000


def test_schemes_that_go_by_index_count_the_frames_of_the_clip(shards):
    _, data = shards
    how = VideoTransform(image=ImageTransform(size=SIZE), sampling=FrameSampling(scheme="fps", fps=2.0))
    info = probe("mp4", VIDEO, (6.0, 8.0))
    frames = how(VIDEO, planned=info)
    assert len(frames.data) == how.num_frames(info) == 4
    assert [read_number(frame, SIZE) for frame in frames.data] == [62, 67, 72, 77]
    assert data.media_infos(0)[0].duration_s == info.duration_s


def test_tracks_come_first_among_the_clips_of_sounds():
    fields = {"video_audio": True, "video_clips": [[1, 2], None], "audio_clips": [3, 4.5]}
    clips = clips_of(fields, {"video": 2, "audio": 3})
    assert clips == {"video": ((1.0, 2.0), None), "audio": ((1.0, 2.0), None, (3.0, 4.5))}
    assert clips_of({}, {"video": 2}) == {}


@pytest.mark.parametrize("clip", [[1], [1, 2, 3], [-1, 2], [2, 2], [True, 2], [1, float("nan")], ["1", "2"], {}])
def test_what_is_no_clip_is_refused_wherever_records_are_read(clip):
    with pytest.raises(SampleError, match="audio_clips"):
        parse_record(record("k", "<audio>", audio_clips=[clip]), {"audio": 1})
