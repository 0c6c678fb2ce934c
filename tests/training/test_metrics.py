from __future__ import annotations

import torch

from llava_scale.training.metrics import Meter
from llava_scale.types import IGNORE_INDEX, PackedRow, SkippedSample

CPU = torch.device("cpu")


def row(*lengths: int, visual: int = 0, skipped: int = 0) -> PackedRow:
    total = sum(lengths)
    labels = torch.full((total,), IGNORE_INDEX)
    labels[1::2] = 5
    return PackedRow(
        input_ids=torch.arange(total),
        labels=labels,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seq_lens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        image_num_tokens=(visual,) if visual else (),
        keys=tuple(map(str, range(len(lengths)))),
        skipped=tuple(SkippedSample(shard="s", key="k", reason="r") for _ in range(skipped)),
    )


def line(meter: Meter, step: int = 1) -> dict[str, object]:
    return meter.line(step=step, lr=0.1, grad_norm=torch.tensor(2.0))


def test_tokens_samples_and_padding_are_counted():
    meter = Meter(device=CPU, row_length=20)
    meter.add_row(row(6, 4, visual=3, skipped=1))
    meter.add_row(row(8))
    meter.end_step()
    found = line(meter)
    assert (found["samples"], found["text_tokens"], found["visual_tokens"], found["skipped"]) == (3, 15, 3, 1)
    assert found["padding"] == 1 - 18 / 40
    assert found["supervised_tokens"] == 5 + 4
    assert found["tokens_per_s"] > 0


def test_rows_that_are_as_long_as_their_samples_have_no_padding():
    meter = Meter(device=CPU, row_length=0)
    meter.add_row(row(6, 4))
    assert line(meter)["padding"] == 0.0


def test_the_logged_loss_is_the_mean_over_the_tokens_since_the_last_line():
    meter = Meter(device=CPU, row_length=0)
    yes = torch.tensor(True)
    meter.add_loss(torch.tensor(1.0), 30, yes)
    meter.add_loss(torch.tensor(3.0), 10, yes)
    assert line(meter)["loss"] == 1.5
    meter.add_loss(torch.tensor(2.0), 1, yes)
    assert line(meter)["loss"] == 2.0


def test_steps_that_are_not_finite_stay_out_of_the_logged_loss():
    meter = Meter(device=CPU, row_length=0)
    meter.add_loss(torch.tensor(1.0), 10, torch.tensor(True))
    meter.add_loss(torch.tensor(float("nan")), 90, torch.tensor(False))
    assert line(meter)["loss"] == 1.0
    meter.add_loss(torch.tensor(float("nan")), 90, torch.tensor(False))
    bad = meter.line(step=2, lr=0.1, grad_norm=torch.tensor(float("nan")))
    assert (bad["loss"], bad["grad_norm"]) == (None, None)


def test_a_restart_in_the_middle_of_a_line_does_not_change_it():
    values = [0.1, 0.7, 1 / 3, 2.9, 0.123456789]
    whole, first, second = (Meter(device=CPU, row_length=32) for _ in range(3))
    for meter, part in ((whole, values), (first, values[:2])):
        for value in part:
            meter.add_row(row(6, 4))
            meter.add_loss(torch.tensor(value), 7, torch.tensor(True))
    second.load_state_dict(first.state_dict())
    for value in values[2:]:
        second.add_row(row(6, 4))
        second.add_loss(torch.tensor(value), 7, torch.tensor(True))
    expected, found = line(whole), line(second)
    counted = ("loss", "samples", "text_tokens", "padding", "supervised_tokens")
    assert {key: found[key] for key in counted} == {key: expected[key] for key in counted}


def test_time_outside_of_steps_is_left_out():
    meter = Meter(device=CPU, row_length=0)
    meter.end_step()
    before = meter.total.seconds
    meter.start_clock()
    assert meter.total.seconds == before
