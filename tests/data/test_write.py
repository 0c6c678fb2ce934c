from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import webdataset
from PIL import Image

from llava_scale.data.dataset import open_dataset
from llava_scale.data.index import ShardIndex
from llava_scale.data.indexing import build_index
from llava_scale.data.media import ImageTransform
from llava_scale.data.prepare import MediaOptions
from llava_scale.data.write import pack
from llava_scale.errors import ConfigError, ShardError


def picture(number: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, 60)).save(buffer, format="JPEG")
    return buffer.getvalue()


def talk(question: str = "<image>\nWhat?", answer: str = "A square.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def texts(count: int) -> list[dict[str, object]]:
    return [{"id": f"t{number}", "conversations": talk("Why?", "x" * (number % 700 + 1))} for number in range(count)]


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "sub" / "p.PNG").write_bytes(picture(9))
    return folder


def write_json(folder: Path, records: object) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def mixed_records() -> list[dict[str, object]]:
    return [
        {"id": "one", "image": "0.jpg", "conversations": talk(), "task": "shape"},
        {"id": "two", "image": ["1.jpg", "sub/p.PNG"], "conversations": talk("<image> or <image>?")},
        {"id": "none", "conversations": talk("Why?")},
        {"id": "caption", "image": "2.jpg", "conversations": talk("Describe.")},
    ]


def test_a_packed_folder_gives_back_what_went_in(media, tmp_path):
    result = pack(write_json(tmp_path, mixed_records()), tmp_path / "out", media_root=media, shard_size=3)
    assert (result.num_samples, result.num_shards, result.bad) == (4, 2, ())
    data = open_dataset(str(tmp_path / "out"))
    assert [data.key(number) for number in range(4)] == ["one", "two", "none", "caption"]
    assert data.sample(0).media["image"] == (("jpg", picture(0)),)
    assert data.sample(0).extra["task"] == "shape"
    assert [ext for ext, _ in data.sample(1).media["image"]] == ["jpg", "png"]
    assert data.sample(2).media == {}
    assert data.turns(3)[0].text == "<image>\nDescribe."
    assert data.info.modalities == {"image": 3, "text": 1}
    assert [(info.width, info.height) for info in data.media_infos(1)] == [(24, 16), (24, 16)]
    assert (tmp_path / "out" / "pack-report.jsonl").read_bytes() == b""


def test_plain_webdataset_reads_our_shards_with_equal_bytes(media, tmp_path):
    records = [*mixed_records(), {"id": "v1.2/é x", "image": "3.jpg", "conversations": talk()}]
    pack(write_json(tmp_path, records), tmp_path / "out", media_root=media)
    shards = [str(path) for path in (tmp_path / "out").glob("*.tar")]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [item["__key__"] for item in found] == ["one", "two", "none", "caption", "v1%2E2/é x"]
    assert [sorted(name for name in item if name[0] != "_") for item in found] == [
        ["jpg", "json"],
        ["0.jpg", "1.png", "json"],
        ["json"],
        ["jpg", "json"],
        ["jpg", "json"],
    ]
    assert found[0]["jpg"] == picture(0)
    assert found[1]["1.png"] == picture(9)
    assert json.loads(found[4]["json"])["id"] == "v1.2/é x"


def test_the_written_index_equals_the_one_built_from_the_tar(media, tmp_path):
    pack(write_json(tmp_path, mixed_records()), tmp_path / "out", media_root=media)
    tar = (tmp_path / "out" / "shard-00000.tar").read_bytes()
    written = ShardIndex.from_bytes((tmp_path / "out" / "shard-00000.index").read_bytes(), "x")
    built = build_index(lambda offset, size: tar[offset : offset + size], len(tar), name="shard-00000.tar")
    assert built.to_bytes() == written.to_bytes()


def test_jsonl_and_numeric_ids_are_read(media, tmp_path):
    source = tmp_path / "data.jsonl"
    lines = [json.dumps({"id": number, "conversations": talk("Why?")}) for number in range(3)]
    source.write_text("\n".join([*lines[:2], "", "{broken", lines[2]]) + "\n")
    result = pack(source, tmp_path / "out", media_root=media)
    assert [(bad.record, bad.id) for bad in result.bad] == [(4, "")]
    assert "is not JSON" in result.bad[0].reason
    assert open_dataset(str(tmp_path / "out")).key(2) == "2"


def cases(media: Path) -> list[tuple[dict[str, object] | list[object] | str, str]]:
    (media / "empty.jpg").write_bytes(b"")
    (media / "noise.jpg").write_bytes(b"no picture" * 50)
    (media / "cut.jpg").write_bytes(picture(1, (400, 300))[:-900])
    (media.parent / "secret.jpg").write_bytes(picture())
    good = {"id": "x", "image": "0.jpg", "conversations": talk()}
    answer = {"from": "gpt", "value": "A."}
    return [
        ({**good, "image": "missing.jpg"}, r"image 'missing.jpg' in .*media: No such file"),
        ({**good, "image": "empty.jpg"}, r"image 'empty.jpg' is empty"),
        ({**good, "image": "noise.jpg"}, r"image 'noise.jpg': "),
        ({**good, "image": "cut.jpg"}, r"image 'cut.jpg': "),
        ({**good, "image": "../secret.jpg"}, r"image '../secret.jpg' lies outside of the media root"),
        ({**good, "image": "/etc/x.jpg"}, r"image '/etc/x.jpg' lies outside of the media root"),
        ({**good, "image": "0.txt"}, r"unknown extension 'txt'; known: jpg"),
        ({**good, "image": 3}, r"must be a path or a list of paths, found 3"),
        ({**good, "video": "0.jpg"}, r"video '0.jpg': unknown extension 'jpg'; known: mp4"),
        ({**good, "image": ["0.jpg", "1.jpg"], "conversations": talk("<image>" * 3)}, r"3 <image> placeholders but 2"),
        ({**good, "conversations": talk("<image><image>")}, r"has 2 <image> placeholders but 1 image; add the missing"),
        ({"id": "x", "conversations": talk()}, r"has 1 <image> placeholder but 0 images"),
        ({**good, "conversations": talk("<image>", "<image>")}, r"in a turn of the assistant"),
        ({**good, "conversations": [answer, *talk()]}, r"must start with a human turn"),
        ({**good, "conversations": talk(answer=" \n")}, r"answer 1 is empty"),
        ({**good, "conversations": [*talk(), *talk("Again?")[:1]]}, r"last human turn has no answer"),
        ({**good, "conversations": [*talk(), answer]}, r"must take turns"),
        ({**good, "conversations": []}, r"has no conversation"),
        ({**good, "conversations": [{"from": "human"}]}, r"message 1 is no"),
        ({**good, "conversations": [{"from": "bard", "value": "x"}]}, r"message 1 is from 'bard'; known"),
        ({**good, "conversations": talk(answer="\ud800")}, r"surrogate"),
        ({"image": "0.jpg", "conversations": talk()}, r"has no id"),
        ([1, 2], r"is a JSON list, not an object"),
        ("text", r"is a JSON str, not an object"),
    ]


def test_every_bad_record_is_reported_with_its_reason_and_the_good_ones_are_packed(media, tmp_path):
    table = cases(media)
    records = []
    for number, (record, _) in enumerate(table):
        if isinstance(record, dict) and "id" in record:
            record = {**record, "id": f"bad{number}"}
        records += [record, {"id": f"good{number}", "image": "0.jpg", "conversations": talk()}]
    result = pack(write_json(tmp_path, records), tmp_path / "out", media_root=media, shard_size=7)
    assert result.num_samples == len(table)
    report = [json.loads(line) for line in result.report.read_text().splitlines()]
    assert [item["record"] for item in report] == [2 * number + 1 for number in range(len(table))]
    for item, (_, reason) in zip(report, table, strict=True):
        with pytest.raises(ShardError, match=reason):
            raise ShardError(item["reason"])
    data = open_dataset(str(tmp_path / "out"))
    assert [data.key(number) for number in range(len(data))] == [f"good{number}" for number in range(len(table))]


def test_duplicate_ids_name_the_first_record(media, tmp_path):
    records = [*texts(3), {**texts(1)[0]}, {"id": "t2", "conversations": talk("Else?")}]
    result = pack(write_json(tmp_path, records), tmp_path / "out", media_root=media)
    assert [(bad.record, bad.id, bad.reason) for bad in result.bad] == [
        (4, "t0", "its id is that of record 1; ids must be unique"),
        (5, "t2", "its id is that of record 3; ids must be unique"),
    ]


@pytest.mark.parametrize(
    "key",
    [
        "a.b.c",
        "dir/x",
        "../up",
        "/root",
        "a//b",
        "end/",
        ".",
        "..",
        "日本/ключ.1",
        "%2E",
        "a b\n",
        "__x__/y",
        "\\",
        "k" * 300,
    ],
)
def test_any_id_comes_back_with_and_without_the_index(media, tmp_path, key):
    records = [{"id": key, "image": "0.jpg", "conversations": talk()}, {"id": "other", "conversations": talk("Why?")}]
    pack(write_json(tmp_path, records), tmp_path / "out", media_root=media)
    assert open_dataset(str(tmp_path / "out")).key(0) == key
    for path in [*(tmp_path / "out").glob("*.index"), tmp_path / "out" / "dataset.json"]:
        path.unlink()
    data = open_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert [data.key(0), data.key(1)] == [key, "other"]
    found = list(webdataset.WebDataset([str(tmp_path / "out" / "shard-00000.tar")], shardshuffle=False))
    assert len(found) == 2
    assert found[0]["jpg"] == picture(0)


@pytest.mark.parametrize("size", [(200, 100), (90, 160), (70, 70), (300, 7)])
def test_prepared_pictures_are_read_as_the_originals_but_for_compression(media, tmp_path, size):
    """Stored without the padding; readers pad again, into memory of their own or into a row's."""
    (media / "x.png").write_bytes(picture(1, size))
    records = [{"id": "x", "image": "x.png", "conversations": talk()}]
    options = MediaOptions(image_size=32, image_background=(0, 255, 0))
    pack(write_json(tmp_path, records), tmp_path / "out", media_root=media, options=options)
    data = open_dataset(str(tmp_path / "out"))
    ((ext, stored),) = data.sample(0).media["image"]
    image = Image.open(io.BytesIO(stored))
    (info,) = data.media_infos(0)
    assert (ext, image.format, max(image.size)) == ("jpg", "JPEG", 32)
    assert image.size == (info.width, info.height)
    assert abs(image.width / image.height - size[0] / size[1]) < 0.2 * size[0] / size[1] or min(image.size) <= 4
    transform = ImageTransform(32, "pad", (0, 255, 0))
    original, again = transform((media / "x.png").read_bytes()), transform(stored)
    into = torch.empty((32, 32, 3), dtype=torch.uint8).permute(2, 0, 1)
    transform(stored, into)
    assert torch.equal(into, again)
    assert (original.int() - again.int()).abs().float().mean() < 12
    assert data.info.prepared["image_size"] == 32


def test_prepared_pictures_stretch_where_the_model_stretches(media, tmp_path):
    (media / "x.png").write_bytes(picture(1, (200, 100)))
    records = [{"id": "x", "image": "x.png", "conversations": talk()}]
    options = MediaOptions(image_size=32, image_aspect="resize")
    pack(write_json(tmp_path, records), tmp_path / "out", media_root=media, options=options)
    ((_, stored),) = open_dataset(str(tmp_path / "out")).sample(0).media["image"]
    assert Image.open(io.BytesIO(stored)).size == (32, 32)


def test_a_picture_of_the_padding_s_colour_alone_is_kept(media, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (200, 100), (127, 127, 127)).save(file, "PNG")
    (media / "x.png").write_bytes(file.getvalue())
    records = [{"id": "x", "image": "x.png", "conversations": talk()}]
    pack(write_json(tmp_path, records), tmp_path / "out", media_root=media, options=MediaOptions(image_size=32))
    ((_, stored),) = open_dataset(str(tmp_path / "out")).sample(0).media["image"]
    assert Image.open(io.BytesIO(stored)).size == (32, 16)


def test_faithful_copies_say_nothing_of_preparation(media, tmp_path):
    pack(write_json(tmp_path, mixed_records()), tmp_path / "out", media_root=media)
    assert open_dataset(str(tmp_path / "out")).info.prepared == {}


def test_a_trusted_header_leaves_a_cut_picture_in(media, tmp_path):
    cases(media)
    records = [{"id": "x", "image": "cut.jpg", "conversations": talk()}]
    result = pack(
        write_json(tmp_path, records), tmp_path / "out", media_root=media, options=MediaOptions(verify="header")
    )
    assert result.num_samples == 1


def test_the_number_of_workers_changes_no_byte(media, tmp_path):
    source = write_json(tmp_path, texts(90))
    pack(source, tmp_path / "one", media_root=media, shard_size=7, workers=1)
    pack(source, tmp_path / "two", media_root=media, shard_size=7, workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_running_again_writes_nothing_and_mended_media_only_their_shard(media, tmp_path):
    records = [{"id": str(number), "image": f"{number}.jpg", "conversations": talk()} for number in range(9)]
    source, out = write_json(tmp_path, records), tmp_path / "out"
    first = pack(source, out, media_root=media, shard_size=3)
    assert [bad.id for bad in first.bad] == ["8"]
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (media / "8.jpg").write_bytes(picture(8))
    second = pack(source, out, media_root=media, shard_size=3)
    assert (second.num_samples, second.num_kept, second.bad) == (9, 2, ())
    changed = [name for name, was in times.items() if (out / name).stat().st_mtime_ns != was]
    assert changed == ["shard-00002.tar"]
    third = pack(source, out, media_root=media, shard_size=3)
    assert third.num_kept == 3
    assert len(open_dataset(str(out))) == 9


def test_other_input_or_options_need_overwrite(media, tmp_path):
    source, out = write_json(tmp_path, texts(20)), tmp_path / "out"
    pack(source, out, media_root=media, shard_size=5)
    with pytest.raises(ShardError, match=r"packed from other options \(shard_size was 5\); .*--overwrite"):
        pack(source, out, media_root=media, shard_size=6)
    write_json(tmp_path, texts(12))
    with pytest.raises(ShardError, match="packed from other input"):
        pack(source, out, media_root=media, shard_size=5)
    pack(source, out, media_root=media, shard_size=5, overwrite=True)
    assert len(open_dataset(str(out))) == 12
    assert len(list(out.glob("*.tar"))) == 3


def test_shards_of_another_tool_are_not_touched(media, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.tar").write_bytes(b"precious")
    with pytest.raises(ShardError, match="did not write"):
        pack(write_json(tmp_path, texts(2)), out, media_root=media)
    assert (out / "shard-00000.tar").read_bytes() == b"precious"


def test_input_that_is_no_json_or_has_nothing_good_says_so(media, tmp_path):
    source = tmp_path / "x.json"
    with pytest.raises(ShardError, match="No such file"):
        pack(source, tmp_path / "out", media_root=media)
    source.write_text("[1, 2")
    with pytest.raises(ShardError, match="is no JSON list"):
        pack(source, tmp_path / "out", media_root=media)
    source.write_text('[{"id": "a"}]')
    with pytest.raises(ShardError, match=r"nothing to pack, 1 records are bad \(the first: record 1: has no conv"):
        pack(source, tmp_path / "out", media_root=media)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_senseless_options_are_refused(media, tmp_path):
    with pytest.raises(ConfigError, match="image quality"):
        MediaOptions(image_quality=0)
    with pytest.raises(ConfigError, match="shard size"):
        pack(write_json(tmp_path, texts(1)), tmp_path / "out", media_root=media, shard_size=0)
    with pytest.raises(ConfigError, match="unknown engine 'rya'; did you mean 'ray'"):
        pack(write_json(tmp_path, texts(1)), tmp_path / "out", media_root=media, engine="rya")


def start_pack(source: Path, out: Path, media: Path, workers: int) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from pathlib import Path; from llava_scale.data.write import pack\n"
        "if __name__ == '__main__':\n"
        "    source, out, media, workers = sys.argv[1:]\n"
        "    pack(Path(source), Path(out), media_root=Path(media), shard_size=4, workers=int(workers))\n"
    )
    script = out.parent / "packing.py"
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script), str(source), str(out), str(media), str(workers)])


def kill_while_packing(source: Path, out: Path, media: Path, chooser: random.Random, workers: int) -> bool:
    """Kill a run at a random moment after its first shard; return whether it was cut off."""
    process = start_pack(source, out, media, workers)
    while not list(out.glob("*.tar")) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(chooser.random() * 0.15)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not (out / "dataset.json").exists()


def check_whole(out: Path) -> int:
    """Check that every tar that looks whole is; return how many there are."""
    for path in out.glob("*.tar"):
        data = path.read_bytes()
        build_index(lambda offset, size, data=data: data[offset : offset + size], len(data), name=path.name)
    for path in out.glob("*.index"):
        index = ShardIndex.from_bytes(path.read_bytes(), path.name)
        assert path.with_suffix(".tar").stat().st_size == index.tar_bytes
    return len(list(out.glob("*.tar")))


def kill_rounds(tmp_path: Path, media: Path, rounds: int, seed: int) -> int:
    source = write_json(tmp_path, texts(200))
    pack(source, tmp_path / "whole", media_root=media, shard_size=4)
    expected = content(tmp_path / "whole")
    chooser = random.Random(seed)
    num_cut = 0
    for number in range(rounds):
        out = tmp_path / f"out{number}"
        num_cut += kill_while_packing(source, out, media, chooser, workers=1 + number % 2)
        assert check_whole(out) > 0
        pack(source, out, media_root=media, shard_size=4)
        assert content(out) == expected
        for path in out.iterdir():
            if path.is_file():
                path.unlink()
    return num_cut


def test_a_killed_run_leaves_only_whole_shards_and_continues_to_the_same_bytes(tmp_path, media):
    assert kill_rounds(tmp_path, media, rounds=3, seed=1) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_killed_runs_continue_to_the_same_bytes(tmp_path, media):
    assert kill_rounds(tmp_path, media, rounds=100, seed=2) > 20


def test_two_runs_do_not_write_the_same_folder_at_once(tmp_path, media, monkeypatch):
    from llava_scale.data.files import locked

    monkeypatch.setattr("llava_scale.data.write._LOCK_WAIT_S", 0.0)
    with locked(tmp_path / "out" / ".pack" / "lock"), pytest.raises(ShardError, match="another process is packing"):
        pack(write_json(tmp_path, texts(2)), tmp_path / "out", media_root=media)


def test_a_run_waits_for_the_workers_of_a_killed_one(tmp_path, media, monkeypatch):
    from llava_scale.data.files import locked

    monkeypatch.setattr("llava_scale.data.write._WORKERS_WAIT_S", 0.0)
    source, out = write_json(tmp_path, texts(2)), tmp_path / "out"
    with (
        locked(out / ".pack" / "workers", shared=True),
        pytest.raises(ShardError, match="worker processes of an earlier run"),
    ):
        pack(source, out, media_root=media)
    assert pack(source, out, media_root=media).num_samples == 2


def test_a_shard_that_vanishes_under_the_run_is_an_error_and_not_left_out(tmp_path, media):
    source, out = write_json(tmp_path, texts(8)), tmp_path / "out"

    def lose_the_first(done: int, total: int) -> None:
        if done == total:
            (out / "shard-00000.index").unlink()

    with pytest.raises(ShardError, match=r"shard-00000.tar: holds 0 of 4 samples.* run it again"):
        pack(source, out, media_root=media, shard_size=4, on_progress=lose_the_first)
    assert not (out / "dataset.json").exists()
    assert pack(source, out, media_root=media, shard_size=4).num_samples == 8


def test_workers_end_with_a_killed_parent(tmp_path, media):
    source = write_json(tmp_path, texts(4000))
    process = start_pack(source, tmp_path / "out", media, workers=2)
    while not list((tmp_path / "out").glob("*.tar")) and process.poll() is None:
        time.sleep(0.002)
    children = children_of(process.pid)
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(child) for child in children)


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue
            if int(status.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_ray_writes_the_same_bytes(media, tmp_path):
    pytest.importorskip("ray")
    source = write_json(tmp_path, [*texts(30), *mixed_records()])
    pack(source, tmp_path / "one", media_root=media, shard_size=7)
    pack(source, tmp_path / "ray", media_root=media, shard_size=7, workers=2, engine="ray")
    assert content(tmp_path / "one") == content(tmp_path / "ray")
