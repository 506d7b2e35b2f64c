"""The page of a horizon: how far back the gradients go, and what each look-back costs and misses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tbptt.horizon import Band, HorizonReport, Recommendation
from tbptt.report.figure import Axis, Figure, Trace, View, axes, band, finite_floor, line, lines, of_views, upright
from tbptt.report.page import Page, Section
from tbptt.report.series import Floats, Series
from tbptt.report.strip import Strip, strips_html, strips_table
from tbptt.report.table import Table

__all__ = ["horizon_page"]

_LOOKBACK = Axis("look-back, steps", "steps")
_LABEL_WIDTH, _LABEL_HEIGHT = 0.12, 0.09  # as shares of a figure on a telephone


def horizon_page(
    report: HorizonReport,
    *,
    recommendation: Recommendation | None = None,
    refused: str = "",
    strips: Sequence[Strip] = (),
) -> Page:
    """Return the page of what `tbptt.horizon.measure` found.

    Args:
        report: of it.
        recommendation: `report.recommend(...)`, to be marked in the figures.
        refused: why `report.recommend(...)` refused, if it did.
        strips: for text: predictions, and what each past character did to them.
    """
    captions = _CAPTIONS | {
        f"{name}_{kind}": f"{caption}, through {name}"
        for name in report.pathways
        for kind, caption in (("lags", _CAPTIONS["lags"]), ("input_lags", _CAPTIONS["input_lags"]))
    }
    tables = {name: Table(name, columns, captions.get(name, name)) for name, columns in report.tables().items()}
    told_apart = [f"{name}_{kind}" for name in report.pathways for kind in ("lags", "input_lags")]
    sections = [
        _lags(report, recommendation, [tables.pop(name) for name in ("lags", "input_lags") if name in tables]),
        _ways(report, [tables.pop(name) for name in told_apart if name in tables]),
        _strips(strips),
        _bias(report, recommendation),
        _signed(report, recommendation),
        _context(report, recommendation),
        _costs(report),
        _numbers(report, recommendation, list(tables.values())),
    ]
    title = f"How far back {report.model} needs its gradients"
    kept = [section for section in sections if section is not None]
    return Page(
        title,
        _summary(report, recommendation, refused),
        kept,
        [f"{note[:1].upper()}{note[1:]}." for note in report.notes],
    )


_CAPTIONS = {
    "lags": "Gradient of the state by lag",
    "input_lags": "Gradient of the input by lag",
    "lookbacks": "Look-backs compared",
}


def _summary(report: HorizonReport, chosen: Recommendation | None, refused: str) -> str:
    said = [f"No k2 can be recommended: {refused}."] if refused else []
    if chosen is not None:
        said.append(f"Use TBPTT(k1={chosen.k1}, k2={chosen.k2}).")
        if not chosen.met:
            said.append(f"That is what the limits allow; it does not meet the tolerance of {chosen.tolerance:g}.")
        said += chosen.why[:1]
    shares = [report.lag_of_share(share) for share in (0.5, 0.9, 0.99)]
    said.append(
        f"Half of the gradient lies within {shares[0]} steps, 90 % within {shares[1]} and 99 % within {shares[2]}, "
        f"of {report.max_lag} measured."
    )
    if report.learned is False:
        said.append("The model makes no use of its past yet, so all of this is a lower bound: train on, measure again.")
    said.append(
        f"Measured by {report.probes} losses in {report.lanes} {'lane' if report.lanes == 1 else 'lanes'} each."
    )
    return " ".join(said)


def _lags(report: HorizonReport, chosen: Recommendation | None, tables: list[Table]) -> Section:
    bands = [("of the state", report.state)] + ([] if report.inputs is None else [("of the input", report.inputs)])
    floor = finite_floor(*(np.array(each.mean) for _, each in bands))
    traces: list[Trace] = []
    for index, (name, each) in enumerate(bands):
        traces += _with_band(name, each, index, floor=floor, log_y=True)
    traces += _chosen(chosen)
    norm = Axis("gradient norm", "log")
    views = [
        View("linear lags", traces, Axis("lag, steps before the loss"), norm),
        View("log lags", traces, Axis("lag, steps before the loss", "steps"), norm),
    ]
    text = (
        f"The norm of the gradient of one loss with respect to the state, and to the input, so many steps before it: "
        f"mean and 95 % interval over {report.probes} probes."
    )
    return Section("How far the gradient goes", figures=[of_views("Gradient by lag", text, views)], tables=tables)


def _ways(report: HorizonReport, tables: list[Table]) -> Section | None:
    """Return how far the gradient goes through each of the model's ways; nothing where it has one only."""
    if not report.pathways:
        return None
    views: list[View] = []
    curves = {
        "alone": {name: way.alone for name, way in report.pathways.items()},
        "all that crosses": {name: way.crossing for name, way in report.pathways.items()},
        "input, alone": {name: way.inputs for name, way in report.pathways.items() if way.inputs is not None},
    }
    for button, bands in curves.items():
        floor = finite_floor(*(np.array(each.mean) for each in bands.values()))
        traces = [
            trace
            for index, (name, each) in enumerate(bands.items())
            for trace in _with_band(f"through {name}", each, index, floor=floor, log_y=True)
        ]
        if traces:
            views.append(View(button, traces, Axis("lag, steps before the loss"), Axis("gradient norm", "log")))
    shares = ", ".join(f"{report.share_of(name):.0%} through {name}" for name in report.pathways)
    text = (
        f"Parts of the state's gradient by the way that they come: {shares}, of the norms summed over lags. "
        '"Alone" is what has come through that part of the state only, with the others stopped wherever the sequence '
        "may be cut; a curve that ends is exactly zero from there."
    )
    return Section("Through what it goes", figures=[of_views("Gradient by way", text, views)], tables=tables)


def _strips(strips: Sequence[Strip]) -> Section | None:
    if not strips:
        return None
    text = (
        "Each past character, coloured by its influence on one prediction: the stronger the colour, the larger the "
        "gradient of that prediction's loss with respect to this character. The strength goes with the square root of "
        "the influence, scaled in each strip by its largest; the numbers are in the table."
    )
    return Section("What the prediction looks at", text, html=strips_html(strips), tables=[strips_table(strips)])


def _bias(report: HorizonReport, chosen: Recommendation | None) -> Section | None:
    if report.bias is None and not report.lookbacks:
        return None
    cut_off = report.cut_off
    traces: list[Trace] = []
    floor = finite_floor(np.array(cut_off.mean), *([] if report.bias is None else [np.array(report.bias.mean)]))
    measured = report.bias is not None and np.isfinite(report.bias.mean[:-1]).any()
    if report.bias is not None and measured:
        traces += _with_band("bias", _but_reference(report.bias), 0, floor=floor, log_y=True)
    traces += lines("bound of the share cut off", _series(cut_off), 1, log_y=True, mode="lines+markers")
    traces += _chosen(chosen)
    if chosen is not None:
        ends = np.array([report.lookbacks[0], report.lookbacks[-1]], dtype=np.float64)
        level = np.full(2, chosen.tolerance)
        traces.append(line(f"tolerance {chosen.tolerance:g}", Series(ends, level), 5))
    if measured:
        text = (
            "The relative bias of the gradient of all parameters with this look-back, against that of the longest one, "
            "with its 95 % interval, and a bound of the share of the state's gradient that it cuts off. Both should "
            "lie below the tolerance."
        )
    else:
        text = "A bound of the share of the state's gradient that this look-back cuts off"
        text += "." if report.bias is None else "; the bias of the parameters' gradient is not measurable here."
    title, axis = ("Bias by look-back", "relative bias") if measured else ("Share cut off by look-back", "share")
    figures = [Figure(title, text, traces, axes(_LOOKBACK, Axis(axis, "log")))]
    against = _against_cost(report)
    if against is not None:
        figures.append(against)
    if report.cosine is not None and np.isfinite(report.cosine.mean).any():
        text = "The cosine of the angle between the two gradients, with its 95 % interval: 1 for the same direction."
        traces = [*_with_band("cosine", report.cosine, 0), *_chosen(chosen)]
        figures.append(Figure("Direction by look-back", text, traces, axes(_LOOKBACK, Axis("cosine"))))
    return Section("What a look-back misses", figures=figures)


def _against_cost(report: HorizonReport) -> Figure | None:
    costs = report.costs
    if costs is None:
        return None
    held, label = report.cut_off, "bound of the share cut off"
    if report.bias is not None and np.isfinite(report.bias.mean[:-1]).any():
        held, label = _but_reference(report.bias), "bias"
    values = dict(zip(held.at, held.mean, strict=True))
    views: list[View] = []
    for button, axis, amounts, scale in (
        ("time", "time of an update, ms", costs.seconds, 1e3),
        ("memory", "memory held, MB", costs.held_bytes, 1e-6),
    ):
        steps = [each for each in costs.lookbacks if each in values]
        x = np.array([amounts[costs.lookbacks.index(each)] * scale for each in steps])
        y = np.array([values[each] for each in steps])
        points = Series(x, y)
        drawn = np.isfinite(y) & (y > 0)
        kept = [each for each, is_drawn in zip(steps, drawn.tolist(), strict=True) if is_drawn]
        traces = lines(label, points, 0, log_y=True)[1:]
        labelled = line(label, points.where(drawn), 0, points=True, mode="lines+markers+text")
        labelled |= {
            "customdata": kept,
            "text": _apart(points.where(drawn), [str(each) for each in kept]),
            "textposition": "top right",
            "cliponaxis": False,
            "hovertemplate": "k2 = %{customdata}<br>%{x}, %{y}<extra></extra>",
        }
        views.append(View(button, [labelled, *traces], Axis(axis, "log"), Axis(label, "log")))
    text = "Each point is an update of so many steps, k1 = k2: lower is nearer to the full gradient, left is cheaper."
    return of_views("Bias against cost" if label == "bias" else "Share cut off against cost", text, views)


def _apart(points: Series, labels: list[str]) -> list[str]:
    """Return the labels of points on logarithmic axes, without those that would run into one already written."""
    if not labels:
        return []
    places = np.log(np.stack([points.x, points.y], 1))
    places = (places - places.min(0)) / np.maximum(places.max(0) - places.min(0), 1e-9)
    written: list[int] = []
    for index in reversed(range(len(labels))):
        away = np.abs(places[index] - places[written]) / (_LABEL_WIDTH, _LABEL_HEIGHT)
        if (away.max(1) >= 1).all():
            written.append(index)
    return [label if index in written else "" for index, label in enumerate(labels)]


def _signed(report: HorizonReport, chosen: Recommendation | None) -> Section | None:
    if report.signed is None:
        return None
    heading = "Where parts of the gradient cancel"
    if not np.isfinite(report.signed.mean).any():
        return Section(heading, "Not measurable here: the mean gradient does not stand out of the noise of the probes.")
    traces = [*_with_band("share of the full gradient", report.signed, 0), *_chosen(chosen)]
    text = (
        "How much of the longest gradient, in its own direction, is there with this look-back, with its 95 % interval: "
        "1 is all of it. A curve that falls, or overshoots, shows parts that cancel; below 0 the gradient points the "
        "wrong way."
    )
    figure = Figure("Signed share by look-back", text, traces, axes(_LOOKBACK, Axis("signed share")))
    return Section(heading, figures=[figure])


def _context(report: HorizonReport, chosen: Recommendation | None) -> Section | None:
    if report.context is None:
        return None
    ends = np.array([report.context.at[0], report.context.at[-1]], dtype=np.float64)
    traces = [
        *_with_band("loss", report.context, 0),
        line("with all of the past", Series(ends, np.full(2, report.loss)), 1),
        *_chosen(chosen),
    ]
    text = (
        "The loss of the same model when it sees only so many steps, from its initial state, with its 95 % interval "
        "over probes. Where the curve is flat the model makes no use of what lies farther back."
    )
    figure = Figure("Loss by context", text, traces, axes(Axis("context, steps", "steps"), Axis("loss")))
    return Section("What the model makes of its past", figures=[figure])


def _costs(report: HorizonReport) -> Section | None:
    costs = report.costs
    if costs is None:
        return None
    x = np.array(costs.lookbacks, dtype=np.float64)
    views = [
        View(
            label,
            [line(label, Series(x, np.array(amounts) * scale), 0, points=True)],
            _LOOKBACK,
            Axis(axis, from_zero=True),
        )
        for label, amounts, scale, axis in (
            ("time", costs.seconds, 1e3, "time of an update, ms"),
            ("memory", costs.held_bytes, 1e-6, "memory held, MB"),
        )
    ]
    text = "Of one update of k1 = k2 steps, forward and back, without the optimizer; memory is what autograd holds."
    return Section("What a look-back costs", figures=[of_views("Cost by look-back", text, views)])


def _numbers(report: HorizonReport, chosen: Recommendation | None, tables: list[Table]) -> Section:
    rows: dict[str, object] = {
        "decay of the state's gradient, a step": report.decay_rate,
        "half-life, steps": report.half_life,
        "largest Lyapunov exponent, a step": report.lyapunov,
        "mean loss": report.loss,
        "uses its past": report.learned,
        "probes": report.probes,
        "lanes": report.lanes,
        "longest lag, steps": report.max_lag,
    }
    facts = Table(
        "facts", {"quantity": list(rows), "value": [_plain(value) for value in rows.values()]}, "Other facts", False
    )
    reasons = "\n\n".join(() if chosen is None else chosen.why)
    return Section("Numbers and reasons", reasons, tables=[facts, *tables])


def _plain(value: object) -> str:
    if value is None:
        return "not measured"
    return (
        {True: "yes", False: "no"}[value]
        if isinstance(value, bool)
        else f"{value:.5g}"
        if isinstance(value, float)
        else str(value)
    )


def _chosen(chosen: Recommendation | None) -> list[Trace]:
    if chosen is None:
        return []
    found = [upright(f"chosen k2 = {chosen.k2}", chosen.k2, 2)]
    return found + ([upright(f"needed {chosen.needed}", chosen.needed, 3)] if chosen.needed is not None else [])


def _with_band(name: str, curve: Band, index: int, *, floor: float = -np.inf, log_y: bool = False) -> list[Trace]:
    area = band(name, *_arrays(curve), index, floor=floor)
    return [area, *lines(name, _series(curve), index, log_y=log_y, legendgroup=area["legendgroup"])]


def _but_reference(bias: Band) -> Band:
    """Return all but the longest look-back, which is 0 by definition and has no place on a logarithmic axis."""
    return Band(bias.at[:-1], bias.mean[:-1], bias.low[:-1], bias.high[:-1])


def _arrays(curve: Band) -> tuple[Floats, Floats, Floats]:
    x, low, high = (np.array(each, dtype=np.float64) for each in (curve.at, curve.low, curve.high))
    return x, low, high


def _series(curve: Band) -> Series:
    return Series(np.array(curve.at, dtype=np.float64), np.array(curve.mean, dtype=np.float64))
