from __future__ import annotations

import multiprocessing
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from llava_scale.data.dataset import open_dataset
from llava_scale.data.lengths import UNREADABLE, TextLengths, by_shard
from tests.data.streams import LetterEncoder, MemoryDataset, byte_encoder, shard_stream, write_shards


class CountingEncoder(LetterEncoder):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def encode(self, turns):
        self.calls += 1
        return super().encode(turns)


def test_samples_are_grouped_by_shard_in_any_order():
    dataset = MemoryDataset(lengths=[1] * 25, shard_size=10)
    groups = by_shard(dataset, np.array([24, 3, 11, 0, 10]))
    assert [(group.shard, group.where.tolist(), group.inside.tolist()) for group in groups] == [
        (0, [3, 1], [0, 3]),
        (1, [4, 2], [0, 1]),
        (2, [0], [4]),
    ]


def test_placeholders_do_not_count(tmp_path):
    dataset = MemoryDataset(lengths=[5, 7], images=[0, 2])
    assert TextLengths(dataset, LetterEncoder(), cache_dir=str(tmp_path)).of(np.array([1, 0])).tolist() == [7, 5]


def test_a_broken_record_is_marked(tmp_path):
    dataset = MemoryDataset(lengths=[5, -1])
    assert TextLengths(dataset, LetterEncoder(), cache_dir=str(tmp_path)).of(np.arange(2)).tolist() == [5, UNREADABLE]


def test_only_what_is_asked_for_is_measured_and_only_once(tmp_path):
    dataset, encoder = MemoryDataset(lengths=[4, 5, 6, -1] * 5, shard_size=10), CountingEncoder()
    asked = np.array([1, 3, 12])
    for _ in range(2):
        first = TextLengths(dataset, encoder, cache_dir=str(tmp_path)).of(asked)
        assert first.tolist() == [5, UNREADABLE, 4]
        assert encoder.calls == 2
    rest = TextLengths(dataset, encoder, cache_dir=str(tmp_path)).of(np.arange(20))
    assert rest.tolist() == [4, 5, 6, UNREADABLE] * 5
    assert encoder.calls == 15


@pytest.mark.parametrize("damage", [b"", b"LSL1 torn", bytes(60)])
def test_a_damaged_file_is_measured_again(tmp_path, damage):
    dataset, encoder = MemoryDataset(lengths=[3] * 10), CountingEncoder()
    TextLengths(dataset, encoder, cache_dir=str(tmp_path)).of(np.arange(10))
    (file,) = tmp_path.rglob("*.lengths")
    file.write_bytes(damage)
    assert TextLengths(dataset, encoder, cache_dir=str(tmp_path)).of(np.arange(10)).tolist() == [3] * 10
    assert encoder.calls == 20


def test_other_content_under_the_same_names_is_measured_again(tmp_path):
    for length in (3, 4):
        dataset = MemoryDataset(lengths=[length] * 10)
        assert (
            TextLengths(dataset, LetterEncoder(), cache_dir=str(tmp_path)).of(np.arange(10)).tolist() == [length] * 10
        )


def test_a_folder_that_cannot_be_written_costs_a_warning_only(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    dataset = MemoryDataset(lengths=[3] * 30)
    lengths = TextLengths(dataset, LetterEncoder(), cache_dir=str(tmp_path / "file"))
    assert lengths.of(np.arange(30)).tolist() == [3] * 30
    assert len(caplog.records) == 1
    assert "data.cache_dir" in caplog.text


def _measure(folder: Path, cache: Path) -> None:
    stream = shard_stream(folder, cache)
    stream.steps_per_epoch()


def test_records_are_fetched_ahead_and_only_those_that_must_be_measured(tmp_path):
    asked = []

    class Remote(MemoryDataset):
        def prefetch(self, numbers, *, text_only=False):
            assert text_only
            asked.extend(numbers)

    lengths = TextLengths(Remote(lengths=[3] * 100), LetterEncoder(), cache_dir=str(tmp_path))
    lengths.of(np.arange(5, 95))
    lengths.of(np.arange(0, 100))
    assert sorted(asked) == list(range(100))


def _measure_forever(folder: Path, cache: Path) -> None:
    while True:
        for file in cache.rglob("*.lengths"):
            file.unlink(missing_ok=True)
        _measure(folder, cache)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_torn_file_and_no_lock(tmp_path):
    folder = write_shards(tmp_path / "shards", 60)
    cache = tmp_path / "cache"
    dataset = open_dataset(str(folder), cache_dir=str(cache))
    expected = TextLengths(dataset, byte_encoder(), cache_dir=str(tmp_path / "other")).of(np.arange(60)).tolist()
    rng = random.Random(0)
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=_measure_forever, args=(folder, cache))
        process.start()
        process.join(rng.uniform(0.02, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert TextLengths(dataset, byte_encoder(), cache_dir=str(cache)).of(np.arange(60)).tolist() == expected


@pytest.mark.slow
def test_processes_measure_side_by_side_without_harm(tmp_path):
    folder = write_shards(tmp_path / "shards", 60)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_measure, args=(folder, tmp_path / "cache")) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]
    dataset = open_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    encoder = byte_encoder()
    dataset.prefetch = None  # would fail if anything were left to measure
    lengths = TextLengths(dataset, encoder, cache_dir=str(tmp_path / "cache")).of(np.arange(60))
    assert lengths[3] == len(encoder.encode(dataset.turns(3)).input_ids)
