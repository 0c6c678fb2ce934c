from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file

from llava_scale.data.features import (
    FeatureFolder,
    FeatureWriter,
    ShardFeatures,
    check_made_with,
    create_folder,
    join_rows,
)
from llava_scale.errors import ConfigError, ShardError

MADE = {"image": {"tower": "abc", "transform": "pad", "dtype": "float32"}}


def write(path, *, dtype="float32", row_shape=(2, 3)):
    """Three samples: two pictures, none, and one picture besides one that could not be decoded."""
    rows = [torch.randn(1, *row_shape) for _ in range(3)]
    writer = FeatureWriter(path, row_shape=row_shape, dtype=dtype)
    for media in ([rows[0], rows[1]], [], [None, rows[2]]):
        writer.add_sample(media)
    assert writer.finish() == path.stat().st_size
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("row_shape", [(2, 3), (5,)])
def test_what_was_written_is_read_sample_by_sample(tmp_path, dtype, row_shape):
    rows = write(tmp_path / "a.safetensors", dtype=dtype, row_shape=row_shape)
    found = ShardFeatures.open(tmp_path / "a.safetensors")
    kept = [row.to(getattr(torch, dtype)) for row in rows]
    assert torch.equal(join_rows(found.of_sample(0)), torch.cat(kept[:2]))
    assert found.of_sample(1) == []
    assert [len(medium) for medium in found.of_sample(2)] == [0, 1]
    assert torch.equal(join_rows(found.of_sample(2)), kept[2])


def test_the_file_is_a_plain_safetensors_file(tmp_path):
    rows = write(tmp_path / "a.safetensors", dtype="bfloat16", row_shape=(1, 3))
    stored = load_file(tmp_path / "a.safetensors")
    assert torch.equal(stored["features"], torch.cat(rows).bfloat16())
    assert stored["starts"].tolist() == [0, 1, 2, 2, 3]
    assert stored["first"].tolist() == [0, 2, 2, 4]


def test_a_shard_without_media_has_a_file_without_rows(tmp_path):
    writer = FeatureWriter(tmp_path / "a.safetensors", row_shape=(2, 3), dtype="float32")
    writer.add_sample([])
    writer.finish()
    assert ShardFeatures.open(tmp_path / "a.safetensors").of_sample(0) == []
    assert join_rows([]) is None


def test_an_unfinished_file_leaves_no_trace_and_a_cut_one_is_named(tmp_path):
    writer = FeatureWriter(tmp_path / "a.safetensors", row_shape=(2, 3), dtype="float32")
    writer.add_sample([torch.zeros(1, 2, 3)])
    writer.discard()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b.safetensors")
    whole = (tmp_path / "b.safetensors").read_bytes()
    for end in (0, 20, 1100):
        (tmp_path / "b.safetensors").write_bytes(whole[:end])
        with pytest.raises(ShardError, match=r"b\.safetensors: damaged features"):
            ShardFeatures.open(tmp_path / "b.safetensors")


def test_a_folder_survives_pickling_and_refuses_other_makers(tmp_path):
    folder = create_folder(tmp_path / "features", MADE)
    assert pickle.loads(pickle.dumps(folder)).made_with == folder.made_with == MADE
    assert create_folder(tmp_path / "features", MADE).made_with == MADE
    other = {"image": {**MADE["image"], "tower": "def"}}
    with pytest.raises(ConfigError, match="another tower: abc, not def; choose another folder"):
        create_folder(tmp_path / "features", other)
    check_made_with(folder, {"image": {"tower": "abc", "transform": "pad"}})
    with pytest.raises(ConfigError, match="another transform: pad, not resize; make them anew"):
        check_made_with(folder, {"image": {"tower": "abc", "transform": "resize"}})
    with pytest.raises(ConfigError, match="holds no features"):
        FeatureFolder.open(tmp_path)
