from __future__ import annotations

import json

import torch

from llava_scale.training.profiling import StepProfiler

CPU = torch.device("cpu")


def run(profiler, steps):
    written = []
    for step in steps:
        profiler.begin_step(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        written.append(profiler.end_step(step))
    return written


def test_the_chosen_steps_leave_a_trace_and_a_table(tmp_path):
    written = run(StepProfiler("2:4", tmp_path, CPU), range(6))
    assert [path is not None for path in written] == [False, False, False, True, False, False]
    assert "aten::mm" in written[3].read_text()
    assert json.loads((tmp_path / "steps-2-4.trace.json").read_text())["traceEvents"]


def test_a_run_that_ends_among_them_leaves_what_it_has(tmp_path):
    profiler = StepProfiler("2:40", tmp_path, CPU)
    run(profiler, range(1, 4))
    assert profiler.close() == tmp_path / "steps-2-40.txt"
    assert profiler.close() is None


def test_nothing_is_profiled_unasked(tmp_path):
    assert run(StepProfiler("", tmp_path / "profile", CPU), range(3)) == [None] * 3
    assert not (tmp_path / "profile").exists()
