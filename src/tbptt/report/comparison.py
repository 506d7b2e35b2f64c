"""The page of a comparison: what each estimator's gradient is worth, what it costs, how far training gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tbptt.comparison import Comparison, Curve, Row
from tbptt.report.figure import (
    Axis,
    Figure,
    Trace,
    View,
    dot,
    finite_floor,
    line,
    lines,
    of_views,
    row_names,
    shortened,
)
from tbptt.report.page import Page, Section
from tbptt.report.series import Series, moving_mean, thinned
from tbptt.report.table import Table

__all__ = ["comparison_page"]

_AROUND = [
    *("top right", "bottom left", "top left", "bottom right"),
    *("top center", "bottom center", "middle left", "middle right"),
]  # where the number of a point stands, so that those of points close by stand apart


def comparison_page(comparison: Comparison) -> Page:
    """Return the page of what `tbptt.compare` found."""
    tables = {name: Table(name, columns, name.capitalize()) for name, columns in comparison.tables().items()}
    sections = [
        _overview(comparison),
        _against_cost(comparison.rows),
        _direction(comparison.rows),
        _races(comparison),
        Section("All numbers", tables=[table for table in tables.values() if len(table)]),
    ]
    notes = [f"{row.name} failed: {row.failed}" for row in comparison.rows if row.failed]
    notes += [f"{note[:1].upper()}{note[1:]}." for note in comparison.notes]
    names = ", ".join(row.name for row in comparison.rows)
    kept = [section for section in sections if section is not None]
    return Page(
        f"Compared: {names}" if len(names) <= 80 else f"{len(comparison.rows)} estimators compared",
        _summary(comparison),
        kept,
        notes,
    )


def _summary(comparison: Comparison) -> str:
    said: list[str] = []
    for best, worst, key in (
        ("The lowest validation loss is that of", "the highest", "final_validation"),
        ("The lowest training loss is that of", "the highest", "final_loss"),
        ("The gradient with the smallest bias is that of", "the largest", "relative_bias"),
        ("The fastest is", "the slowest", "seconds_per_step"),
        ("The least memory is held by", "the most", "held_bytes"),
    ):
        if key == "final_loss" and said:
            continue
        values = [(getattr(row, key), row.name) for row in comparison.rows if math.isfinite(getattr(row, key))]
        if len(values) > 1:
            (low, first), (high, last) = min(values), max(values)
            said.append(f"{best} {first}: {_amount(key, low)}; {worst} is {_amount(key, high)}, of {last}.")
    failed = [row.name for row in comparison.rows if row.failed]
    if failed:
        said.append(f"Failed: {', '.join(failed)}.")
    return " ".join(said) or "Nothing was found that could be compared."


def _amount(key: str, value: float) -> str:
    if key == "seconds_per_step":
        return f"{1e6 * value:.4g} µs a step"
    return f"{value / 1e6:.4g} MB" if key == "held_bytes" else f"{value:.4g}"


def _overview(comparison: Comparison) -> Section:
    rows = comparison.rows
    columns: dict[str, list[object]] = {
        "#": list(range(1, len(rows) + 1)),
        "estimator": [row.name for row in rows],
        "kind": [row.kind for row in rows],
        "bias": [row.relative_bias for row in rows],
        "bias, 95 %": [_interval(row.bias_low, row.bias_high) for row in rows],
        "variance": [row.relative_variance for row in rows],
        "cosine": [row.cosine for row in rows],
        "look-back": [row.lookback for row in rows],
        "µs a step": [1e6 * row.seconds_per_step for row in rows],
        "MB held": [row.held_bytes / 1e6 for row in rows],
    }
    text = (
        "Each estimator has its number in all figures. Bias, variance and cosine are against full back-propagation, at "
        f"{comparison.points} places of {comparison.span} steps, each with at least {comparison.reference_steps} steps "
        "before it. What was not measured is nan."
    )
    return Section("Side by side", text, tables=[Table("overview", columns, "Estimators", folded=False, digits=4)])


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.2g} to {high:.2g}"


def _against_cost(rows: Sequence[Row]) -> Section | None:
    floor = finite_floor(*(np.array([getattr(row, key) for row in rows]) for key in ("relative_bias", "bias_low")))
    views: list[View] = []
    for button, key, axis, scale in (
        ("time", "seconds_per_step", "time, µs a step of the stream", 1e6),
        ("memory", "held_bytes", "memory held, MB", 1e-6),
    ):
        traces: list[Trace] = []
        for index, row in enumerate(rows):
            point = Series(np.array([getattr(row, key) * scale]), np.array([row.relative_bias]))
            traces += _point(row, point, index, floor)
        views.append(View(button, traces, Axis(axis, "log"), Axis("relative bias", "log")))
    if not any(view.traces for view in views):
        return None
    text = (
        "Each point is an estimator, by its number, with the 95 % interval of its bias: farther down is nearer to the "
        "full gradient, farther to the left is cheaper. An interval that reaches 0 ends at half of the smallest "
        "number drawn, and a bias that noise hides stands at the bottom. Memory is what autograd holds for backward "
        "passes."
    )
    return Section("Bias against cost", figures=[of_views("Bias against cost", text, views)])


def _point(row: Row, point: Series, index: int, floor: float) -> list[Trace]:
    x, y, name = float(point.x[0]), float(point.y[0]), _numbered(row.name, index)
    if not (math.isfinite(x) and x > 0 and y >= 0):
        return []
    if not (math.isfinite(y) and y > 0):
        return lines(name, point, index, log_y=True, marked_as=str(index + 1))
    known = math.isfinite(row.bias_low) and math.isfinite(row.bias_high)
    above, below = (row.bias_high - y, y - max(row.bias_low, floor)) if known else (0.0, 0.0)
    changes: dict[str, Any] = {
        "mode": "markers+text",
        "text": [str(index + 1)],
        "textposition": _AROUND[index % len(_AROUND)],
        "cliponaxis": False,
    }
    changes["error_y"] = {"type": "data", "array": [above], "arrayminus": [below], "thickness": 1.2, "visible": known}
    return [line(name, point, index, **changes)]


def _direction(rows: Sequence[Row]) -> Section | None:
    views: list[View] = []
    for button, title, found in (
        ("cosine", "cosine to the full gradient", [(row.cosine, row.cosine_low, row.cosine_high) for row in rows]),
        ("variance", "relative variance", [(row.relative_variance, math.nan, math.nan) for row in rows]),
    ):
        traces = [
            dot(_numbered(row.name, index), *values, index)
            for index, (row, values) in enumerate(zip(rows, found, strict=True))
            if math.isfinite(values[0])
        ]
        if traces:
            views.append(View(button, traces, Axis(title, from_zero=True), Axis("", "rows")))
    if not views:
        return None
    text = (
        "The cosine of the angle between an estimate and the full gradient, 1 for the same direction, with its 95 % "
        "interval; and the variance of an estimate, which is 0 where it is no random number."
    )
    figure = of_views(
        "Cosine and variance",
        text,
        views,
        height=90 + 48 * len(rows),
        showlegend=False,
        margin={"l": 18},
        annotations=row_names([_numbered(row.name, index) for index, row in enumerate(rows)]),
    )
    return Section("Direction and noise", figures=[figure])


def _races(comparison: Comparison) -> Section | None:
    kinds = [
        (kind, name)
        for kind, name in (("validation", "validation loss"), ("train", "training loss"))
        if any(getattr(curve, f"{kind}_loss") for curve in comparison.curves.values())
    ]
    figures: list[Figure] = []
    for kind, name in kinds:
        views: list[View] = []
        for label, key, axis in (
            ("by time", "seconds", "seconds of training"),
            ("by updates", "updates", "updates"),
            ("by steps", "steps", "steps of the stream"),
        ):
            traces: list[Trace] = []
            for index, row in enumerate(comparison.rows):
                curve = _curve(comparison.curves.get(row.name, Curve()), kind, key)
                traces += _race(_numbered(row.name, index), curve, index, smoothed=kind == "train")
            views.append(View(label, traces, Axis(axis), Axis(name)))
        figures.append(of_views(name.capitalize(), _RACE + (_SMOOTHED if kind == "train" else ""), views))
    if not figures:
        return None
    rows = comparison.rows
    ends: dict[str, list[object]] = {
        "#": list(range(1, len(rows) + 1)),
        "estimator": [row.name for row in rows],
        "updates": [row.updates for row in rows],
        "training loss": [row.final_loss for row in rows],
        "validation loss": [row.final_validation for row in rows],
    }
    return Section("How far training gets", figures=figures, tables=[Table("ends", ends, "Where it ended", False)])


def _race(name: str, curve: Series, index: int, *, smoothed: bool) -> list[Trace]:
    found, *unusual = lines(name, curve, index, marked_as=str(index + 1))
    if smoothed and len(curve.finite):
        found = line(name, thinned(moving_mean(curve, max(3, len(curve) // 25))), index)
    return [found, *unusual]


_RACE = "All from the same weights, on the same data, each on a clock of its own that stands still while others train."
_SMOOTHED = " Each point of the training loss is the mean of those around it, a twenty-fifth of all."


def _curve(curve: Curve, kind: str, key: str) -> Series:
    x: list[float] = getattr(curve, f"validation_{key}" if kind == "validation" else key)
    y: list[float] = getattr(curve, f"{kind}_loss")
    return Series(np.array(x, dtype=np.float64), np.array(y, dtype=np.float64))


def _numbered(name: str, index: int) -> str:
    return f"{index + 1}: {shortened(name)}"
