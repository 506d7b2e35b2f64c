"""What a comparison found, as a person and as a program reads it."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

__all__ = ["Comparison", "Curve", "Row"]


@dataclass(frozen=True)
class Curve:
    """How a training went; each list has one value a point.

    Args:
        updates: made so far.
        steps: of the stream read so far.
        seconds: of the estimator's own clock, which stands still while others train and during validation.
        train_loss: sum / count over all updates since the point before.
        validation_updates: as `updates`, of the points below.
        validation_steps: as `steps`.
        validation_seconds: as `seconds`.
        validation_loss: on the held-out stream.
        validation_metrics: there, by name.
    """

    updates: list[int] = field(default_factory=list[int])
    steps: list[int] = field(default_factory=list[int])
    seconds: list[float] = field(default_factory=list[float])
    train_loss: list[float] = field(default_factory=list[float])
    validation_updates: list[int] = field(default_factory=list[int])
    validation_steps: list[int] = field(default_factory=list[int])
    validation_seconds: list[float] = field(default_factory=list[float])
    validation_loss: list[float] = field(default_factory=list[float])
    validation_metrics: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


@dataclass(frozen=True)
class Row:
    """What was found of one estimator; NaN where nothing was.

    Args:
        name: what it is called.
        estimator: how it is written in full.
        kind: "exact", "biased" or "unbiased", as it says itself.
        relative_bias: |<E ĝ - g>| / |<g>|, E over repeats, < > over points; noise of few repeats taken out.
        bias_low: the lower end of its 95 % interval, over points and repeats; 0 where it is within noise.
        bias_high: the upper end.
        mean_relative_error: (<|E ĝ - g|^2> / <|g|^2>)^½, point by point.
        relative_variance: <E |ĝ - E ĝ|^2> / <|g|^2>.
        cosine: <E cos(ĝ, g)>.
        cosine_low: the lower end of its 95 % interval, over points.
        cosine_high: the upper end.
        lookback: steps, the mean over the windows at the points.
        seconds_per_step: of an estimate, a step of the stream, all lanes.
        held_bytes: the most held for backward passes at one time, all lanes.
        updates: made in the race.
        final_loss: at the end of the training curve.
        final_validation: at the end of the validation curve.
        failed: why there is no more; empty for nothing.
    """

    name: str
    estimator: str
    kind: str
    relative_bias: float = math.nan
    bias_low: float = math.nan
    bias_high: float = math.nan
    mean_relative_error: float = math.nan
    relative_variance: float = math.nan
    cosine: float = math.nan
    cosine_low: float = math.nan
    cosine_high: float = math.nan
    lookback: float = math.nan
    seconds_per_step: float = math.nan
    held_bytes: float = math.nan
    updates: int = 0
    final_loss: float = math.nan
    final_validation: float = math.nan
    failed: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `tbptt.compare` found.

    It prints as a table, and shows as one in a notebook.

    Args:
        rows: one for each estimator, in the order given.
        curves: of the races, by name; empty where there was none.
        points: how many spans gradients were compared on.
        span: steps of each.
        reference_steps: the steps before a span that the full gradient reaches back at least.
        notes: what to know when reading it.
    """

    rows: tuple[Row, ...]
    curves: dict[str, Curve]
    points: int
    span: int
    reference_steps: int
    notes: tuple[str, ...] = ()

    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """Return all numbers as tables: by name, then by column, all columns of one length.

        "estimators" has one row for each, "training" one for each point of a curve, "validation" likewise.
        """
        estimators = {each.name: [getattr(row, each.name) for row in self.rows] for each in fields(Row)}
        metrics = sorted({name for curve in self.curves.values() for name in curve.validation_metrics})
        training: dict[str, list[Any]] = {name: [] for name in ("name", "updates", "steps", "seconds", "loss")}
        validation: dict[str, list[Any]] = {name: [] for name in (*training, *metrics)}
        for name, curve in self.curves.items():
            losses = len(curve.train_loss), len(curve.validation_loss)
            for table, count, columns in (
                (training, losses[0], (curve.updates, curve.steps, curve.seconds, curve.train_loss)),
                (
                    validation,
                    losses[1],
                    (
                        curve.validation_updates,
                        curve.validation_steps,
                        curve.validation_seconds,
                        curve.validation_loss,
                        *(curve.validation_metrics.get(metric, [math.nan] * losses[1]) for metric in metrics),
                    ),
                ),
            ):
                for column, values in zip(table.values(), ([name] * count, *columns), strict=True):
                    column.extend(values)
        return {"estimators": estimators, "training": training, "validation": validation}

    def to_json(self) -> str:
        """Return all of it as one JSON object; a number that is none, by its name."""
        return json.dumps(_plain(asdict(self)), indent=2)

    def __str__(self) -> str:
        cells = [list(self._columns()), *([show(row) for show in self._columns().values()] for row in self.rows)]
        widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"{row.name} failed: {row.failed}" for row in self.rows if row.failed]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        head = "".join(f"<th>{html.escape(title)}</th>" for title in self._columns())
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(show(row))}</td>" for show in self._columns().values()) + "</tr>"
            for row in self.rows
        )
        told = [f"{row.name} failed: {row.failed}" for row in self.rows if row.failed] + list(self.notes)
        notes = "".join(f"<li>{html.escape(each)}</li>" for each in told)
        return f"<table><tr>{head}</tr>{body}</table><ul>{notes}</ul>"

    def _columns(self) -> dict[str, Callable[[Row], str]]:
        """Return the columns worth showing: those of the races only where there were any."""
        columns: dict[str, Callable[[Row], str]] = {
            "estimator": lambda row: row.name,
            "bias": lambda row: _number(row.relative_bias),
            "(95 %)": lambda row: "" if math.isnan(row.bias_low) else f"{row.bias_low:.3g}..{row.bias_high:.3g}",
            "variance": lambda row: _number(row.relative_variance),
            "cosine": lambda row: _number(row.cosine),
            "look-back": lambda row: _number(row.lookback),
            "us/step": lambda row: _number(1e6 * row.seconds_per_step),
            "KiB held": lambda row: _number(row.held_bytes / 1024),
        }
        if self.curves:
            columns |= {"updates": lambda row: str(row.updates), "loss": lambda row: _number(row.final_loss)}
        if any(curve.validation_loss for curve in self.curves.values()):
            columns["held-out"] = lambda row: _number(row.final_validation)
        return columns


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
