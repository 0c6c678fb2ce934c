from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from llava_scale.cli import build_app
from llava_scale.errors import LlavaScaleError


@pytest.fixture
def source(tmp_path):
    (tmp_path / "media").mkdir()
    records = []
    for number in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 10), (number, 0, 0)).save(buffer, format="PNG")
        (tmp_path / "media" / f"{number}.png").write_bytes(buffer.getvalue())
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
        records.append({"id": f"k{number}", "image": f"{number}.png", "conversations": turns})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def run(*arguments: object):
    return CliRunner().invoke(build_app(), ["data", *(str(item) for item in arguments)])


def packed(source: Path, *options: object):
    out = source.parent / "out"
    return run(
        "pack", source, out, "--media-root", source.parent / "media", "--shard-size", 5, "--workers", 1, *options
    )


def test_pack_says_what_it_wrote_and_what_comes_next(source):
    done = packed(source)
    assert done.exit_code == 0, done.output
    assert "12 samples in 3 shards" in done.stdout
    assert "next: llava-scale data check" in done.stdout
    assert "(3 already there)" in packed(source).stdout


def test_bad_records_fail_pack_unless_allowed(source):
    (source.parent / "media" / "3.png").unlink()
    done = packed(source)
    assert done.exit_code == 1
    assert "record 4 'k3': image '3.png'" in done.stderr
    assert "--allow-bad 1" in done.stderr
    assert "11 samples" in done.stdout
    assert packed(source, "--allow-bad", 1).exit_code == 0


def test_options_that_need_another_one_are_refused(source):
    with pytest.raises(LlavaScaleError, match="need --image-size"):
        raise packed(source, "--image-quality", 50).exception
    with pytest.raises(LlavaScaleError, match="R,G,B"):
        raise packed(source, "--image-size", 8, "--image-background", "red").exception


def test_prepared_pictures_are_packed(source):
    done = packed(source, "--image-size", 8, "--image-aspect", "resize", "--image-background", "1,2,3")
    assert done.exit_code == 0, done.output
    prepared = json.loads((source.parent / "out" / "dataset.json").read_bytes())["prepared"]
    wanted = {"image_size": 8, "image_aspect": "resize", "image_format": "jpeg", "image_quality": 90}
    assert prepared == {**wanted, "image_background": [1, 2, 3]}


def test_check_prints_a_table_and_fails_on_damage(source, tmp_path):
    packed(source)
    done = run("check", tmp_path / "out", "--workers", 1)
    assert done.exit_code == 0, done.output
    assert "12 of 12 samples read: image 12" in done.stdout
    assert "all well" in done.stdout
    shard = tmp_path / "out" / "shard-00001.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 40] ^= 255
    shard.write_bytes(content)
    done = run("check", tmp_path / "out", "--workers", 1, "--report", tmp_path / "report.jsonl")
    assert done.exit_code == 1
    assert "shard-00001.tar: SHA-256" in done.stderr
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) >= 1


def test_split_merge_reshard_and_index_work_together(source, tmp_path):
    packed(source)
    assert run("split", tmp_path / "out", tmp_path / "a", tmp_path / "b", "--share", 0.4).exit_code == 0
    done = run("merge", tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert "12 samples in 2 shards" in done.stdout, done.output
    assert "12 samples in 4 shards" in run("reshard", tmp_path / "c", tmp_path / "d", "--num-shards", 4).stdout
    for path in (tmp_path / "d").glob("*.index"):
        path.unlink()
    assert "4 indexes made" in run("index", tmp_path / "d", "--workers", 1).stdout
    assert run("check", tmp_path / "d", "--workers", 1, "--no-checksums").exit_code == 0


def test_merge_needs_a_source_and_a_folder(tmp_path):
    with pytest.raises(LlavaScaleError, match="and then the new folder"):
        raise run("merge", tmp_path).exception
