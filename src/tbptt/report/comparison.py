"""The page of a comparison: what each estimator's gradient is worth, what it costs, how far training gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tbptt.comparison import Comparison, Curve, Row
from tbptt.report.figure import Axis, Figure, Trace, View, bars, line, lines, of_views
from tbptt.report.page import Page, Section
from tbptt.report.series import Series, moving_mean, thinned
from tbptt.report.table import Table

__all__ = ["comparison_page"]


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
    for what, key in (
        ("The lowest validation loss is that of", "final_validation"),
        ("The lowest training loss is that of", "final_loss"),
        ("The gradient with the smallest bias is that of", "relative_bias"),
        ("The fastest is", "seconds_per_step"),
        ("The least memory is held by", "held_bytes"),
    ):
        if key == "final_loss" and said:
            continue
        values = [(getattr(row, key), row.name) for row in comparison.rows if math.isfinite(getattr(row, key))]
        if len(values) > 1:
            value, name = min(values)
            last = max(values)
            said.append(f"{what} {name}: {_amount(key, value)}; the highest is {_amount(key, last[0])}, of {last[1]}.")
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
    if comparison.curves:
        columns |= {"updates": [row.updates for row in rows], "training loss": [row.final_loss for row in rows]}
        columns["validation loss"] = [row.final_validation for row in rows]
    text = (
        f"Bias, variance and cosine are against full back-propagation, at {comparison.points} places of "
        f"{comparison.span} steps, each with at least {comparison.reference_steps} steps before it. What was not "
        "measured is nan."
    )
    return Section("Side by side", text, tables=[Table("overview", columns, "Estimators", folded=False)])


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:.2g} to {high:.2g}"


def _against_cost(rows: Sequence[Row]) -> Section | None:
    views: list[View] = []
    for button, key, axis, scale in (
        ("time", "seconds_per_step", "time, µs a step of the stream", 1e6),
        ("memory", "held_bytes", "memory held for backward passes, MB", 1e-6),
    ):
        traces: list[Trace] = []
        for index, row in enumerate(rows):
            point = Series(np.array([getattr(row, key) * scale]), np.array([row.relative_bias]))
            traces += _point(row, point, index)
        views.append(View(button, traces, Axis(axis, "log"), Axis("relative bias", "log")))
    if not any(view.traces for view in views):
        return None
    text = (
        "Each point is an estimator, with the 95 % interval of its bias: farther down is nearer to the full gradient, "
        "farther to the left is cheaper. An interval that reaches 0 is cut "
        "off at a thousandth of the bias, and a bias that noise hides stands at the bottom."
    )
    return Section("Bias against cost", figures=[of_views("Bias against cost", text, views)])


def _point(row: Row, point: Series, index: int) -> list[Trace]:
    x, y = float(point.x[0]), float(point.y[0])
    if not (math.isfinite(x) and x > 0 and y >= 0):
        return []
    if not (math.isfinite(y) and y > 0):
        return lines(row.name, point, index, log_y=True)
    known = math.isfinite(row.bias_low) and math.isfinite(row.bias_high)
    above, below = (row.bias_high - y, min(y - row.bias_low, 0.999 * y)) if known else (0.0, 0.0)
    changes: dict[str, Any] = {"mode": "markers", "cliponaxis": False}  # which is which says the legend: names collide
    changes["error_y"] = {"type": "data", "array": [above], "arrayminus": [below], "thickness": 1.2, "visible": known}
    return [line(row.name, point, index, **changes)]


def _direction(rows: Sequence[Row]) -> Section | None:
    known = [row for row in rows if math.isfinite(row.cosine) or math.isfinite(row.relative_variance)]
    if not known:
        return None
    views: list[View] = []
    for button, key, axis in (
        ("cosine", "cosine", "cosine to the full gradient"),
        ("variance", "relative_variance", "relative variance"),
    ):
        traces = [_bar(row, key, index) for index, row in enumerate(known)]
        views.append(View(button, traces, Axis("", "category"), Axis(axis)))
    text = (
        "The cosine of the angle between an estimate and the full gradient, 1 for the same direction, with its 95 % "
        "interval; and the variance of an estimate, which is 0 where it is no random number."
    )
    return Section("Direction and noise", figures=[of_views("Cosine and variance", text, views)])


def _bar(row: Row, key: str, index: int) -> Trace:
    """Return the bar of one estimator, which the legend names: names below it would leave no room on a phone."""
    value = getattr(row, key)
    above, below = row.cosine_high - value, value - row.cosine_low
    known = key == "cosine" and math.isfinite(above) and math.isfinite(below)
    errors = {"type": "data", "array": [above], "arrayminus": [below], "visible": known}
    return bars(row.name, [str(index + 1)], np.array([value]), index, error_y=errors, textposition="none")


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
            for index, (each, curve) in enumerate(comparison.curves.items()):
                traces += _race(each, _curve(curve, kind, key), index, smoothed=kind == "train")
            views.append(View(label, traces, Axis(axis), Axis(name)))
        figures.append(of_views(name.capitalize(), _RACE + (_SMOOTHED if kind == "train" else ""), views))
    return Section("How far training gets", figures=figures) if figures else None


def _race(name: str, curve: Series, index: int, *, smoothed: bool) -> list[Trace]:
    found, *unusual = lines(name, curve, index)
    if smoothed and len(curve.finite):
        found = line(name, thinned(moving_mean(curve, max(3, len(curve) // 25))), index)
    return [found, *unusual]


_RACE = "All from the same weights, on the same data, each on a clock of its own that stands still while others train."
_SMOOTHED = " Each point of the training loss is the mean of those around it, a twenty-fifth of all."


def _curve(curve: Curve, kind: str, key: str) -> Series:
    x: list[float] = getattr(curve, f"validation_{key}" if kind == "validation" else key)
    y: list[float] = getattr(curve, f"{kind}_loss")
    return Series(np.array(x, dtype=np.float64), np.array(y, dtype=np.float64))
