"""The training loop.

One optimizer step works on the rows of one ``StepBatch``. The step's loss is the sum over all supervised tokens of
all its rows, over all ranks, divided by their number: neither packing nor the number of rows nor the number of ranks
changes it.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from llava_scale.config import to_dict
from llava_scale.errors import ConfigError
from llava_scale.model import row_inputs
from llava_scale.model.card import card_of_run
from llava_scale.training.checkpoint import CheckpointWriter, TrainerState, list_checkpoints
from llava_scale.training.cost import model_cost, peak_tflops
from llava_scale.training.evaluate import held_out_loss
from llava_scale.training.export import write_model
from llava_scale.training.guard import FiniteGuard
from llava_scale.training.health import Health
from llava_scale.training.interrupt import StopRequest
from llava_scale.training.metrics import Meter
from llava_scale.training.optim import clip_gradients, lr_factor, set_learning_rates, step_where
from llava_scale.training.profiling import StepProfiler
from llava_scale.training.randomness import deterministic_kernels, random_states, untouched_randomness
from llava_scale.training.recipe import set_training_modes
from llava_scale.training.setup import Run, prepare_run
from llava_scale.training.summary import RunSummary, TrainResult
from llava_scale.training.tracker_services import make_trackers
from llava_scale.training.trackers import CallbackTracker, JsonlTracker, Tracker, Trackers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from llava_scale.config import Config
    from llava_scale.training.parallel import Ranks
    from llava_scale.types import PackedRow, StepBatch

logger = logging.getLogger(__name__)


def train(
    config: Config,
    *,
    resume: bool = False,
    evaluate: Callable[[Any, Any, int], dict[str, float]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    trackers: Sequence[Tracker] = (),
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train as ``config`` says, in ``config.train.output_dir``.

    Args:
        config: All settings.
        resume: Continue the run in the folder from its newest whole checkpoint (from step 0 if there is none yet).
            On the same hardware every later step then equals that of an uninterrupted run to the last bit.
        evaluate: Called as ``evaluate(model, processor, step)`` after each held-out evaluation; what it returns is
            logged under ``eval/``.
        on_log: Called with each line of the log.
        trackers: Further ones, beside ``log.jsonl``; on the first rank only.
        ranks: All processes of the run (``process_group.open_ranks``), each of which calls this; alone if None.

    SIGINT, SIGTERM and SIGUSR1 end the run after the step in hand (of several ranks: after the next one at the
    latest), with a checkpoint; ``stopped_by`` of the result tells.

    Raises:
        ConfigError: settings are wrong, or the folder holds another run.
        SampleError: too many samples cannot be used.
        TrainingError: the loss stays non-finite.
        CheckpointError: a checkpoint cannot be written, or none can be read.
    """
    with ExitStack() as cleanup:
        run = prepare_run(config, resume=resume, write=True, cleanup=cleanup, ranks=ranks)
        if evaluate is not None and run.engine.is_sharded:
            raise ConfigError("a sharded model cannot generate during training; leave evaluate out or use strategy ddp")
        extra = [CallbackTracker(on_log)] if on_log else []
        members = [JsonlTracker(run.folder.log), *_services(run), *extra, *trackers] if run.ranks.is_first else []
        tracker = Trackers(members)
        cleanup.callback(tracker.close)
        cleanup.enter_context(deterministic_kernels(run.device))
        stop = cleanup.enter_context(StopRequest())
        tracker.open(run.summary())
        return Trainer(run, tracker, stop, evaluate).fit()


def dry_run(config: Config, *, resume: bool = False) -> tuple[RunSummary, StepBatch]:
    """Do everything that ``train`` does before its first step, and return what it would start with.

    Settings are checked, the data opened, the model built, and the first batch planned and decoded. Nothing is written.
    """
    with ExitStack() as cleanup:
        run = prepare_run(config, resume=resume, write=False, cleanup=cleanup)
        return run.summary(), next(iter(run.parts.stream))


def _services(run: Run) -> list[Tracker]:
    return make_trackers(
        run.config.train.trackers,
        folder=run.folder.path,
        run_name=run.config.name,
        config=to_dict(run.config),
        start_step=run.start_step,
    )


class Trainer:
    """The loop over optimizer steps, and what happens between them.

    Attributes:
        step: Finished optimizer steps.
    """

    def __init__(
        self,
        run: Run,
        tracker: Tracker,
        stop: StopRequest,
        evaluate: Callable[[Any, Any, int], dict[str, float]] | None = None,
    ) -> None:
        self.run, self.tracker, self.stop, self.evaluate = run, tracker, stop, evaluate
        self.config, self.device, self.ranks = run.config.train, run.device, run.ranks
        self.model, self.engine, self.optimizer = run.parts.model, run.engine, run.optimizer
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        packing = run.config.data.packing
        row_length = packing.row_length if packing.mode == "tokens" else 0
        self.meter = Meter(
            device=run.device,
            row_length=row_length,
            ranks=run.ranks,
            cost=model_cost(self.model),
            peak_tflops=peak_tflops(run.device, self.config.peak_tflops),
        )
        self.guard = FiniteGuard(self.config.max_bad_steps, run.ranks)
        self.writer = CheckpointWriter(
            run.folder.checkpoints,
            keep=self.config.keep_checkpoints,
            ranks=run.ranks,
            sharded=run.engine.is_sharded,
            in_background=self.config.async_checkpoint,
            on_saved=lambda path: tracker.note(f"saved {path}"),
        )
        self.health = Health(
            run.folder.health,
            rank=run.ranks.rank,
            heartbeat_s=self.config.heartbeat_s,
            stuck_after_s=self.config.stuck_after_s,
        )
        steps = self.config.profile if run.ranks.is_first else ""
        self.profiler = StepProfiler(steps, run.folder.profile, run.device)
        self._stopping = False
        self.step, self.lr, self.grad_norm = run.start_step, 0.0, torch.zeros(())
        self.saved_step = None if run.state is None else run.state.step
        if run.state is not None:
            self.meter.load_state_dict(run.state.counters["meter"])
            self.guard.load_state_dict(run.state.counters["guard"])

    def fit(self) -> TrainResult:
        """Train to the last step or to a request to stop; return how it went."""
        try:
            return self._fit()
        finally:
            self.profiler.close()
            self.health.close()

    def _fit(self) -> TrainResult:
        self.health.beat(self.step)
        self._evaluate_if_due()  # for a run that was stopped just before it
        self.meter.start_clock()
        batches = iter(self.run.parts.stream)
        while self.step < self.run.total_steps and not self._must_stop():
            self.profiler.begin_step(self.step)
            batch = self._next_batch(batches)
            if batch is None:
                break
            self._train_step(batch)
            self._after_step()
        self._save()
        self.writer.wait()
        done = self.step == self.run.total_steps
        return self._result(final=done and not self.ranks.any(bool(self.stop)))

    def _must_stop(self) -> bool:
        """Whether a stop was asked for; several ranks have agreed on it in the step before."""
        return bool(self.stop) if self.ranks.size == 1 else self._stopping

    def _next_batch(self, batches: Iterator[StepBatch]) -> StepBatch | None:
        """Wait for the next batch; None if a request to stop took the loader's worker processes along."""
        started = time.perf_counter()
        try:
            batch = next(batches)
        except RuntimeError as error:
            if not self.stop or self.ranks.size > 1:
                raise
            logger.warning("no further batch after the request to stop: %s", error)
            return None
        self.meter.add_wait(time.perf_counter() - started)
        return batch

    def _train_step(self, batch: StepBatch) -> None:
        """Forward and backward over every row, then one update."""
        assert batch.step == self.step, f"the stream handed out batch {batch.step} for step {self.step}"
        own_tokens = sum(row.num_supervised for row in batch.rows)
        num_tokens, num_stops = map(int, self.ranks.totals((own_tokens, bool(self.stop))))
        self._stopping = num_stops > 0
        loss = torch.zeros((), device=self.device)
        for number, row in enumerate(batch.rows, start=1):
            loss += self._backward(row, num_tokens, last=number == len(batch.rows))
        self.ranks.sum_(loss)
        self.grad_norm = clip_gradients(self.trained, self.config.max_grad_norm).to(self.device)
        finite = torch.isfinite(loss) & torch.isfinite(self.grad_norm)
        self.lr = set_learning_rates(self.optimizer, self._lr_factor(self.step))
        step_where(self.optimizer, finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.meter.add_loss(loss, num_tokens, finite)
        self.guard.watch(self.step, tuple(key for row in batch.rows for key in row.keys), finite)

    def _backward(self, row: PackedRow, num_tokens: int, *, last: bool) -> Tensor:
        """Add a row's gradients; return its share of the step's loss (scalar on the device)."""
        self.meter.add_row(row)
        with self.engine.micro_step(last=last):
            with self._autocast():
                output = self.engine.forward(
                    **row_inputs(row, device=self.device),
                    num_items_in_batch=max(num_tokens, 1),
                    loss_chunk=self.config.loss_chunk,
                )
            output.loss.backward()
        loss: Tensor = output.loss.detach()
        return loss

    def _after_step(self) -> None:
        """Log, evaluate and save where it is due. Only these wait for the device."""
        self.meter.end_step()
        last = self.step == self.run.total_steps
        log_due = last or self.step % self.config.log_every == 0
        save_due = not last and self.config.save_every and self.step % self.config.save_every == 0
        self._settle(keep=0 if log_due or save_due else 1)
        if log_due:
            self.tracker.log(self.meter.line(step=self.step, lr=self.lr, grad_norm=self.grad_norm))
        self.tracker.step(self.step)
        self.health.beat(self.step)
        table = self.profiler.end_step(self.step - 1)
        if table is not None:
            self.tracker.note(f"step {self.step}: profile in {table}")
        self._evaluate_if_due()
        if save_due:
            self._save()
        self.meter.start_clock()

    def _settle(self, *, keep: int) -> None:
        for bad in self.guard.settle(keep=keep):
            self.tracker.log({"step": bad.step, "event": "non_finite", "keys": list(bad.keys)})

    def _evaluate_if_due(self) -> None:
        """Held-out loss and the caller's evaluation, every ``eval_every`` steps and at the end, once a step."""
        every = self.config.eval_every
        due = self.step == self.run.total_steps or (every and self.step and self.step % every == 0)
        if not due or (self.run.parts.open_eval is None and self.evaluate is None):
            return
        if self.ranks.from_first(lambda: any(line["step"] == self.step for line in self.run.folder.evaluations())):
            return
        with untouched_randomness(self.device):
            self.model.eval()
            scores = self._scores()
            self.engine.end_evaluation()
            set_training_modes(self.model)
        if scores:
            self.tracker.log({"step": self.step, **scores})

    def _scores(self) -> dict[str, Any] | None:
        """What the evaluation finds, by the log's names; None if it was interrupted."""
        scores: dict[str, Any] | None = {}
        if self.run.parts.open_eval is not None:
            with ExitStack() as cleanup:
                batches = self.run.parts.open_eval()
                cleanup.callback(batches.close)
                scores = held_out_loss(
                    self.model,
                    batches,
                    device=self.device,
                    autocast=self._autocast,
                    max_rows=self.config.eval_rows,
                    loss_chunk=self.config.loss_chunk,
                    stop=self.stop,
                    ranks=self.ranks,
                )
        if scores is not None and self.evaluate is not None:
            found = self.evaluate(self.model, self.run.parts.processor, self.step)
            scores.update({key if key.startswith("eval/") else f"eval/{key}": value for key, value in found.items()})
        return scores

    def _save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        self._settle(keep=0)
        if self.step == self.saved_step:
            return
        state = TrainerState(
            step=self.step,
            total_steps=self.run.total_steps,
            loader=self.run.parts.stream.state_dict(),
            counters={"meter": self.meter.state_dict(), "guard": self.guard.state_dict()},
            random=self.ranks.gather(random_states(self.device)),
            frozen=self.run.frozen,
            config=to_dict(self.run.config),
        )
        self.writer.save(state, model=self.model, optimizer=self.optimizer)
        self.saved_step = self.step

    def _write_final(self) -> None:
        """Write model and processor for ``from_pretrained``."""
        self.model.eval()
        evaluations, lines = self.run.folder.evaluations(), self.run.folder.lines()
        loss = next((line["loss"] for line in reversed(list(lines)) if "loss" in line), None)
        held_out = evaluations[-1].get("eval/loss") if evaluations else None
        card = card_of_run(self.run.config, steps=self.step, results={"loss": loss, "held-out loss": held_out})
        write_model(self.run.folder.final, self.engine, self.run.parts.processor, self.ranks, card=card)

    def _result(self, *, final: bool) -> TrainResult:
        if final:
            self._write_final()
        losses = [line["loss"] for line in self.run.folder.lines() if "loss" in line]
        evaluations = self.run.folder.evaluations()
        checkpoints, total = list_checkpoints(self.run.folder.checkpoints), self.meter.everywhere()
        return TrainResult(
            output_dir=self.run.folder.path,
            steps=self.step,
            total_steps=self.run.total_steps,
            loss=losses[-1] if losses else None,
            evaluation=evaluations[-1] if evaluations else {},
            seconds=total.seconds,
            samples=total.samples,
            text_tokens=total.text_tokens,
            visual_tokens=total.visual_tokens,
            skipped=total.skipped,
            bad_steps=self.guard.num_bad,
            checkpoint=checkpoints[0] if checkpoints else None,
            final_dir=self.run.folder.final if final else None,
            stopped_by=None if final else self._signal(),
            stop_exit_code=self.config.stop_exit_code,
        )

    def _signal(self) -> int | None:
        """The signal that one of the ranks got."""
        return next((number for number in self.ranks.gather(self.stop.signal) if number is not None), None)

    def _lr_factor(self, step: int) -> float:
        return lr_factor(
            step,
            total_steps=self.run.total_steps,
            warmup_ratio=self.config.warmup_ratio,
            min_lr_ratio=self.config.min_lr_ratio,
            schedule=self.config.lr_schedule,
        )

    def _autocast(self) -> torch.autocast:
        enabled = self.run.precision == "bf16"
        return torch.autocast(device_type=self.device.type, dtype=torch.bfloat16, enabled=enabled)
