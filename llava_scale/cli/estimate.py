"""``llava-scale estimate``: what a run will take, before it is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from llava_scale.training.estimate import Estimate

_GIB = 2**30


def register(app: typer.Typer) -> None:
    """Add ``estimate`` to ``app``."""
    app.command()(estimate)


def estimate(
    config: Path = typer.Argument(..., help="Recipe as YAML."),
    overrides: list[str] | None = typer.Argument(None, metavar="[KEY=VALUE]...", help="Settings that win."),
    devices: int = typer.Option(1, min=1, help="Processes, one a device."),
    device: str = typer.Option("H100", help="Name of the device, for its peak."),
    tflops: float = typer.Option(0.0, min=0.0, help="Its peak in 10^12 operations a second, instead of the name."),
    mfu: float = typer.Option(0.4, min=0.01, max=1.0, help="Share of the peak that is reached."),
    samples: int = typer.Option(0, min=0, help="Samples of one epoch; needed without train.steps."),
    pictures: float = typer.Option(1.0, min=0.0, help="Pictures in an average sample."),
    text_tokens: float = typer.Option(150.0, min=1.0, help="Text tokens of an average sample."),
    answer_share: float = typer.Option(0.6, min=0.0, max=1.0, help="Share of them in the answers."),
) -> None:
    """Estimate parameters, memory of each process, operations and hours; reads configs only, no weights and no data."""
    from llava_scale.config import load_config
    from llava_scale.training.estimate import Hardware, SampleShape, device_peak
    from llava_scale.training.estimate import estimate as run_estimate

    settings = load_config(config, overrides or [])
    peak = tflops or device_peak(device)
    found = run_estimate(
        settings,
        hardware=Hardware(num_devices=devices, peak_tflops=peak, mfu=mfu),
        sample=SampleShape(pictures=pictures, text_tokens=text_tokens, answer_share=answer_share),
        num_samples=samples,
    )
    _print(found, hardware=f"{devices} x {device if not tflops else f'{tflops:g} Tflop/s'} at {mfu:.0%} of the peak")


def _print(found: Estimate, *, hardware: str) -> None:
    for module in found.modules:
        rates = ", ".join(f"{rate:g}" for rate in module.learning_rates) or "frozen"
        typer.echo(f"{module.name:<16}{module.num_parameters / 1e6:>12,.1f} M parameters, {rates}")
    typer.echo(
        f"sample      {found.tokens_per_sample:,.0f} tokens, {found.visual_tokens:,} of them for each picture\n"
        f"step        {found.samples_per_step:,.0f} samples, {found.flops_per_step / 1e12:,.1f} x 10^12 operations"
    )
    memory = found.memory
    parts = {
        "weights": memory.weights,
        "gathered": memory.gathered,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "block in work": memory.working,
        "logits": memory.logits,
    }
    shown = " + ".join(f"{size / _GIB:.2f} {name}" for name, size in parts.items() if size)
    typer.echo(f"memory      {memory.total / _GIB:.2f} GiB a process = {shown}")
    hours = "" if found.hours is None else f", {found.hours:,.2f} hours on {hardware}"
    typer.echo(f"run         {found.num_steps:,} steps{hours}")
