"""`tbptt train`: start a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tbptt
from tbptt.cli.build import Parts, build, use_threads
from tbptt.cli.launch import launch, tell
from tbptt.cli.presets import kind_of
from tbptt.cli.rundir import Record, RunDirectory
from tbptt.cli.settings import Given, read_toml, resolve
from tbptt.errors import ConfigError
from tbptt.guards.base import check_guards

__all__ = ["train"]

# Values are taken as text here, and checked with those of the file, so that every mistake reads alike.
_Text = str | None


def train(
    data: Annotated[
        _Text,
        typer.Argument(
            metavar="[DATA]",
            help="ecg (left out), shakespeare, copy, delayed-recall, adding; or a file: any text, .npy, .npz.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[_Text, typer.Option(metavar="RUN", help="The run's directory; else runs/<data>-<n>.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A run's configuration, TOML.")] = None,
    k1: Annotated[_Text, typer.Option(metavar="N|LENGTH", help="Steps forward between two updates.")] = None,
    k2: Annotated[
        _Text,
        typer.Option(
            metavar="N|LENGTH", help="Look-back of the gradient, in steps, or a length as 'Adaptive(tolerance=0.1)'."
        ),
    ] = None,
    losses: Annotated[_Text, typer.Option(metavar="tail|all", help="With k2 < k1: which losses are learned.")] = None,
    replay: Annotated[
        _Text, typer.Option(metavar="recompute|retain", help="With k2 > k1: how the past is looked back through.")
    ] = None,
    updates: Annotated[_Text, typer.Option(metavar="N", help="Updates to make.")] = None,
    passes: Annotated[_Text, typer.Option(metavar="N", help="Passes over the data to make.")] = None,
    lanes: Annotated[_Text, typer.Option(metavar="N", help="Pieces read side by side.")] = None,
    core: Annotated[
        _Text,
        typer.Option(metavar="NAME", help="lstm, gru, rnn, elstm, lru, attentive_lstm, attentive_gru, or transformer."),
    ] = None,
    hidden: Annotated[_Text, typer.Option(metavar="N", help="Units, or width, of each layer.")] = None,
    layers: Annotated[_Text, typer.Option(metavar="N", help="Layers.")] = None,
    lr: Annotated[_Text, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[_Text, typer.Option(metavar="N", help="Of all random numbers.")] = None,
    threads: Annotated[_Text, typer.Option(metavar="N", help="Threads of torch.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any other key of the configuration; repeatable."),
    ] = None,
) -> None:
    """Train a model, and say where the run is.

    Without arguments: the embedded ECG, in seconds. Options win over --config, and that over the defaults, which
    depend on the data and on the core. The run's directory goes to stdout, everything else to stderr.
    """
    options = {
        "--k1": ("estimator.k1", k1),
        "--k2": ("estimator.k2", k2),
        "--losses": ("estimator.losses", losses),
        "--replay": ("estimator.replay", replay),
        "--updates": ("run.updates", updates),
        "--passes": ("run.passes", passes),
        "--lanes": ("data.lanes", lanes),
        "--core": ("model.core", core),
        "--hidden": ("model.hidden", hidden),
        "--layers": ("model.layers", layers),
        "--lr": ("optimizer.lr", lr),
        "--seed": ("run.seed", seed),
        "--threads": ("run.threads", threads),
    }
    given = Given()
    if config is not None:
        given.add_tables(read_toml(config), str(config))
    if updates is not None or passes is not None:  # they replace what the file says of the end
        given.drop("run", "updates")
        given.drop("run", "passes")
    for option, (key, value) in options.items():
        if value is not None:
            given.add(key, value, option)
    given.add_assignments(assignments or [])
    if data is not None:
        given.add_source(data)
    start(given, out)


def start(given: Given, out: str | None) -> None:
    """Start the run that is described; nothing is written before all of it has been built.

    Raises:
        TbpttError: for settings, data or a directory that will not do.
    """
    config = use_threads(resolve(given))
    if out is not None:
        RunDirectory(out).refuse_used()
    parts = build(config)
    _refuse_bias(parts)
    source = config.data.source
    name = Path(source).stem if kind_of(source) in ("text", "array") else source
    run = RunDirectory.create(out, name)
    record = Record(
        version=tbptt.__version__,
        config=config.to_tables(),
        schedule_updates=parts.schedule_updates,
        facts=parts.data.facts,
    )
    run.write(config, record)
    tell(f"run {run.path}: {parts.updates} updates on {source}")
    launch(run, config, parts)


def _refuse_bias(parts: Parts) -> None:
    """Refuse guards that the trainer would refuse, before anything is written.

    Raises:
        ConfigError: a guard would bias an unbiased estimator.
    """
    try:
        check_guards(parts.guards, parts.estimator)
    except ConfigError as error:  # its hint is Python, for those who write it
        raise ConfigError(
            f"in [guards], {error.message}",
            fix="leave it out and lower --lr against the noise; or --set guards.allow_bias=true, if the bias is meant",
        ) from error
