"""`tbptt evaluate`: measure a run's model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from tbptt.checkpoint import Checkpoints, Loaded
from tbptt.cli.build import build_loss, build_metrics, build_model, use_threads
from tbptt.cli.config import Config
from tbptt.cli.data import open_other, open_source
from tbptt.cli.launch import tell
from tbptt.cli.rundir import Facts, RunDirectory
from tbptt.errors import CheckpointError, ConfigError
from tbptt.evaluate import evaluate as measure
from tbptt.streams import Stream

__all__ = ["evaluate", "load_model"]


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    data: Annotated[
        str | None,
        typer.Argument(help="Other data of the same kind, all of it; else the held-out part.", show_default=False),
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pieces read side by side; else the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the newest model of a run, on what was held out or on other data.

    Prints a name and a value a line. The model carries its state from step to step and learns nothing.
    """
    config, record = RunDirectory(run).read()
    config = use_threads(config)
    model, loaded = load_model(RunDirectory(run), config, record.facts)
    if data is None:
        stream = _held_out(run, config, record.facts, lanes)
    else:
        stream = open_other(config, record.facts, data, lanes or config.data.lanes)
    tell(f"update {loaded.update} of {run} on {data or f'the held-out part of {config.data.source}'}")
    found = measure(model, build_loss(record.facts), stream, build_metrics(record.facts))
    if as_json:
        plain = {name: value if math.isfinite(value) else None for name, value in found.items()}
        print(json.dumps({"update": loaded.update} | plain))
        return
    for name, value in found.items():
        print(f"{name} {value:.0f}" if name == "targets" else f"{name} {value:.6g}")


def load_model(run: RunDirectory, config: Config, facts: Facts) -> tuple[nn.Module, Loaded]:
    """Return the model of the newest sound checkpoint, in eval mode.

    Raises:
        CheckpointError: there is none.
    """
    loaded = Checkpoints(run.checkpoints).load_latest()
    if loaded is None:
        raise CheckpointError(
            f"a checkpoint was expected in {run.checkpoints}, but there is none yet: there is no trained model",
            fix=f"tbptt resume {run.path}",
        )
    model = build_model(config, facts)
    model.load_state_dict(loaded.model_state)
    return model.eval(), loaded


def _held_out(run: Path, config: Config, facts: Facts, lanes: int | None) -> Stream:
    if lanes is not None:
        config = config.changed("data", held_out_lanes=lanes)
    held_out = open_source(config, facts).held_out
    if held_out is None:
        raise ConfigError(
            "a held-out part was expected, but the run has none (data.held_out = 0): what was trained on would be "
            "measured",
            fix=f"tbptt evaluate {run} DATA",
        )
    return held_out
