"""Counters of a run and the lines of its log."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.training.cost import ModelCost, Work
from llava_scale.training.parallel import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from llava_scale.types import PackedRow


@dataclass
class Counts:
    """What only ever grows in a run.

    Attributes:
        samples: Samples trained on.
        text_tokens: Their tokens that are not media.
        visual_tokens: Their tokens from pictures and videos.
        visual_tokens_before: As many as these were before compression.
        supervised_tokens: Their tokens in the loss.
        capacity: Tokens that the rows could have held.
        pictures: Pictures and frames trained on.
        squares: Sum over samples of the square of their tokens, which is what attention costs.
        skipped: Samples that could not be used.
        seconds: Time in training steps, waiting for data included, evaluation and saving not.
        wait_s: Part of it spent waiting for data.
    """

    samples: int = 0
    text_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_before: int = 0
    supervised_tokens: int = 0
    capacity: int = 0
    pictures: int = 0
    squares: int = 0
    skipped: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0

    def since(self, mark: Counts) -> Counts:
        """Growth since ``mark``."""
        return Counts(**{item.name: getattr(self, item.name) - getattr(mark, item.name) for item in fields(self)})


class Meter:
    """Counts since the start of the run; each line of the log covers the steps since the last one.

    Everything survives a restart, so that a resumed run writes the lines that an uninterrupted one would have.

    Args:
        device: Where the losses are.
        row_length: Tokens that a row could hold; 0 where rows are as long as their samples.
        ranks: All processes of the run: each counts its own rows, and lines are about all of them together.
        cost: Matrix operations of the model; without it none are logged.
        peak_tflops: Matrix throughput of one device in 10^12 a second, for the MFU; 0 if unknown.

    Attributes:
        total: Counts of this process; those of earlier parts of the run are the first one's.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        row_length: int,
        ranks: Ranks | None = None,
        cost: ModelCost | None = None,
        peak_tflops: float = 0.0,
    ) -> None:
        self.total = Counts()
        self._cost, self._peak = cost, peak_tflops
        self._ranks = ranks or Ranks()
        self._mark = Counts()
        self._device = device
        self._row_length = row_length
        self._clock = time.perf_counter()
        # Sum of the losses of finite steps since the last line, and the number of tokens in it. It is never read
        # between two lines, so a checkpoint in between cannot change the order of summation.
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)

    def start_clock(self) -> None:
        """Leave out the time since the last step: something else than training went on."""
        self._clock = time.perf_counter()

    def add_wait(self, seconds: float) -> None:
        """Count time in which the step could not begin for lack of data."""
        self.total.wait_s += seconds

    def add_row(self, row: PackedRow) -> None:
        """Count the samples and tokens of a row that is trained on."""
        num_tokens = int(row.cu_seq_lens[len(row.keys)]) if row.keys else 0
        num_media = row.num_visual_tokens + sum(row.audio_num_tokens)
        self.total.samples += len(row.keys)
        self.total.text_tokens += num_tokens - num_media
        self.total.visual_tokens += row.num_visual_tokens
        self.total.visual_tokens_before += row.num_visual_features
        self.total.supervised_tokens += row.num_supervised
        ends = row.cu_seq_lens[: len(row.keys) + 1].long()
        self.total.squares += int(ends.diff().square().sum())
        for pixels in (row.pixel_values, row.pixel_values_videos):
            self.total.pictures += 0 if pixels is None else len(pixels)
        self.total.capacity += max(self._row_length, row.input_ids.numel())
        self.total.skipped += len(row.skipped)

    def add_loss(self, loss: Tensor, num_tokens: int, finite: Tensor) -> None:
        """Count a step's mean loss over ``num_tokens``; nothing is counted where ``finite`` is false."""
        sums = torch.stack((loss.double() * num_tokens, loss.new_full((), num_tokens, dtype=torch.float64)))
        self._loss += torch.where(finite, sums, 0.0)

    def end_step(self) -> None:
        """Count the time since the step before."""
        now = time.perf_counter()
        self.total.seconds += now - self._clock
        self._clock = now

    def line(self, *, step: int, lr: float, grad_norm: Tensor | None) -> dict[str, Any]:
        """Return the log's line after ``step`` steps and begin the next one. Waits for the device and all ranks.

        Counts are since the start of the run; ``loss`` (nats a supervised token), rates and shares are over the
        steps since the last line. ``visual_before_per_sample`` and ``visual_per_sample`` are visual tokens of a sample
        before and after compression, ``removed`` the share that it took away.
        """
        loss_sum, loss_tokens = self._loss.tolist()
        now = self.everywhere()
        window = now.since(self._mark)
        self._loss.zero_()
        self._mark = replace(now)
        num_tokens = window.text_tokens + window.visual_tokens
        return {
            "step": step,
            "loss": _finite(loss_sum / loss_tokens) if loss_tokens else None,
            "lr": lr,
            "grad_norm": _finite(float(grad_norm)) if grad_norm is not None else None,
            "tokens_per_s": _rate(num_tokens, window.seconds),
            "text_tokens_per_s": _rate(window.text_tokens, window.seconds),
            "visual_tokens_per_s": _rate(window.visual_tokens, window.seconds),
            "samples_per_s": _rate(window.samples, window.seconds),
            "data_wait": _share(window.wait_s, window.seconds),
            "padding": _share(window.capacity - num_tokens, window.capacity),
            "samples": now.samples,
            "text_tokens": now.text_tokens,
            "visual_tokens": now.visual_tokens,
            "visual_tokens_before": now.visual_tokens_before,
            "visual_before_per_sample": _rate(window.visual_tokens_before, window.samples),
            "visual_per_sample": _rate(window.visual_tokens, window.samples),
            "removed": _share(window.visual_tokens_before - window.visual_tokens, window.visual_tokens_before),
            "supervised_tokens": now.supervised_tokens,
            "skipped": now.skipped,
            **self._speed(window),
            "seconds": round(now.seconds, 3),
            "memory_gib": round(max(self._ranks.gather(memory_gib(self._device))), 3),
        }

    def _speed(self, window: Counts) -> dict[str, float]:
        """Matrix operations a second of one device, in 10^12, and their share of what it could do (MFU)."""
        if self._cost is None or window.seconds <= 0:
            return {}
        work = Work(
            tokens=window.text_tokens + window.visual_tokens,
            squares=window.squares,
            supervised=window.supervised_tokens,
            visual=window.visual_tokens,
            pictures=window.pictures,
        )
        tflops = self._cost.flops(work) / window.seconds / self._ranks.size / 1e12
        return {"tflops_per_s": round(tflops, 4), **({"mfu": round(tflops / self._peak, 4)} if self._peak else {})}

    def everywhere(self) -> Counts:
        """Counts over all ranks; times are the mean. All ranks must call it."""
        names, times = [item.name for item in fields(Counts)], ("seconds", "wait_s")
        if self._ranks.size == 1:
            return replace(self.total)
        sums = self._ranks.totals([getattr(self.total, name) for name in names])
        everywhere = Counts()
        for name, value in zip(names, sums, strict=True):
            setattr(everywhere, name, value / self._ranks.size if name in times else int(value))
        return everywhere

    def state_dict(self) -> dict[str, Any]:
        """Counters as plain values, the same on every rank. Waits for the device and all ranks."""
        return {"total": asdict(self.everywhere()), "mark": asdict(self._mark), "loss": self._loss.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state_dict``'s counters."""
        total, self._mark = Counts(**state["total"]), Counts(**state["mark"])
        self.total = total if self._ranks.is_first else Counts()
        self.total.seconds, self.total.wait_s = total.seconds, total.wait_s
        self._loss.copy_(torch.tensor(state["loss"], dtype=torch.float64))


def memory_gib(device: torch.device) -> float:
    """Largest memory held so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**30 if sys.platform == "darwin" else 2**20)


def _rate(amount: float, per: float) -> float:
    return round(amount / per, 2) if per > 0 else 0.0


def _share(part: float, whole: float) -> float:
    return round(min(max(part / whole, 0.0), 1.0), 4) if whole > 0 else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
