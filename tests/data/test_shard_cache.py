from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_scale.data.shard_cache import ShardCache

NUM_SHARDS, SIZE, PIECE = 6, 200_000, 10_000

WORKER = """
import hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from llava_scale.data.shard_cache import ShardCache
import random
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
def content(number):
    return hashlib.shake_128(str(number).encode()).digest({size})
cache = ShardCache(folder, {limit})
chooser = random.Random(seed)
print("started", flush=True)
for _ in range({rounds}):
    number = chooser.randrange({shards})
    data = content(number)
    path = cache.fetch(f"x://{{number}}", len(data), hashlib.sha256(data).hexdigest(),
                       lambda: ((start, data[start:start + {piece}]) for start in range(0, len(data), {piece})))
    if path is not None:
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            continue
        assert found == data, "torn copy"
print("done", flush=True)
"""


def content(number: int) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(SIZE)


def start(folder: Path, seed: int, rounds: int) -> subprocess.Popen[bytes]:
    code = WORKER.format(size=SIZE, limit=int(2.5 * SIZE), rounds=rounds, shards=NUM_SHARDS, piece=PIECE)
    root = str(Path(__file__).parents[2])
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(seed), root], stdout=subprocess.PIPE)


def check_copies(folder: Path) -> int:
    known = {hashlib.sha256(content(number)).digest() for number in range(NUM_SHARDS)}
    copies = list((folder / "shards").glob("*.tar"))
    for path in copies:
        assert hashlib.sha256(path.read_bytes()).digest() in known
    return len(copies)


def kill_rounds(folder: Path, rounds: int) -> None:
    chooser = random.Random(5)
    num_parts = 0
    for number in range(rounds):
        process = start(folder, number, rounds=100_000)
        process.stdout.readline()
        time.sleep(chooser.random() * 0.05)
        process.kill()
        process.wait()
        num_parts += len(list(folder.glob("shards/*.part")))
        check_copies(folder)
    survivor = start(folder, 10_000, rounds=30)
    output, _ = survivor.communicate(timeout=60)
    assert output == b"started\ndone\n"
    assert check_copies(folder) >= 1
    assert not list(folder.glob("shards/*.part"))
    if rounds > 10:
        assert num_parts > 0


def test_a_killed_download_is_never_read_and_blocks_nobody(tmp_path):
    kill_rounds(tmp_path, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_killed_downloads_leave_no_torn_copy(tmp_path):
    kill_rounds(tmp_path, rounds=100)


def test_processes_share_a_cache_without_torn_copies(tmp_path):
    processes = [start(tmp_path, seed, rounds=40) for seed in range(3)]
    for process in processes:
        assert process.communicate(timeout=100)[0] == b"started\ndone\n"
    assert check_copies(tmp_path) <= 2
    assert ShardCache(tmp_path, 0).num_bytes() <= 2.5 * SIZE


def test_an_unwritable_cache_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert ShardCache(tmp_path / "file" / "cache", 1000).fetch("x://1", 3, "", lambda: [(0, b"abc")]) is None


def test_a_failed_download_leaves_nothing_behind(tmp_path):
    def broken():
        yield 0, b"ab"
        raise RuntimeError("the line went dead")

    with pytest.raises(RuntimeError):
        ShardCache(tmp_path, 1000).fetch("x://1", 3, "", broken)
    assert not list((tmp_path / "shards").iterdir())
