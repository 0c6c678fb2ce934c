"""Shards in a real S3 API on loopback."""

from __future__ import annotations

import json

import pytest

from llava_scale.data.dataset import open_dataset
from llava_scale.data.write import pack
from llava_scale.errors import ShardError

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    filesystem.mkdir("shards")
    yield filesystem
    filesystem.rm("shards", recursive=True)
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def folder(tmp_path):
    turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]
    source = tmp_path / "data.json"
    source.write_text(json.dumps([{"id": f"k{number}", "conversations": turns} for number in range(30)]))
    pack(source, tmp_path / "out", media_root=tmp_path, shard_size=8)
    return tmp_path / "out"


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_a_bucket_reads_like_the_folder(bucket, folder, tmp_path, cache_gb):
    bucket.put(str(folder), "shards/data", recursive=True)
    local = open_dataset(str(folder))
    remote = open_dataset("s3://shards/data", cache_dir=str(tmp_path / "c"), cache_size_gb=cache_gb)
    assert [remote.sample(number) for number in range(30)] == [local.sample(number) for number in range(30)]
    remote.prefetch(range(30))
    assert [item.key for item in remote.samples(range(30))] == [f"k{number}" for number in range(30)]


def test_bare_shards_in_a_bucket_are_indexed(bucket, folder, tmp_path):
    for path in folder.glob("*.tar"):
        bucket.put(str(path), f"shards/bare/{path.name}")
    remote = open_dataset("s3://shards/bare", cache_dir=str(tmp_path / "c"))
    assert len(remote) == 30
    assert remote.key(29) == "k29"


def test_a_missing_object_is_named(bucket, folder):
    bucket.put(str(folder), "shards/data", recursive=True)
    bucket.rm("shards/data/shard-00002.tar")
    with pytest.raises(ShardError, match=r"s3://shards/data/shard-00002\.tar"):
        open_dataset("s3://shards/data").sample(17)
