"""Figures: plain dictionaries for plotly.js, and the few kinds of lines that all pages draw.

Every figure has a second vertical axis, unseen, from 0 (bottom) to 1 (top): on it stand the marks of what has no
place on the first one, such as NaN, and vertical lines, so that they stay when an axis becomes logarithmic.
Lines differ in dashes and points in shape, not in colour alone.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import numpy as np

from tbptt.report.series import Floats, Series, thinned

__all__ = [
    "Axis",
    "Choice",
    "Figure",
    "Trace",
    "View",
    "axes",
    "band",
    "dot",
    "escaped",
    "finite_floor",
    "line",
    "lines",
    "marks",
    "of_views",
    "row_names",
    "shortened",
    "upright",
]

Trace: TypeAlias = dict[str, Any]

# Okabe and Ito's colours, told apart with any colour vision; page.js has their counterparts for a dark page.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#8C6D00", "#555555")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
_MOST_MARKS = 500


@dataclass(frozen=True)
class Choice:
    """A button above a figure.

    Args:
        label: on the button.
        data: what changes in the traces, as for Plotly.restyle: a list of one value a trace.
        layout: what changes in the layout, as for Plotly.relayout.
    """

    label: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layout: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, eq=False)
class Figure:
    """One picture.

    Args:
        title: above it.
        text: what it shows and how to read it, below; also what a screen reader says.
        data: traces of plotly.js, with text escaped by `escaped`.
        layout: of plotly.js; page.js adds fonts, colours and margins.
        choices: buttons, of which the first is on.
        height: of what is drawn, in pixels, without the legend; left out: as page.css has it.
    """

    title: str
    text: str
    data: Sequence[Trace]
    layout: Mapping[str, Any]
    choices: Sequence[Choice] = ()
    height: int | None = None

    def html(self) -> str:
        """Return the figure for a page, drawn by page.js."""
        title, text = html.escape(self.title), html.escape(self.text)
        buttons = "".join(
            f'<button type="button" aria-pressed="{"false" if number else "true"}">{html.escape(choice.label)}</button>'
            for number, choice in enumerate(self.choices)
        )
        group = f'<div class="choices" role="group" aria-label="{title}">{buttons}</div>' if buttons else ""
        content = {
            "data": self.data,
            "layout": self.layout,
            "choices": [{"data": choice.data, "layout": choice.layout} for choice in self.choices],
        }
        packed = json.dumps(_plain(content), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        style = "" if self.height is None else f' style="--height: {self.height}px"'
        return (
            f'<figure><h3>{title}</h3>{group}<div class="plot" role="img" aria-label="{title}. {text}"{style}></div>'
            f'<script type="application/json">{packed}</script><figcaption>{text}</figcaption></figure>'
        )


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Args:
        title: with the unit.
        kind: "steps" is logarithmic, with ticks at powers of two; "rows" has no labels, but a line for each of a
            list, from the top down.
        from_zero: whether a linear axis begins at 0, so that a quantity that hardly changes is seen to.
    """

    title: str
    kind: Literal["linear", "log", "steps", "rows"] = "linear"
    from_zero: bool = False

    def layout(self) -> dict[str, Any]:
        """Return it for plotly.js; all that any kind sets, so that one can take the place of another."""
        return {
            "title.text": escaped(self.title),
            "type": {"steps": "log", "rows": "linear"}.get(self.kind, self.kind),
            "tickmode": {"steps": "array", "rows": "linear"}.get(self.kind, "auto"),
            "tickvals": [2**power for power in range(24)] if self.kind == "steps" else None,
            "dtick": 1 if self.kind == "rows" else None,
            "showticklabels": self.kind != "rows",
            "rangemode": "tozero" if self.from_zero else "normal",
            "autorange": "reversed" if self.kind == "rows" else True,
        }


@dataclass(frozen=True, eq=False)
class View:
    """One of several pictures in the place of one.

    Args:
        label: on its button.
        traces: what it shows.
        x: the horizontal axis.
        y: the vertical one.
    """

    label: str
    traces: Sequence[Trace]
    x: Axis
    y: Axis


def of_views(title: str, text: str, views: Sequence[View], *, height: int | None = None, **layout: Any) -> Figure:
    """Return a figure with a button a view; without buttons for one view.

    Args:
        title: above it.
        text: below it.
        views: one or more, of which the first is shown.
        height: of what is drawn, in pixels; left out: as page.css has it.
        **layout: what all of them share.
    """
    choices: list[Choice] = []
    traces: list[Trace] = []
    for number, view in enumerate(views):
        shown = [other is view for other in views for _ in other.traces]
        changes = {
            f"{name}.{key}": value
            for name, axis in (("xaxis", view.x), ("yaxis", view.y))
            for key, value in axis.layout().items()
        }
        choices.append(Choice(view.label, {"visible": shown}, changes))
        traces += [trace | {"visible": number == 0} for trace in view.traces]
    first = views[0]
    return Figure(title, text, traces, axes(first.x, first.y) | layout, choices if len(views) > 1 else (), height)


def escaped(text: str) -> str:
    """Return a text as plotly.js must get it, which takes some tags for its own."""
    return html.escape(text, quote=False).replace("\n", " ")


def shortened(text: str, most: int = 30) -> str:
    """Return a name as it fits into a figure on a telephone."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def axes(x: Axis, y: Axis) -> dict[str, Any]:
    """Return a layout with these axes, and the unseen second vertical one."""
    layout: dict[str, Any] = {"yaxis2": {"overlaying": "y", "range": [0, 1], "fixedrange": True, "visible": False}}
    for name, axis in (("xaxis", x), ("yaxis", y)):
        flat = axis.layout()
        title = {"title": {"text": flat.pop("title.text")}}
        layout[name] = title | flat | {"exponentformat": "power", "minexponent": 5}
    return layout


def line(name: str, series: Series, index: int, *, points: bool = False, steps: bool = False, **changes: Any) -> Trace:
    """Return one line through finite points.

    Args:
        name: for the legend.
        series: the points.
        index: which colour, dash and symbol.
        points: whether they are marked.
        steps: whether each value holds until the next one.
        **changes: to the trace.
    """
    colour, dash, symbol = _look(index)
    return {
        "type": "scatter",
        "mode": "lines+markers" if points else "lines",
        "name": escaped(name),
        "x": series.x.tolist(),
        "y": series.y.tolist(),
        "line": {"color": colour, "dash": dash, "width": 2, "shape": "hv" if steps else "linear"},
        "marker": {"color": colour, "symbol": symbol, "size": 7},
    } | changes


def _look(index: int) -> tuple[str, str, str]:
    """Return colour, dash and symbol; after as many as there are, each colour comes with the next dash and symbol."""
    turns, kind = divmod(index, len(_COLOURS))
    other = (kind + turns) % len(_COLOURS)
    return _COLOURS[kind], _DASHES[other], _SYMBOLS[other]


def lines(
    name: str, series: Series, index: int, *, log_y: bool = False, marked_as: str = "", **changes: Any
) -> list[Trace]:
    """Return a line as it is measured: thinned, and with marks on the axis for what cannot be drawn.

    Args:
        name: of the quantity.
        series: all points, of which any may be NaN or infinite.
        index: which colour and dash.
        log_y: whether the axis is logarithmic, where zeros cannot be drawn either.
        marked_as: the name of the marks; left out: the line's.
        **changes: to the line's trace.

    Returns:
        The line first, then the marks.
    """
    y, drawn = series.y, series.finite
    if log_y:
        drawn = drawn.where(drawn.y > 0)
    found = [line(name, thinned(drawn), index, points=len(drawn) <= 40, **changes) if len(drawn) else _nothing()]
    for label, kept, place, symbol in (
        ("not a number", np.isnan(y), 0.0, "x-open"),
        ("+infinity", y == np.inf, 1.0, "triangle-up"),
        ("-infinity", y == -np.inf, 0.0, "triangle-down"),
        ("0 or less", np.isfinite(y) & (y <= 0) & log_y, 0.0, "line-ns-open"),
    ):
        if kept.any():
            found.append(marks(f"{marked_as or name}: {label}", series.x[kept], place, symbol, index))
    return found


def _nothing() -> Trace:
    """Return a line without a point, since plotly.js has no axis without a line; the second one needs the first."""
    return {"type": "scatter", "x": [None], "y": [None], "showlegend": False, "hoverinfo": "skip"}


def marks(name: str, x: Floats, place: float, symbol: str, index: int) -> Trace:
    """Return marks at the bottom (0) or the top (1) of a figure; their number is in the legend."""
    kept = x if len(x) <= _MOST_MARKS else x[np.linspace(0, len(x) - 1, _MOST_MARKS).astype(int)]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escaped(f"{name} ({len(x):,})"),
        "x": kept.tolist(),
        "y": [place] * len(kept),
        "yaxis": "y2",
        "cliponaxis": False,
        "hovertemplate": "%{x}<extra>" + escaped(name) + "</extra>",
        "marker": {"color": _COLOURS[index % len(_COLOURS)], "symbol": symbol, "size": 10},
    }


def upright(name: str, x: float, index: int) -> Trace:
    """Return a vertical line with its name in the legend."""
    colour, dash, symbol = _look(index)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escaped(name),
        "x": [x, x],
        "y": [0, 1],
        "yaxis": "y2",
        "hoverinfo": "name",
        "line": {"color": colour, "dash": dash, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": 8},
    }


def band(name: str, x: Floats, low: Floats, high: Floats, index: int, *, floor: float = -math.inf) -> Trace:
    """Return the area between two lines, in pieces where one of them is not finite.

    It has no place of its own in the legend, but comes and goes with the line of the same name.

    Args:
        name: of that line.
        x: shape (N,).
        low: likewise.
        high: likewise.
        index: which colour.
        floor: where the area is cut, since a logarithmic axis has no zero.
    """
    outline_x: list[float | None] = []
    outline_y: list[float | None] = []
    for piece in _pieces(np.isfinite(low) & np.isfinite(high)):
        lower, upper = np.maximum(low[piece], floor), np.maximum(high[piece], floor)
        outline_x += [*x[piece].tolist(), *x[piece][::-1].tolist(), None]
        outline_y += [*lower.tolist(), *upper[::-1].tolist(), None]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escaped(name),
        "legendgroup": escaped(name),
        "showlegend": False,
        "x": outline_x,
        "y": outline_y,
        "fill": "toself",
        "fillcolor": _COLOURS[index % len(_COLOURS)],
        "opacity": 0.22,
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def dot(name: str, value: float, low: float, high: float, index: int) -> Trace:
    """Return a point on row `index`, with its interval; for a vertical axis of the kind "rows"."""
    colour, _, symbol = _look(index)
    errors = {"type": "data", "array": [high - value], "arrayminus": [value - low], "thickness": 1.5}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escaped(name),
        "x": [value],
        "y": [index],
        "hovertemplate": "%{x:.4g}<extra>" + escaped(name) + "</extra>",
        "error_x": errors if math.isfinite(low) and math.isfinite(high) else {"visible": False},
        "cliponaxis": False,
        "marker": {"color": colour, "symbol": symbol, "size": 10},
    }


def row_names(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return annotations for a layout: the names of rows, each above its line."""
    shared = {"xref": "paper", "x": 0, "xanchor": "left", "yshift": 16, "showarrow": False, "font": {"size": 12}}
    return [shared | {"y": index, "text": escaped(name)} for index, name in enumerate(names)]


def finite_floor(*curves: Floats) -> float:
    """Return half of the smallest positive number: where a logarithmic picture may end; 1 if there is none."""
    positive = [each[np.isfinite(each) & (each > 0)] for each in curves]
    return 0.5 * min((float(each.min()) for each in positive if len(each)), default=2.0)


def _pieces(kept: Any) -> Iterable[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(int)))
    return [slice(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _plain(value: Any) -> Any:
    """Return what JSON can hold, in six digits; what is not finite leaves a gap."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in cast("Sequence[Any]", value)]
    return value
