"""`tbptt learn`: predict each row of a stream as it arrives, then learn from it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from tbptt.checkpoint import Checkpoints, Loaded
from tbptt.cli.build import use_threads
from tbptt.cli.config import Config, Guards, arguments_model, estimator_classes
from tbptt.cli.launch import tell
from tbptt.cli.rowcourse import SECTIONS, RowCourse, Settings
from tbptt.cli.rows import Lines, open_input
from tbptt.cli.settings import Given, read_toml, validate
from tbptt.errors import ConfigError
from tbptt.interrupts import Interrupts

__all__ = ["learn"]

_Text = str | None
_OF_RUN = ("seed", "threads")


def learn(
    source: Annotated[
        str, typer.Option("--input", metavar="csv:-|csv:FILE", help="Rows; the first line names the columns.")
    ],
    target: Annotated[str, typer.Option(metavar="COLUMN", help="What is predicted: numbers, or words as classes.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where checkpoints go; else nothing is kept.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in --out, with the same options.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where predictions go instead of stdout.")
    ] = None,
    classes: Annotated[_Text, typer.Option(metavar="A,B,...", help="The classes, if it is classes.")] = None,
    max_classes: Annotated[int, typer.Option(min=2, metavar="N", help="How many words there may be without it.")] = 16,
    ignore: Annotated[_Text, typer.Option(metavar="A,B,...", help="Columns to leave out.")] = None,
    on_bad_row: Annotated[str, typer.Option(metavar="stop|skip", help="What a malformed row does.")] = "stop",
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more at the end of the file.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Stop after N rows in all.")] = None,
    skip: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --resume: the input has no header, and N lines are passed over."),
    ] = None,
    drift: Annotated[
        _Text, typer.Option(metavar="NAME", help="Report drift of the loss, by a detector of river: ADWIN, ...")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, metavar="N", help="Rows between two checkpoints.")] = 10_000,
    report_every: Annotated[int, typer.Option(min=1, metavar="N", help="Rows between two reports.")] = 1000,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Configuration, TOML.")] = None,
    core: Annotated[_Text, typer.Option(metavar="lstm|gru|rnn|elstm|lru", help="The recurrent layers' kind.")] = None,
    hidden: Annotated[_Text, typer.Option(metavar="N", help="Units of each recurrent layer.")] = None,
    layers: Annotated[_Text, typer.Option(metavar="N", help="Recurrent layers.")] = None,
    k1: Annotated[_Text, typer.Option(metavar="N|LENGTH", help="Rows between two updates.")] = None,
    k2: Annotated[_Text, typer.Option(metavar="N|LENGTH", help="Look-back of the gradient, in rows.")] = None,
    lr: Annotated[_Text, typer.Option(metavar="X", help="Learning rate.")] = None,
    seed: Annotated[_Text, typer.Option(metavar="N", help="Of all random numbers.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any key of these sections; repeatable."),
    ] = None,
) -> None:
    """Predict each row as it arrives, print the prediction, then learn from the row's label.

    Every column but the target is an input, scaled by the rows seen so far. A row without a label (an empty field) is
    predicted, and not learned from. One line of output for each row, flushed at once: a number, or a class; empty for
    a skipped row, and before the first class is known. Everything else goes to stderr.

    With --out, a checkpoint is written every so often, at the end, and on SIGTERM or Ctrl-C, after which the same
    command with --resume goes on at the next row: the input is read again from its beginning, checked to be the same,
    and passed over. After a kill -9 the rows since the last checkpoint are predicted again: in --predictions they
    take the place of the first ones, so that the file is the one of an undisturbed run; on stdout they appear twice.
    """
    options = {
        "--core": ("model.core", core),
        "--hidden": ("model.hidden", hidden),
        "--layers": ("model.layers", layers),
        "--k1": ("estimator.k1", k1),
        "--k2": ("estimator.k2", k2),
        "--lr": ("optimizer.lr", lr),
        "--seed": ("run.seed", seed),
    }
    given = Given()
    if config is not None:
        given.add_tables(read_toml(config), str(config))
    for option, (key, value) in options.items():
        if value is not None:
            given.add(key, value, option)
    given.add_assignments(assignments or [])
    _refuse_unfitting(source, out, resume, follow, on_bad_row, skip)
    settings = Settings(
        config=use_threads(_resolve(given)),
        target=target,
        classes=_names(classes),
        max_classes=max_classes,
        ignored=_names(ignore) or (),
        on_bad_row=cast('Literal["stop", "skip"]', on_bad_row),
        save_every=save_every,
        report_every=report_every,
        drift=drift,
    )
    checkpoints = None if out is None else Checkpoints(out / "checkpoints")
    loaded = _loaded(out, checkpoints, resume)
    with Interrupts() as interrupts:
        lines = Lines(open_input(source), follow=follow, stopped=lambda: bool(interrupts.name))
        RowCourse(settings, lines, checkpoints, loaded, predictions, skip).run(limit)
    if interrupts.name:
        tell(f"stopped by {interrupts.name}" + ("" if out is None else "\nhint: the same command with --resume"))
        raise typer.Exit(128 + signal.Signals[interrupts.name].value)


def _resolve(given: Given) -> Config:
    """Return the configuration: what was given, over the defaults for a live stream.

    Raises:
        ConfigError: settings that cannot be meant, or have no effect here.
    """
    for section, table in given.tables.items():
        keys = cast("dict[str, Any]", table) if isinstance(table, dict) else {}
        for key in keys:
            if section not in SECTIONS and not (section == "run" and key in _OF_RUN):
                raise ConfigError(
                    f"settings of {', '.join(SECTIONS)}, run.seed and run.threads were expected, but {section}.{key} "
                    "came: it has no effect on a live stream",
                    fix=f"leave {section}.{key} out",
                )
            if (section, key) in (("model", "embedding"), ("model", "tie_weights")):
                raise ConfigError(
                    f"numbers are learned from, so that {section}.{key} has no effect", fix="leave it out"
                )
    defaults = _defaults()
    name: object = given.get("estimator", "name")
    classes = estimator_classes()
    if isinstance(name, str) and name in classes:
        accepted = arguments_model(classes[name]).model_fields
        defaults["estimator"] = {k: v for k, v in defaults["estimator"].items() if k in ("name", *accepted)}
    tables: dict[str, Any] = {
        **defaults,
        **{name: table for name, table in given.tables.items() if name not in defaults},
    }
    for section in defaults:
        tables[section] = defaults[section] | (given.tables.get(section) or {})
    config = validate(tables, given.origins, defaults)
    if config.build_estimator().kind == "unbiased":  # the clipping of the defaults would bias it
        config = config.model_copy(update={"guards": Guards.model_validate(given.tables.get("guards", {}))})
    return config


def _defaults() -> dict[str, dict[str, Any]]:
    """Return a small layer, updated every few rows, that looks back a few dozen."""
    return {
        "data": {"source": "csv", "lanes": 1, "held_out": 0.0},
        "model": {"hidden": 32},
        "estimator": {"name": "TBPTT", "k1": 8, "k2": 24},
        "optimizer": {"lr": 3e-3},
        "guards": {"clip_norm": 1.0},
        "run": {"passes": 1, "threads": 1},
    }


def _refuse_unfitting(
    source: str, out: Path | None, resume: bool, follow: bool, on_bad_row: str, skip: int | None
) -> None:
    """Refuse options that cannot be meant, alone or together."""
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"--on-bad-row stop or skip was expected, but {on_bad_row!r} came", fix="--on-bad-row skip")
    if resume and out is None:
        raise ConfigError("--out was expected, as --resume goes on with what is there", fix="--out DIR --resume")
    if skip is not None and not resume:
        raise ConfigError("--resume was expected with --skip: there is nothing to pass over", fix="leave --skip out")
    if follow and source == "csv:-":
        raise ConfigError(
            "a file was expected with --follow, but standard input ends when its writer ends it", fix="--input csv:FILE"
        )


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(each.strip() for each in text.split(","))


def _loaded(out: Path | None, checkpoints: Checkpoints | None, resume: bool) -> Loaded | None:
    """Return the checkpoint to go on from; None to begin.

    Raises:
        ConfigError: there is something already, and it is not said to go on.
        CheckpointError: none of the checkpoints is sound.
    """
    if out is None or checkpoints is None:
        return None
    if resume:
        loaded = checkpoints.load_latest()
        if loaded is None:
            tell(f"{out} has no checkpoint yet: it starts from the beginning")
        return loaded
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"a new or empty directory was expected for --out, but {out} is neither: what is in it would be lost",
            fix=f"--resume goes on with it; or --out {out}-1",
        )
    return None
