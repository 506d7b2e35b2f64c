"""What `train` and `resume` have in common: run, tell how it ended, and say what comes next."""

from __future__ import annotations

import signal
import sys

import typer

from tbptt.checkpoint import Checkpoints
from tbptt.cli.build import Parts, rate_until
from tbptt.cli.config import Config
from tbptt.cli.rundir import RunDirectory
from tbptt.monitors import Monitor, Progress, TensorBoard
from tbptt.trainer import HeldOut, Saving, Summary, Trainer

__all__ = ["launch", "longer", "newest_update", "tell"]


def tell(text: str) -> None:
    """Say something to a person, on stderr; stdout is for data."""
    print(text, file=sys.stderr, flush=True)


def launch(run: RunDirectory, config: Config, parts: Parts) -> None:
    """Train until the run is over or stopped; the run's path goes to stdout, all else to stderr.

    Raises:
        typer.Exit: with 128 + its number when a signal stopped the run.
        TbpttError: whatever ended the training; the last complete update is in a checkpoint.
    """
    settings = config.run
    monitors: list[Monitor] = [Progress(updates=parts.updates)]
    if settings.tensorboard:
        monitors.append(TensorBoard(run.path / "tensorboard"))
    held_out = None
    if parts.data.held_out is not None:
        held_out = HeldOut(parts.data.held_out, settings.validate_every, parts.metrics)
    trainer = Trainer(
        parts.model,
        parts.loss,
        parts.optimizer,
        parts.estimator,
        parts.data.train,
        guards=parts.guards,
        monitors=monitors,
        directory=run.path,
        seed=settings.seed,
        scheduler=parts.scheduler,
        held_out=held_out,
        saving=Saving(settings.save_every, settings.keep, settings.log_every),
    )
    summary = trainer.run(updates=settings.updates, passes=settings.passes)
    if summary.stopped_by:
        _tell_stopped(run, summary)
    else:
        tell("\n".join(_lines(run, config, summary, parts)))
    print(run.path)
    if summary.stopped_by:
        raise typer.Exit(128 + signal.Signals[summary.stopped_by].value)


def newest_update(run: RunDirectory) -> int | None:
    """Return the number of the newest checkpoint, sound or not; None for none."""
    paths = Checkpoints(run.checkpoints).paths()
    return int(paths[0].name.split("-")[1].split(".")[0]) if paths else None


def _tell_stopped(run: RunDirectory, summary: Summary) -> None:
    saved = newest_update(run)
    written = "checkpoint written" if saved == summary.updates else f"the newest checkpoint is of update {saved}"
    tell(f"stopped by {summary.stopped_by} after update {summary.updates}; {written}")
    tell(f"hint: tbptt resume {run.path}")


def longer(run: RunDirectory, config: Config, parts: Parts, made: int) -> str:
    """Return the command by which a run of so many updates becomes one of twice as many, at a rate above 0."""
    passes = config.run.updates is None and config.run.passes is not None
    until = f"--passes {2 * (config.run.passes or 1)}" if passes else f"--updates {2 * made}"
    if 2 * made > rate_until(config.schedule, parts.schedule_updates):
        until += f" --schedule-updates {2 * made}"
    return f"tbptt resume {run.path} {until}"


def _lines(run: RunDirectory, config: Config, summary: Summary, parts: Parts) -> list[str]:
    model, settings = config.model, config.run
    arguments = ", ".join(f"{key}={value}" for key, value in config.estimator.items() if key in ("k1", "k2"))
    source = config.data.source
    layers = f"{model.layers} x " if model.layers > 1 else ""
    made = f"{summary.updates} updates, {summary.passes} passes"
    lines = [
        f"trained   {layers}{model.core.upper()} {model.hidden} on {source}, "
        f"{config.estimator['name']}({arguments}), {made}",
    ]
    if summary.validation:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in summary.validation.items() if name != "targets")
        lines.append(f"held out  {shown}")
    lines += [f"run       {run.path}", f"next      tbptt evaluate {run.path}"]
    if config.data.unit is not None:
        lines.append(f"          tbptt sample {run.path}")
    lines.append(f"          {longer(run, config, parts, settings.updates or summary.updates)}")
    return lines
