from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from llava_scale.data.check import check_dataset
from llava_scale.data.dataset import open_dataset
from llava_scale.data.foreign import index_folder
from llava_scale.data.index import heldout_mask
from llava_scale.data.repack import find_duplicates, merge, reshard, split
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, ShardError

NUM_SAMPLES = 40


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (number * 5, 90, 60)).save(buffer, format="JPEG")
    return buffer.getvalue()


def make(folder: Path, prefix: str = "k", count: int = NUM_SAMPLES) -> Path:
    media = folder.parent / f"media-{folder.name}"
    media.mkdir()
    records = []
    for number in range(count):
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"{prefix}{number}"}]
        record = {"id": f"{prefix}.{number}", "conversations": turns}
        if number % 3:
            names = [f"{number}-{copy}.jpg" for copy in range(number % 3)]
            for copy, name in enumerate(names):
                (media / name).write_bytes(picture(number + copy))
            record["image"] = names
        records.append(record)
    source = media / "data.json"
    source.write_text(json.dumps(records))
    pack(source, folder, media_root=media, shard_size=9)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "data")


def contents(path: Path) -> dict[str, object]:
    data = open_dataset(str(path))
    found = {}
    for number in range(len(data)):
        sample = data.sample(number)
        found[sample.key] = (sample.turns, sample.media, sample.extra, data.media_infos(number))
    assert len(found) == len(data)
    return found


def test_a_split_deals_every_sample_by_the_hash_of_its_key(folder, tmp_path):
    split(str(folder), tmp_path / "a", tmp_path / "b", share=0.25, shard_size=5, on_progress=quiet)
    train, heldout, whole = contents(tmp_path / "a"), contents(tmp_path / "b"), contents(folder)
    assert 0 < len(heldout) < len(train)
    assert train | heldout == whole
    assert len(train) + len(heldout) == NUM_SAMPLES
    index = open_dataset(str(tmp_path / "b")).index(0)
    assert heldout_mask(index.key_hashes, 0.25).all()


def test_a_split_with_an_empty_part_leaves_nothing_behind(folder, tmp_path):
    with pytest.raises(ShardError, match=r"b: none of the 40 samples"):
        split(str(folder), tmp_path / "a", tmp_path / "b", share=1e-9, shard_size=5, on_progress=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "media-data"]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(str(folder), tmp_path / "a", tmp_path / "b", share=1.0, shard_size=5, on_progress=quiet)


@pytest.mark.parametrize(("options", "sizes"), [({"shard_size": 16}, [16, 16, 8]), ({"num_shards": 3}, [14, 13, 13])])
def test_resharding_keeps_order_and_bytes(folder, tmp_path, options, sizes):
    info = reshard(str(folder), tmp_path / "out", **options, on_progress=quiet)
    assert list(info.num_samples) == sizes
    old, new = open_dataset(str(folder)), open_dataset(str(tmp_path / "out"))
    assert [old.key(number) for number in range(40)] == [new.key(number) for number in range(40)]
    assert contents(folder) == contents(tmp_path / "out")


def test_resharding_needs_one_wish_that_can_be_met(folder, tmp_path):
    for options in ({}, {"shard_size": 3, "num_shards": 3}, {"num_shards": 41}):
        with pytest.raises(ConfigError):
            reshard(str(folder), tmp_path / "out", **options, on_progress=quiet)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ShardError, match="not empty"):
        reshard(str(folder), tmp_path / "out", shard_size=5, on_progress=quiet)


@pytest.mark.parametrize("link", [False, True])
def test_merging_puts_all_shards_into_one_folder(folder, tmp_path, link):
    other = make(tmp_path / "other", prefix="o", count=10)
    info = merge([str(folder), str(other)], tmp_path / "out", link=link, on_progress=quiet)
    assert list(info.names) == [f"shard-{number:05d}.tar" for number in range(7)]
    assert contents(tmp_path / "out") == contents(folder) | contents(other)
    same = (tmp_path / "out" / "shard-00005.tar").stat().st_ino == (other / "shard-00000.tar").stat().st_ino
    assert same is link


def test_merging_refuses_duplicate_keys_unless_told(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with pytest.raises(ShardError, match=r"40 keys appear more than once \('k.0' in "):
        merge([str(folder), str(copy)], tmp_path / "out", on_progress=quiet)
    merge([str(folder), str(copy)], tmp_path / "out", allow_duplicates=True, on_progress=quiet)
    assert len(find_duplicates([open_dataset(str(tmp_path / "out"))])) == 40
    with pytest.raises(ShardError, match=r"key 'k.\d+' would be in it twice"):
        reshard(str(tmp_path / "out"), tmp_path / "again", num_shards=1, on_progress=quiet)


def test_merging_refuses_a_damaged_shard(folder, tmp_path):
    path = folder / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-00001.tar: its SHA-256 is not"):
        merge([str(folder)], tmp_path / "out", on_progress=quiet)
    assert not (tmp_path / "out").exists()


def test_merging_refuses_media_prepared_in_different_ways(folder, tmp_path):
    other = make(tmp_path / "other", prefix="o", count=5)
    manifest = json.loads((other / "dataset.json").read_bytes())
    (other / "dataset.json").write_text(json.dumps({**manifest, "prepared": {"image_size": 336}}))
    with pytest.raises(ConfigError, match="prepared in different ways"):
        merge([str(folder), str(other)], tmp_path / "out", on_progress=quiet)


def test_foreign_files_with_odd_numbers_are_resharded_without_clashes(tmp_path):
    shards = tmp_path / "foreign"
    shards.mkdir()
    turns = [{"from": "human", "value": "<image><image><image>"}, {"from": "gpt", "value": "x"}]
    members = {
        "a.json": json.dumps({"conversations": turns}).encode(),
        "a.jpg": picture(1),
        "a.0.jpg": picture(2),
        "a.7.jpg": picture(3),
        "a.txt": b"left out",
    }
    with tarfile.open(shards / "x.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(str(shards))
    reshard(str(shards), tmp_path / "out", shard_size=5, on_progress=quiet)
    sample = open_dataset(str(tmp_path / "out")).sample(0)
    assert [content for _, content in sample.media["image"]] == [picture(1), picture(2), picture(3)]


def test_indexing_a_folder_again_makes_only_what_is_missing(folder):
    before = (folder / "dataset.json").read_bytes()
    assert index_folder(str(folder)).num_built == 0
    (folder / "shard-00002.index").unlink()
    (folder / "dataset.json").unlink()
    result = index_folder(str(folder))
    assert (result.num_built, sum(result.info.num_samples)) == (1, NUM_SAMPLES)
    assert (folder / "dataset.json").read_bytes() == before
    assert index_folder(str(folder), rebuild=True).num_built == 5


def test_indexing_names_every_damaged_shard(folder):
    for number in (1, 3):
        (folder / f"shard-{number:05d}.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"(?s)2 of 5 shards.*shard-00001.tar.*shard-00003.tar"):
        index_folder(str(folder))
    with pytest.raises(ShardError, match=r"no \*\.tar shards here"):
        index_folder(str(folder.parent))
    with pytest.raises(ShardError, match="upload"):
        index_folder("s3://bucket/data")


def test_a_sound_data_set_checks_well_and_is_described(folder):
    result = check_dataset(str(folder))
    assert result.problems == []
    assert (result.num_samples, result.num_checked, result.num_turns) == (40, 40, 80)
    assert result.modalities == {"image": 26, "text": 14}
    stats = result.kinds["image"]
    assert stats.count == 39
    assert (stats.low[0], stats.high[0], stats.low[1]) == (21, 59, 16)


def test_a_check_of_some_samples_reads_only_those(folder):
    result = check_dataset(str(folder), share=0.3)
    assert 2 <= result.num_checked <= 25


def test_a_check_finds_everything_that_is_wrong(folder):
    data = open_dataset(str(folder))
    place = {data.key(number): data.index(data.locate(number)[0]).entry(data.locate(number)[1]) for number in range(40)}
    damage(folder / "shard-00000.tar", place["k.1"].media[0].offset + 200, b"\xff" * 300)
    damage(folder / "shard-00001.tar", place["k.12"].json_offset, b"{{{{")
    (folder / "shard-00003.tar").unlink()
    (folder / "shard-00004.tar").write_bytes((folder / "shard-00004.tar").read_bytes()[:600])
    result = check_dataset(str(folder))
    found = {(problem.shard, problem.key, problem.reason.split(" ")[0]) for problem in result.problems}
    assert ("shard-00000.tar", "", "SHA-256") in found
    assert ("shard-00000.tar", "k.1", "medium") in found
    assert ("shard-00001.tar", "k.12", "its") in found
    assert {shard for shard, key, _ in found if not key} == {f"shard-0000{number}.tar" for number in (0, 1, 3, 4)}
    assert not [problem for problem in result.problems if problem.shard == "shard-00002.tar"]


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_check_finds_keys_in_two_shards(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    merge([str(folder), str(copy)], tmp_path / "out", allow_duplicates=True, on_progress=quiet)
    result = check_dataset(str(tmp_path / "out"))
    assert len(result.problems) == NUM_SAMPLES
    assert result.problems[0].reason == "the key is also in shard-00000.tar; keys must be unique"
