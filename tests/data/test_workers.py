from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from llava_scale.data.collate import RowBuilder
from llava_scale.data.planner import PlannedSample, RowPlan
from llava_scale.data.workers import Ahead, ThreadWorkers, make_workers
from llava_scale.errors import LlavaScaleError, ShardError
from tests.data.streams import LetterEncoder, MemoryDataset, RampCounter, grey, keys, same_rows, shard_stream, take
from tests.data.streams import write_shards as write


def make_builder(dataset):
    return RowBuilder(
        datasets=[dataset], encoder=LetterEncoder(), counter=RampCounter(), transforms={"image": grey}, row_length=64
    )


def plans(count):
    return (RowPlan(number, 0, (PlannedSample(0, number, 0),)) for number in range(count))


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("llava-scale")]


def wait_until(fact, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    assert fact()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_rows_come_in_the_order_of_their_plans(num_workers):
    builder = make_builder(MemoryDataset(lengths=[5] * 40))
    workers = make_workers(builder, num_workers=num_workers, worker_type="thread", prefetch_rows=2)
    assert [built.row.keys for built in workers.run(plans(40))] == [(f"memory/{number}",) for number in range(40)]
    workers.close()
    workers.close()
    assert not ours()


def test_no_more_rows_are_prepared_than_asked_for():
    dataset = MemoryDataset(lengths=[5] * 100)
    workers = make_workers(make_builder(dataset), num_workers=2, worker_type="thread", prefetch_rows=3)
    rows = workers.run(plans(100))
    next(rows)
    wait_until(lambda: dataset.num_reads >= 6)
    time.sleep(0.05)
    assert dataset.num_reads <= 1 + 2 * 3 + 1
    rows.close()
    workers.close()


def test_a_run_that_is_dropped_leaves_the_workers_usable():
    workers = make_workers(
        make_builder(MemoryDataset(lengths=[5] * 50)), num_workers=2, worker_type="thread", prefetch_rows=2
    )
    for _ in range(3):
        assert next(workers.run(plans(50))).row.keys == ("memory/0",)
    workers.close()
    assert not ours()


def test_workers_that_nobody_holds_are_stopped():
    workers = ThreadWorkers(make_builder(MemoryDataset(lengths=[5] * 50)), 2, 4)
    rows = workers.run(plans(50))
    next(rows)
    del workers, rows
    gc.collect()
    wait_until(lambda: not ours())


def test_threads_compute_on_one_core_each_and_leave_the_caller_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []

        class Asking(MemoryDataset):
            def samples(self, numbers):
                seen.append(torch.get_num_threads())
                return super().samples(numbers)

        workers = ThreadWorkers(make_builder(Asking(lengths=[5] * 8)), 2, 4)
        list(workers.run(plans(8)))
        workers.close()
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_crash_surfaces_with_its_traceback_and_the_names_of_the_samples(num_workers):
    class Crashing(MemoryDataset):
        def samples(self, numbers):
            if 3 in numbers:
                raise ZeroDivisionError("a bug in a decoder")
            return super().samples(numbers)

    workers = make_workers(
        make_builder(Crashing(lengths=[5] * 9)), num_workers=num_workers, worker_type="thread", prefetch_rows=2
    )
    rows = workers.run(plans(9))
    assert len(list(islice(rows, 3))) == 3
    with pytest.raises(
        RuntimeError, match=r"row 3 \(samples memory-00000\.tar/memory/3\)(?s:.*)a bug in a decoder"
    ) as caught:
        next(rows)
    assert "in samples" in str(caught.value)
    workers.close()
    assert not ours()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_ours_keep_their_type_and_tell_where_they_come_from(num_workers):
    class Missing(MemoryDataset):
        def samples(self, numbers):
            raise ShardError("shard-00000.tar is missing")

    workers = make_workers(
        make_builder(Missing(lengths=[5])), num_workers=num_workers, worker_type="thread", prefetch_rows=2
    )
    with pytest.raises(ShardError, match="is missing") as caught:
        next(workers.run(plans(1)))
    assert "in samples" in str(caught.value.__cause__)
    workers.close()


def test_an_error_of_planning_comes_in_its_place():
    def failing():
        yield from plans(2)
        raise ShardError("no index")

    workers = ThreadWorkers(make_builder(MemoryDataset(lengths=[5] * 5)), 2, 8)
    rows = workers.run(failing())
    assert len(list(islice(rows, 2))) == 2
    with pytest.raises(ShardError, match="no index"):
        next(rows)
    workers.close()
    assert not ours()


def test_reading_ahead_hands_over_everything_then_ends():
    ahead = Ahead(iter(range(10)), 3)
    assert list(ahead) == list(range(10))
    assert next(ahead, "end") == "end"
    assert ahead.close() == []


def test_closing_returns_what_nobody_took():
    ahead = Ahead(iter(range(10)), 3)
    assert next(ahead) == 0
    left = ahead.close()
    assert left == list(range(1, 1 + len(left)))
    assert len(left) <= 4


@pytest.mark.slow
def test_processes_give_the_same_rows_and_leave_nothing_behind(tmp_path):
    folder = write(tmp_path / "shards", 40)
    with shard_stream(folder, tmp_path) as stream:
        expected = take(stream, 6)
    with shard_stream(folder, tmp_path, num_workers=2, worker_type="process") as stream:
        assert same_rows(take(stream, 3), expected[:3])
        assert same_rows(take(stream, 3), expected[3:])  # the same processes, a new iteration
        pids = [worker.pid for worker in stream._workers._loader._iterator._workers]
        assert len(pids) == 2
    assert not ours()
    for pid in pids:
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_a_killed_worker_process_is_reported_with_its_rows(tmp_path):
    folder = write(tmp_path / "shards", 40)
    with shard_stream(folder, tmp_path, num_workers=1, worker_type="process") as stream:
        batches = iter(stream)
        next(batches)
        os.kill(stream._workers._loader._iterator._workers[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"died while rows [\d, ]+ were being built"):
            list(islice(batches, 50))


@pytest.mark.slow
def test_a_bad_shard_met_in_a_process_keeps_its_type(tmp_path):
    folder = write(tmp_path / "shards", 40)
    with shard_stream(folder, tmp_path, num_workers=1, worker_type="process", shuffle=False) as stream:
        batches = iter(stream)
        next(batches)
        (folder / "shard-00003.tar").write_bytes(b"")
        with pytest.raises(LlavaScaleError, match="shard-00003"):
            list(islice(batches, 100))


INTERRUPTED = """
    import sys, time
    from pathlib import Path
    from tests.data.streams import shard_stream
    if __name__ == "__main__":
        stream = shard_stream(Path(sys.argv[1]), sys.argv[2], num_workers=2, worker_type=sys.argv[3])
        for batch in stream:
            print("ready", flush=True)
            time.sleep(0.01)
"""


@pytest.mark.slow
@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_an_interrupt_ends_the_program_at_once(tmp_path, worker_type):
    folder = write(tmp_path / "shards", 40)
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(INTERRUPTED))
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(tmp_path / "cache"), worker_type],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert "Fatal" not in errors


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "process"}]
)
def test_rows_for_a_device_lie_in_page_locked_memory(tmp_path, options):
    folder = write(tmp_path / "shards", 40)
    with shard_stream(folder, tmp_path, pin_memory=True, **options) as stream:
        row = take(stream, 1)[0].rows[0]
    assert row.input_ids.is_pinned()
    assert row.pixel_values.is_pinned()
    assert torch.equal(row.to("cuda").pixel_values.cpu(), row.pixel_values)


def test_two_streams_run_side_by_side(tmp_path):
    folder = write(tmp_path / "shards", 40)
    with (
        shard_stream(folder, tmp_path, num_workers=1) as first,
        shard_stream(folder, tmp_path, num_workers=2) as second,
    ):
        one, two = iter(first), iter(second)
        for _ in range(5):
            assert keys([next(one)]) == keys([next(two)])
