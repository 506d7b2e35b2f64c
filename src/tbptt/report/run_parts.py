"""The parts of a run's page that tell how it was trained: lengths, boundaries, lags, state, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from tbptt.report.figure import Axis, Trace, View, line, lines, of_views
from tbptt.report.log import RunLog
from tbptt.report.page import Section
from tbptt.report.series import Series, paired, thinned
from tbptt.report.table import Table

__all__ = ["UPDATES", "boundaries", "lag_curves", "lengths", "speed", "state", "words"]

_ELSEWHERE = {
    *("kind", "update", "position", "steps", "lookback", "gradient_norm", "boundary_norms", "k1", "k2"),
}
_TITLES = {
    "state_norm": "norm of the state",
    "state_drift": "drift of the state",
    "saturated": "share of saturated units",
    "update_ratio": "update / weight",
    "largest_update_ratio": "largest update / weight",
    "rate_factor": "factor of the learning rate",
}
_MOST_CURVES = 6
UPDATES = Axis("updates", from_zero=True)


def words(name: str) -> str:
    """Return a name as a person would write it."""
    return name.replace("_", " ")


def lengths(log: RunLog) -> Section | None:
    """Return k1 and k2 over time, and what a policy asked for; None if nothing is known of them."""
    updates, stability, asked = log.lines("update"), log.lines("stability"), log.lines("length")
    steps = updates.series("update", "steps")
    traces: list[Trace] = []
    for name, series, index in (
        ("k1: steps of the window", steps if len(steps) else stability.series("update", "steps"), 0),
        ("look-back of the gradient", updates.series("update", "lookback"), 1),
        ("k1 asked for", asked.series("update", "k1"), 2),
        ("k2 asked for", asked.series("update", "k2"), 3),
        ("look-back needed", asked.series("update", "needed_lookback"), 4),
    ):
        traces += lines(name, series, index, steps=True) if len(series) else []
    if not traces:
        return None
    views = [
        View("linear", traces, UPDATES, Axis("steps", from_zero=True)),
        View("log", traces, UPDATES, Axis("steps", "steps")),
    ]
    text = (
        "The window (k1) and how far back its gradient really went. A policy's wish is what it asked for; the need is "
        "what it measured."
    )
    tables = [Table("lengths", asked.columns, "What the policy asked for")] if len(asked) else []
    tables += [Table("stability", stability.columns, "Lines of stability")] if len(stability) else []
    return Section("Lengths", figures=[of_views("Lengths over time", text, views)], tables=tables)


def boundaries(log: RunLog) -> Section | None:
    """Return the norms of the state's gradient at the boundaries that it crossed; None if none was crossed."""
    stability = log.lines("stability")
    updates = stability.columns.get("update", [])
    norms = stability.columns.get("boundary_norms", [])
    lags = stability.columns.get("boundary_lags", [None] * len(norms))
    by_place = [_by_place(*each) for each in zip(norms, lags, strict=True)]
    places = sorted({place for each in by_place for place in each})
    if not places:
        return None
    few = [places[number - 1] for number in (1, 2, 4, 8, 16, 32, 64) if number < len(places)]
    unit = "{} steps back" if any(lags) else "boundary {}"
    traces: list[Trace] = []
    for index, place in enumerate([*few[: _MOST_CURVES - 1], places[-1]]):
        values = [each.get(place) for each in by_place]
        traces += lines(unit.format(place), paired(updates, values), index, log_y=True)
    text = (
        "Norm of the gradient with respect to the state at the boundaries between segments that it crosses on its way "
        "back, counted from the newest. A line that lies far below the one before it says that little arrives there."
    )
    view = View("", traces, UPDATES, Axis("state's gradient norm", "log"))
    return Section("Boundaries", figures=[of_views("Boundary norms", text, [view])])


def _by_place(norms: Any, lags: Any) -> dict[int, Any]:
    """Return the norms of one line by how many steps back they are, or by number where it does not say."""
    if not isinstance(norms, list):
        return {}
    found = cast("list[Any]", norms)
    places = cast("list[int]", lags) if isinstance(lags, list) and lags else range(1, len(found) + 1)
    return dict(zip(places, found, strict=True))


def lag_curves(log: RunLog) -> Section | None:
    """Return the gradient by lag at several times of the training; None if it was not measured."""
    found = log.lines("lags")
    curves: list[tuple[Any, Series]] = []
    for update, lags, norms in zip(*(found.columns.get(key, []) for key in ("update", "lags", "norms")), strict=False):
        if isinstance(lags, list) and isinstance(norms, list) and len(lags) == len(norms):
            curves.append((update, paired(lags, norms)))
    if not curves:
        return None
    indices = np.unique(np.linspace(0, len(curves) - 1, _MOST_CURVES).astype(int))
    traces: list[Trace] = []
    for index, number in enumerate(indices.tolist()):
        update, curve = curves[number]
        traces += lines(f"update {update}", curve, index, log_y=True)
    norm = Axis("state's gradient norm", "log")
    views = [
        View("linear lags", traces, Axis("lag, steps"), norm),
        View("log lags", traces, Axis("lag, steps", "steps"), norm),
    ]
    text = (
        f"Norm of the gradient of one loss with respect to the state so many steps before; {len(traces)} of "
        f"{len(curves):,} measurements, evenly from the first to the last. A curve that moves up at long lags means "
        "that the model has learned to look further back."
    )
    figures = [of_views("Gradient by lag, as the training went", text, views)]
    return Section(
        "How far gradients go", figures=figures, tables=[Table("lags", found.columns, "Measured lag curves")]
    )


def state(log: RunLog) -> Section | None:
    """Return all other numbers of stability.jsonl; None if there are none."""
    stability = log.lines("stability")
    views = [
        View(words(name), lines(words(name), series, 0), UPDATES, Axis(_TITLES.get(name, words(name))))
        for name in {**_TITLES, **stability.columns}  # those that are known first
        if name not in _ELSEWHERE and len(series := stability.series("update", name))
    ]
    if not views:
        return None
    text = (
        "The state that is carried on: its size, how fast it changes, the share of its units that are near their "
        "limits; and the size of an update relative to the weights, usually about 0.001."
    )
    return Section("State and updates", figures=[of_views("One quantity at a time", text, views)])


def speed(log: RunLog) -> Section | None:
    """Return speed and memory by update; None if they were not measured."""
    timing = log.lines("timing")
    views: list[View] = []
    for name, label, axis, scale in (
        ("lane_steps_per_s", "speed", "steps a second, all lanes", 1.0),
        ("peak_rss_bytes", "memory", "peak memory, MB", 1e6),
        ("peak_device_bytes", "device memory", "peak device memory, MB", 1e6),
    ):
        series = timing.series("update", name)
        if len(series):
            drawn = _stepped(label, Series(series.x, series.y / scale))
            views.append(View(label, drawn, UPDATES, Axis(axis, from_zero=True)))
    if not views:
        return None
    figure = of_views(
        "Speed and memory",
        "Speed is the mean since the line before; memory is the highest so far, of the process.",
        views,
    )
    return Section("Speed and memory", figures=[figure], tables=[Table("timing", timing.columns, "Lines of times")])


def _stepped(name: str, series: Series) -> Sequence[Trace]:
    return [line(name, thinned(series.finite), 0, points=True)]
