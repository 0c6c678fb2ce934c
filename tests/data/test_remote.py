from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llava_scale.data.dataset import open_dataset
from llava_scale.data.index import SampleEntry
from llava_scale.data.manifest import DatasetInfo
from llava_scale.data.pack_shard import encode_record
from llava_scale.data.read_ahead import join_ranges
from llava_scale.data.remote import RemoteStore
from llava_scale.data.retry import is_transient, with_retries
from llava_scale.data.shard_writer import ShardWriter
from llava_scale.data.store import RetryPolicy
from llava_scale.errors import MissingExtraError, ShardError
from tests.data.web_server import serving

FAST = RetryPolicy(attempts=12, first_delay_s=0.001, max_delay_s=0.01)


def write_shards(folder: Path, *, num_shards: int = 3, num_samples: int = 20, filler: int = 500) -> None:
    indexes = []
    for shard in range(num_shards):
        with ShardWriter(folder / f"shard-{shard:05d}.tar") as writer:
            for number in range(num_samples):
                turns = [{"from": "human", "value": f"Q{number}"}, {"from": "gpt", "value": f"A{shard}.{number}"}]
                noise = hashlib.sha256(f"{shard}.{number}".encode()).hexdigest() * (filler // 64)
                key = f"s{shard}/n{number}"
                writer.add(key, encode_record({"id": key, "conversations": turns, "noise": noise}), [])
            indexes.append(writer.finish())
    DatasetInfo.of(indexes).save(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "served"
    path.mkdir()
    write_shards(path)
    return path


@pytest.fixture
def server(folder):
    with serving(folder) as server:
        yield server


def everything(data) -> list[object]:
    return [data.sample(number) for number in range(len(data))]


def test_a_url_reads_like_the_folder(folder, server):
    local, remote = open_dataset(str(folder)), open_dataset(server.url)
    assert everything(remote) == everything(local)
    assert remote.fingerprint() == local.fingerprint()
    assert remote.turns(7) == local.turns(7)


def test_file_urls_are_local(folder):
    assert open_dataset(folder.as_uri()).store.is_local


def test_bare_remote_shards_are_indexed_once(folder, server, tmp_path):
    expected = everything(open_dataset(str(folder)))
    for path in [*folder.glob("*.index"), folder / "dataset.json"]:
        path.unlink()
    assert everything(open_dataset(server.url, cache_dir=str(tmp_path / "c"))) == expected
    server.requests.clear()
    assert open_dataset(server.url, cache_dir=str(tmp_path / "c")).key(3) == "s0/n3"
    assert not [asked for path, asked in server.requests if path.endswith(".tar") and asked]


def test_neighbours_travel_in_one_request(folder, server):
    data = open_dataset(server.url)
    data.key(0)
    server.requests.clear()
    found = list(data.samples(range(20)))
    assert [sample.key for sample in found] == [f"s0/n{number}" for number in range(20)]
    assert len(server.requests) == 1


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_injected_faults_change_nothing(folder, tmp_path, cache_gb):
    expected = everything(open_dataset(str(folder)))
    with serving(folder) as server:
        server.faults, server.fault_share = ["reset", "error", "short", "cut"], 0.4
        data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=cache_gb, retry=FAST)
        assert everything(data) == expected
        if not cache_gb:
            assert server.num_faults > 20
            assert data.store.num_retries > 20


def test_a_thousand_faults_change_nothing(folder):
    expected = everything(open_dataset(str(folder)))
    with serving(folder) as server:
        server.faults, server.fault_share = ["reset", "error", "short", "cut"], 0.5
        data = open_dataset(server.url, retry=RetryPolicy(attempts=40, first_delay_s=0.0005, max_delay_s=0.002))
        while server.num_faults < 1000:
            numbers = [server.random.randrange(60) for _ in range(8)]
            data.prefetch(numbers)
            assert [data.sample(number) for number in numbers] == [expected[number] for number in numbers]


def test_a_server_that_stays_broken_is_named_with_the_shard(folder, server):
    data = open_dataset(server.url, retry=RetryPolicy(attempts=3, first_delay_s=0.001))
    data.key(0)
    server.faults, server.fault_share = ["error"], 1.0
    with pytest.raises(ShardError, match=rf"{server.url}/shard-00000.tar: failed 3 times, at last with .*message="):
        data.sample(0)
    assert server.num_faults == 3


def test_a_missing_remote_shard_is_an_error_at_once(folder, server):
    (folder / "shard-00001.tar").unlink()
    data = open_dataset(server.url)
    with pytest.raises(ShardError, match=r"shard-00001\.tar"):
        data.sample(20)


def test_a_remote_shard_that_became_shorter_is_an_error(folder, server):
    with (folder / "shard-00001.tar").open("r+b") as file:
        file.truncate(3000)
    data = open_dataset(server.url, retry=RetryPolicy(attempts=2, first_delay_s=0.001))
    with pytest.raises(ShardError, match=r"shard-00001\.tar"):
        data.sample(39)


def test_a_server_without_ranges_is_refused_with_a_remedy(folder, server):
    data = open_dataset(server.url)
    server.ignore_ranges = True
    with pytest.raises(ShardError, match="ignores byte ranges"):
        data.sample(0)


def test_nothing_at_a_url_says_so(server):
    with pytest.raises(ShardError):
        open_dataset(f"{server.url}/nowhere", retry=FAST)


def test_reading_ahead_overlaps_latency_and_gives_the_same(folder, server):
    expected = everything(open_dataset(str(folder)))
    data = open_dataset(server.url)
    for shard in range(3):
        data.index(shard)
    server.requests.clear()
    numbers = [0, 21, 42, 5, 59]
    data.prefetch(numbers)
    assert [data.sample(number) for number in numbers] == [expected[number] for number in numbers]
    num_requests = len(server.requests)
    assert num_requests <= 5
    assert data.sample(0) == expected[0]  # given up after its use: asked again
    assert len(server.requests) == num_requests + 1


def test_a_failed_read_ahead_is_asked_again(folder, server):
    data = open_dataset(server.url, retry=RetryPolicy(attempts=1))
    data.index(0)
    server.faults, server.fault_share = ["error"], 1.0
    data.prefetch([0, 1])
    while server.num_faults < 1:
        time.sleep(0.001)
    server.fault_share = 0.0
    assert data.sample(0).key == "s0/n0"


def test_pickled_and_threaded_stores_read_the_same(folder, server):
    expected = everything(open_dataset(str(folder)))
    data = pickle.loads(pickle.dumps(open_dataset(server.url)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(data.sample, [*range(60)] * 2)) == expected * 2


def test_a_forked_worker_connects_anew(folder, server):
    data = open_dataset(server.url)
    first = data.sample(0)
    context = multiprocessing.get_context("fork")
    with context.Pool(1) as pool:
        assert pool.apply(data.sample, (0,)) == first


def test_copies_are_made_once_and_then_read_without_the_server(folder, server, tmp_path):
    options = {"cache_dir": str(tmp_path / "c"), "cache_size_gb": 1.0}
    expected = everything(open_dataset(str(folder)))
    data = open_dataset(server.url, **options)
    assert everything(data) == expected
    assert everything(open_dataset(server.url, **options)) == expected
    tars = [path for path, _ in server.requests if path.endswith(".tar")]
    assert len(tars) == 3


def test_copies_stay_below_the_limit_and_the_oldest_go(folder, server, tmp_path):
    size = (folder / "shard-00000.tar").stat().st_size
    data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=2.5 * size / 1e9)
    expected = everything(open_dataset(str(folder)))
    for shard in (0, 1, 0, 2, 0, 1, 2):
        data.close()
        assert data.sample(20 * shard) == expected[20 * shard]
        copies = list((tmp_path / "c" / "shards").iterdir())
        assert 1 <= len(copies) <= 2


def test_a_shard_larger_than_the_limit_is_read_by_ranges(folder, server, tmp_path):
    data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=1e-6)
    assert everything(data) == everything(open_dataset(str(folder)))
    assert not list((tmp_path / "c").glob("shards/*"))


def test_a_copy_with_another_checksum_is_refused(folder, server, tmp_path):
    path = folder / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=1.0)
    with pytest.raises(ShardError, match=r"shard-00001.tar: SHA-256 is .* dataset.json says"):
        data.sample(20)
    assert data.sample(0).key == "s0/n0"
    assert len(list((tmp_path / "c" / "shards").iterdir())) == 1


def test_a_torn_copy_is_fetched_again(folder, server, tmp_path):
    options = {"cache_dir": str(tmp_path / "c"), "cache_size_gb": 1.0}
    expected = open_dataset(server.url, **options).sample(3)
    (copy,) = (tmp_path / "c" / "shards").iterdir()
    copy.write_bytes(copy.read_bytes()[:100])
    assert open_dataset(server.url, **options).sample(3) == expected


def test_a_copy_that_another_process_removed_is_fetched_again(folder, server, tmp_path):
    data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=1.0)
    expected = data.sample(3)
    for copy in (tmp_path / "c" / "shards").iterdir():
        copy.unlink()
    data.store.close()
    assert data.sample(3) == expected


def test_an_abandoned_download_makes_way(folder, server, tmp_path):
    shards = tmp_path / "c" / "shards"
    shards.mkdir(parents=True)
    (shards / f"{'0' * 32}.part").write_bytes(b"x" * 1000)
    data = open_dataset(server.url, cache_dir=str(tmp_path / "c"), cache_size_gb=1.0)
    data.sample(0)
    assert [path.suffix for path in shards.iterdir()] == [".tar"]


def read_all(url: str, cache_dir: str, limit_gb: float, seed: int) -> str:
    data = open_dataset(url, cache_dir=cache_dir, cache_size_gb=limit_gb, retry=FAST)
    numbers = [*range(len(data))] * 2
    random.Random(seed).shuffle(numbers)
    digest = hashlib.sha256()
    found = {number: data.sample(number) for number in numbers}
    for number in range(len(data)):
        digest.update(repr(found[number]).encode())
    return digest.hexdigest()


def test_processes_that_share_a_small_cache_all_read_right(folder, server, tmp_path):
    size = (folder / "shard-00000.tar").stat().st_size
    limit = 2.2 * size / 1e9
    with multiprocessing.get_context("fork").Pool(3) as pool:
        digests = pool.starmap(read_all, [(server.url, str(tmp_path / "c"), limit, seed) for seed in range(6)])
    assert len(set(digests)) == 1
    assert sum(path.stat().st_size for path in (tmp_path / "c" / "shards").iterdir()) <= limit * 1e9


def test_unknown_protocols_and_missing_clients_say_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(ShardError, match="nosuch"):
        RemoteStore("nosuch://bucket/x", cache=tmp_path)
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match="s3fs is not installed"):
        RemoteStore("s3://bucket/x", cache=tmp_path)


def test_only_faults_that_pass_are_retried():
    assert is_transient(ConnectionResetError())
    assert is_transient(TimeoutError())
    assert not is_transient(FileNotFoundError())
    assert not is_transient(PermissionError())
    assert not is_transient(ValueError())
    calls = []

    def fail() -> None:
        calls.append(1)
        raise PermissionError("no")

    with pytest.raises(ShardError, match="here: PermissionError: no"):
        with_retries(fail, where="here", policy=FAST)
    assert len(calls) == 1


def test_joined_ranges_cover_all_and_stay_short():
    chooser = random.Random(3)
    for _ in range(200):
        ranges = [(chooser.randrange(1 << 27), chooser.randrange(1, 1 << 20)) for _ in range(chooser.randrange(1, 40))]
        spans = join_ranges(ranges)
        assert sorted(place for span in spans for place in span.places) == list(range(len(ranges)))
        for span in spans:
            assert span.end - span.start <= 16 << 20
            for place in span.places:
                assert span.start <= ranges[place][0] <= sum(ranges[place]) <= span.end


def test_an_empty_range_needs_no_request(server):
    entry = SampleEntry("k", 0, 0, ())
    store = RemoteStore(server.url, cache=Path(os.devnull))
    assert store.read("shard-00000.tar", entry.json_offset, entry.json_size) == b""
    assert not server.requests
