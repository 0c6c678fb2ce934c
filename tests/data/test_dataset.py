from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from llava_scale.data.dataset import open_dataset
from llava_scale.data.index import ShardIndex, heldout_mask, key_hash
from llava_scale.data.indexing import build_index
from llava_scale.data.manifest import DatasetInfo
from llava_scale.data.opening import index_name
from llava_scale.data.records import split_frames
from llava_scale.errors import SampleError, ShardError
from llava_scale.types import Turn


def jpeg(width: int = 8, height: int = 6, color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format="JPEG")
    return buffer.getvalue()


def record(question: str = "<image>\nWhat?", answer: str = "A square.", **extra: object) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"id": "x", "conversations": turns, **extra}).encode()


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(4 - shard):
            key = f"s{shard}n{number}"
            members[f"{key}.jpg"] = jpeg(10 + number, 20 + shard)
            members[f"{key}.json"] = record(answer=f"answer {key}", task="shape")
        write_tar(tmp_path / f"shard-{shard:05d}.tar", members)
    return tmp_path


def test_shards_without_index_load_with_their_pictures_sizes(folder):
    data = open_dataset(str(folder))
    assert len(data) == 4 + 3 + 2
    assert data.num_shards == 3
    assert [data.locate(i) for i in (0, 3, 4, 6, 7, 8)] == [(0, 0), (0, 3), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert data.shard_range(1) == range(4, 7)
    assert data.key(5) == "s1n1"
    assert data.key_hash(5) == key_hash("s1n1")
    (info,) = data.media_infos(5)
    assert (info.kind, info.width, info.height) == ("image", 11, 21)
    sample = data.sample(5)
    assert sample.turns == data.turns(5) == (Turn("user", "<image>\nWhat?"), Turn("assistant", "answer s1n1"))
    assert sample.media == {"image": (("jpg", jpeg(11, 21)),)}
    assert sample.extra == {"task": "shape"}
    assert sample.shard == "shard-00001.tar"


def test_shards_of_webdatasets_own_writer_load(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number in range(3):
            sink.write({"__key__": f"dir/k{number}", "jpg": jpeg(), "json": record(answer=str(number))})
    data = open_dataset(str(tmp_path))
    assert [data.key(i) for i in range(3)] == ["dir/k0", "dir/k1", "dir/k2"]
    assert data.sample(2).turns[1].text == "2"


def test_members_that_are_no_neighbours_still_make_one_sample(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.json": record(), "y.json": record("Why?"), "x.jpg": jpeg(), "README.txt": b"hi"})
    data = open_dataset(str(tmp_path))
    assert len(data) == 2
    assert data.sample(0).media["image"][0][1] == jpeg()
    assert data.sample(1).media == {}


def test_several_media_come_in_the_order_of_their_numbers(tmp_path):
    images = {f"x.{number}.jpg": jpeg(10 + number) for number in (10, 2, 0, 1)}
    write_tar(tmp_path / "a.tar", {**images, "x.json": record("<image>" * 4)})
    data = open_dataset(str(tmp_path))
    assert [info.width for info in data.media_infos(0)] == [10, 11, 12, 20]
    assert [content for _, content in data.sample(0).media["image"]] == [jpeg(10 + n) for n in (0, 1, 2, 10)]


def test_stored_frames_are_one_video_with_times(tmp_path):
    frames = {f"x.{video}.frame{frame:03d}.jpg": jpeg(16 + frame) for video in (0, 1) for frame in (0, 1, 2)}
    text = record("<video> and <video>", frame_times_s=[[0.0, 1.0, 2.5], [0.0, 0.5, 1.0]])
    write_tar(tmp_path / "a.tar", {**frames, "x.jpg": jpeg(), "x.json": text})
    data = open_dataset(str(tmp_path))
    infos = data.media_infos(0)
    assert [(info.kind, info.num_frames, info.duration_s) for info in infos[1:]] == [
        ("video", 3, 2.5),
        ("video", 3, 1.0),
    ]
    sample = data.sample(0)
    assert sample.turns[0].text == "<image>\n<video> and <video>"
    assert [ext for ext, _ in sample.media["video"]] == ["frames", "frames"]
    assert split_frames(sample.media["video"][1][1]) == tuple(("jpg", jpeg(16 + frame)) for frame in (0, 1, 2))
    assert data.info.modalities == {"image+video": 1}
    counts = data.index(0).media_counts()
    assert {kind: count.tolist() for kind, count in counts.items()} == {"image": [1], "video": [2], "audio": [0]}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_read(tmp_path, format):
    keys = ["k" * 150, "ключ/日本", "d" * 90 + "/" + "e" * 90]
    members = {f"{key}.json": record("Why?", answer=str(number)) for number, key in enumerate(keys)}
    write_tar(tmp_path / "a.tar", members, format)
    data = open_dataset(str(tmp_path))
    assert [data.key(i) for i in range(3)] == keys
    assert [data.turns(i)[1].text for i in range(3)] == ["0", "1", "2"]


def test_a_ustar_name_prefix_is_read(tmp_path):
    key = "d" * 90 + "/" + "e" * 60
    write_tar(tmp_path / "a.tar", {f"{key}.json": record("Why?")}, tarfile.USTAR_FORMAT)
    assert open_dataset(str(tmp_path)).key(0) == key


def test_a_hard_link_stands_for_its_file(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("x.jpg", jpeg()), ("x.json", record()), ("y.json", record())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("y.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "x.jpg"
        tar.addfile(link)
    assert open_dataset(str(tmp_path)).sample(1).media["image"][0][1] == jpeg()


def test_a_single_tar_opens(folder):
    data = open_dataset(str(folder / "shard-00001.tar"))
    assert len(data) == 3
    assert data.key(0) == "s1n0"


def test_pickled_datasets_read_the_same(folder):
    data = open_dataset(str(folder), name="toy")
    data.sample(3)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.name == "toy"
    assert copy.fingerprint() == data.fingerprint()
    assert [copy.sample(i) for i in range(len(copy))] == [data.sample(i) for i in range(len(data))]


def test_samples_come_in_the_order_asked_with_errors_in_place(folder):
    write_tar(folder / "shard-00003.tar", {"bad.json": b"{"})
    data = open_dataset(str(folder))
    found = list(data.samples([9, 0, 8, 0]))
    assert isinstance(found[0], SampleError)
    assert [item.key for item in found[1:]] == ["s0n0", "s2n1", "s0n0"]


def test_a_built_index_is_kept_in_the_cache(folder, monkeypatch):
    open_dataset(str(folder))
    monkeypatch.setattr("llava_scale.data.opening.build_index", lambda *_, **__: pytest.fail("built again"))
    assert len(open_dataset(str(folder))) == 9


def test_a_changed_bare_shard_is_indexed_again(folder):
    open_dataset(str(folder))
    write_tar(folder / "shard-00001.tar", {"new.json": record("Why?")})
    assert open_dataset(str(folder)).key(4) == "new"


def index_all(folder: Path) -> None:
    indexes = []
    for path in sorted(folder.glob("*.tar")):
        data = path.read_bytes()
        index = build_index(lambda offset, size, data=data: data[offset : offset + size], len(data), name=path.name)
        index.save(folder / index_name(path.name))
        indexes.append(index)
    DatasetInfo.of(indexes).save(folder)


def test_an_indexed_folder_reads_like_a_bare_one(folder):
    bare = [open_dataset(str(folder)).sample(i) for i in range(9)]
    index_all(folder)
    assert [open_dataset(str(folder)).sample(i) for i in range(9)] == bare
    assert open_dataset(str(folder / "dataset.json")).fingerprint() == open_dataset(str(folder)).fingerprint()


def test_an_index_of_another_tar_is_refused(folder):
    index_all(folder)
    write_tar(folder / "shard-00001.tar", {f"n{n}.json": record("Why?") for n in range(40)})
    data = open_dataset(str(folder))
    assert data.key(0) == "s0n0"
    with pytest.raises(ShardError, match=r"shard-00001.tar: the tar has .* bytes, dataset.json says .*data index"):
        data.key(4)
    (folder / "dataset.json").unlink()
    with pytest.raises(ShardError, match=r"shard-00001.tar: the tar has .* its index says"):
        open_dataset(str(folder))


def test_an_index_that_contradicts_the_manifest_is_refused(folder):
    index_all(folder)
    (folder / "shard-00001.index").write_bytes((folder / "shard-00002.index").read_bytes())
    with pytest.raises(ShardError, match=r"shard-00001"):
        open_dataset(str(folder)).key(4)


@pytest.mark.parametrize("keep", [0, 10, 23, 24, 100, 0.5, -1])
def test_a_torn_index_is_refused_with_what_to_do(folder, keep):
    index_all(folder)
    path = folder / "shard-00000.index"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ShardError, match="data index"):
        open_dataset(str(folder)).key(0)


def test_a_flipped_bit_in_an_index_is_found(folder):
    index_all(folder)
    path = folder / "shard-00000.index"
    whole = bytearray(path.read_bytes())
    for position in range(24, len(whole), 97):
        whole[position] ^= 4
        with pytest.raises(ShardError, match="damaged"):
            ShardIndex.from_bytes(bytes(whole), "x.index")
        whole[position] ^= 4
    ShardIndex.from_bytes(bytes(whole), "x.index")


def test_a_missing_shard_is_named(folder):
    index_all(folder)
    (folder / "shard-00002.tar").unlink()
    data = open_dataset(str(folder))
    with pytest.raises(ShardError, match=r"shard-00002.tar: No such file"):
        data.sample(8)


def test_a_shard_that_shrinks_while_open_is_an_error(folder):
    index_all(folder)
    data = open_dataset(str(folder))
    data.key(3)
    path = folder / "shard-00000.tar"
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ShardError, match=r"shard-00000.tar: ends .* bytes before"):
        data.sample(3)


def test_zero_byte_truncated_and_compressed_shards_are_named(folder):
    whole = (folder / "shard-00000.tar").read_bytes()
    path = folder / "shard-00009.tar"
    cases = [
        (b"", "is empty"),
        (whole[:700], "truncated"),
        (whole[: whole.rindex(b"ustar")], "truncated"),
        (whole.rstrip(b"\0"), "truncated"),
        (gzip.compress(whole), "compressed"),
        (b"not a tar at all" * 100, "no tar header"),
        (whole + whole, "glued"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ShardError, match=rf"shard-00009.tar: .*{message}"):
            open_dataset(str(folder))


def test_a_key_twice_in_a_shard_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("x.json")
            info.size = len(record("Why?"))
            tar.addfile(info, io.BytesIO(record("Why?")))
    with pytest.raises(ShardError, match=r"a.tar: .*'x'"):
        open_dataset(str(tmp_path))


def test_a_folder_without_shards_says_so(tmp_path):
    with pytest.raises(ShardError, match="data pack"):
        open_dataset(str(tmp_path))
    with pytest.raises(ShardError, match="no such folder"):
        open_dataset(str(tmp_path / "nowhere"))


def test_media_without_a_record_are_a_bad_sample(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": jpeg(), "y.json": record("Why?")})
    data = open_dataset(str(tmp_path))
    with pytest.raises(SampleError, match=r"a.tar: sample 'x': has no json"):
        data.sample(0)
    assert data.index(0).text_chars.tolist()[0] == -1


def test_a_corrupt_picture_still_indexes_and_reads(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.jpg": b"no jpeg", "x.json": record()})
    data = open_dataset(str(tmp_path))
    assert data.media_infos(0)[0].width == 0
    assert data.sample(0).media["image"][0][1] == b"no jpeg"


def test_held_out_parts_nest_and_have_their_share():
    hashes = np.array([key_hash(f"key {number}") for number in range(4000)], np.uint64)
    small, large = heldout_mask(hashes, 0.05), heldout_mask(hashes, 0.2)
    assert abs(small.mean() - 0.05) < 0.015
    assert abs(large.mean() - 0.2) < 0.025
    assert not (small & ~large).any()
    assert heldout_mask(hashes, 1.0).all()
    assert not heldout_mask(hashes, 0.0).any()


def test_key_hashes_never_change():
    assert key_hash("a/b.c") == 0x87E5EF5E767FD685


def test_a_hundred_million_samples_open_in_a_second_and_little_memory(tmp_path):
    count = 100_000
    DatasetInfo(
        names=tuple(f"shard-{number:05d}.tar" for number in range(count)),
        num_samples=(1000,) * count,
        num_bytes=(64_000_000,) * count,
        sha256=tuple(f"{number:064x}" for number in range(count)),
    ).save(tmp_path)
    code = (
        "import re, sys, time; from llava_scale.data.dataset import open_dataset\n"
        "start = time.process_time(); data = open_dataset(sys.argv[1]); data.fingerprint()\n"
        "assert data.locate(99_999_999) == (99_999, 999)\n"
        "seconds = time.process_time() - start; status = open('/proc/self/status').read()\n"
        "print(seconds, int(re.search(r'VmHWM:\\s+(\\d+)', status).group(1)) / 1e3)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1.0
    assert megabytes < 250
