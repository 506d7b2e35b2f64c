"""The page of a run: what it learned, how, and what went wrong."""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

import numpy as np

from tbptt.report.figure import Axis, View, lines, marks, of_views, shortened
from tbptt.report.log import Columns, RunLog
from tbptt.report.page import Page, Section
from tbptt.report.run_parts import UPDATES, boundaries, lag_curves, lengths, speed, state, words
from tbptt.report.series import MOST_POINTS, Series, moving_mean, paired, running_time
from tbptt.report.table import Table

__all__ = ["Clock", "alarms", "best_validation", "run_page", "smoothed_loss"]

_SHOWN_ELSEWHERE = {"update", "validation", "stability", "length", "lags", "alarm", "timing"}


class Clock:
    """When each update was made, by the lines of timing.jsonl between which it lies.

    Args:
        timing: those lines.
    """

    def __init__(self, timing: Columns) -> None:
        found = timing.series("update", "elapsed_s").finite
        self._times = running_time(found.x, found.y)
        self.total_s = float(self._times.y[-1])
        size, self.unit = next(
            each for each in ((3600.0, "hours"), (60.0, "minutes"), (0.0, "seconds")) if self.total_s >= 2 * each[0]
        )
        self._size = size or 1.0

    def __bool__(self) -> bool:
        return len(self._times) > 1

    def against(self, series: Series) -> Series:
        """Return what was measured by update against the time, without what came after the last line of times."""
        timed = series.where(series.x <= self._times.x[-1])
        return Series(np.interp(timed.x, self._times.x, self._times.y) / self._size, timed.y)


def run_page(log: RunLog) -> Page:
    """Return the page of a run, from what `read_run` found."""
    clock = Clock(log.lines("timing"))
    sections = [
        _alarms(log),
        _losses(log, clock),
        _validation(log),
        _gradients(log),
        lengths(log),
        boundaries(log),
        lag_curves(log),
        state(log),
        speed(log),
        _configuration(log),
        _others(log),
    ]
    notes = list(log.notes)
    longest = max((len(columns) for columns in log.kinds.values()), default=0)
    if longest > MOST_POINTS:
        notes.append(
            f"Of long lines, figures draw the lowest and the highest value of each stretch, {MOST_POINTS:,} points in "
            f"all; the longest has {longest:,}. The Parquet files have every line."
        )
    return Page(
        f"Run {log.path.absolute().name}", summary(log, clock), [each for each in sections if each is not None], notes
    )


def summary(log: RunLog, clock: Clock) -> str:
    """Return what a person asks first, in sentences."""
    updates, said = log.lines("update"), list[str]()
    best, losses, last = best_validation(log), smoothed_loss(log), updates.last("update")
    if best is not None:
        at, value = best
        said.append(f"The best validation loss is {value:.5g}, at update {at:,} of {last or at:,} made so far.")
    if len(losses):
        said.append(f"The training loss went from {losses.y[0]:.5g} to {losses.y[-1]:.5g}, smoothed.")
    if not said:
        said.append("Nothing was learned that could be shown: there is no finite loss yet.")
    elif best is None:
        said.append(f"{last or 0:,} updates were made; there is no validation to judge them by.")
    found = alarms(log)
    if found:
        said.append(f"There {'was an alarm' if len(found) == 1 else 'were alarms'}: {', '.join(map(words, found))}.")
    elif len(log.lines("stability")):
        said.append("There was no alarm.")
    broken = sum(not np.isfinite(value) for value in updates.series("update", "loss").y.tolist())
    if broken:
        said.append(f"{broken:,} of {len(updates):,} lines have a loss that is not finite.")
    lookback = updates.last("lookback")
    if lookback is not None:
        said.append(f"Gradients went {lookback} steps back at the last update.")
    rate = log.lines("timing").last("lane_steps_per_s")
    if clock and rate is not None:
        said.append(f"It took {_duration(clock.total_s)}, at {rate:,.0f} steps a second over all lanes in the end.")
    return " ".join(said)


def best_validation(log: RunLog) -> tuple[int, float] | None:
    """Return the update with the lowest finite validation loss, and that loss."""
    found = log.lines("validation").series("update", "loss").finite
    if not len(found):
        return None
    index = int(found.y.argmin())
    return int(found.x[index]), float(found.y[index])


def smoothed_loss(log: RunLog) -> Series:
    """Return the training loss, each point the mean of those around it: a fiftieth of all."""
    losses = log.lines("update").series("update", "loss")
    return moving_mean(losses, max(3, len(losses) // 50))


def alarms(log: RunLog) -> dict[str, list[tuple[Any, str, str]]]:
    """Return the alarms by name: update, message and fix of each."""
    columns = log.lines("alarm").columns
    found: dict[str, list[tuple[Any, str, str]]] = {}
    for index in range(len(log.lines("alarm"))):
        update, name, message, fix = (
            columns[key][index] if key in columns else None for key in ("update", "name", "message", "fix")
        )
        found.setdefault(str(name or "alarm"), []).append((update, str(message or ""), str(fix or "")))
    return found


def _alarms(log: RunLog) -> Section | None:
    found = alarms(log)
    if not found:
        return None
    items: list[str] = []
    for name, each in found.items():
        update, message, fix = each[0]
        more = f", and {len(each) - 1:,} more times" if len(each) > 1 else ""
        todo = f"<br>What to do: <code>{html.escape(fix)}</code>" if fix else ""
        items.append(
            f"<li><strong>{html.escape(words(name))}</strong>, first at update {html.escape(str(update))}{more}. "
            f"{html.escape(message)}{todo}</li>"
        )
    table = Table("alarms", log.lines("alarm").columns, "All alarms")
    return Section("Alarms", tables=[table], html=f'<ul class="alarms">{"".join(items)}</ul>')


def _losses(log: RunLog, clock: Clock) -> Section | None:
    updates, validations = log.lines("update"), log.lines("validation")
    raw, smoothed = updates.series("update", "loss"), smoothed_loss(log)
    held_out = validations.series("update", "loss")
    views: list[View] = []
    for label, axis in (("by updates", UPDATES), ("by time", Axis(f"time, {clock.unit}", from_zero=True))):
        if not (label == "by updates" or clock):
            continue
        drawn = [each if label == "by updates" else clock.against(each) for each in (raw, smoothed, held_out)]
        traces = lines("training, as logged", drawn[0], 5, line={"color": "#555555", "width": 1}, opacity=0.5)
        traces += lines("training, smoothed", drawn[1], 0)
        traces += lines("validation", drawn[2], 1, mode="lines+markers")
        raised = paired(log.lines("alarm").columns.get("update", []), [1.0] * len(log.lines("alarm")))
        times = raised if label == "by updates" else clock.against(raised)
        if len(times):
            traces.append(marks("alarm", times.x, 1.0, "triangle-down", 3))
        views.append(View(label, traces, axis, Axis("loss")))
    if not len(raw) and not len(held_out):
        return Section("Loss", "No loss has been logged yet.")
    width = max(3, len(raw) // 50)
    text = (
        f"Each logged loss is the mean over the targets since the line before; smoothed is the mean of {width} lines "
        "around each."
    )
    if clock:
        text += (
            " The time is that of the work, without pauses between processes; between the lines of timing.jsonl it is "
            "interpolated, after the last of them it is not known."
        )
    alarm = "A triangle at the top is an alarm." if len(log.lines("alarm")) else ""
    figure = of_views("Training and validation loss", alarm, views)
    return Section("Loss", text, [figure], [Table("updates", updates.columns, "Lines of updates")])


def _validation(log: RunLog) -> Section | None:
    found = log.lines("validation")
    views = [
        View(
            words(name),
            lines(name, series, 1, mode="lines+markers"),
            UPDATES,
            Axis(shortened(words(name)), from_zero=len(series.finite) == 1),
        )
        for name in found.columns
        if name not in ("kind", "update", "targets") and len(series := found.series("update", name))
    ]
    if not views:
        return None
    figure = of_views("Metrics", "What was measured on the held-out data.", views)
    return Section("Validation", figures=[figure], tables=[Table("validation", found.columns, "Validations")])


def _gradients(log: RunLog) -> Section | None:
    updates = log.lines("update")
    norms, rates = updates.series("update", "gradient_norm"), updates.series("update", "learning_rate")
    views: list[View] = []
    if len(norms):
        traces = lines("gradient norm", norms, 0, log_y=True)
        refused = updates.series("update", "refused")
        if refused.y.any():
            traces.append(marks("line with refused updates", refused.x[refused.y > 0], 1.0, "x", 1))
        views.append(View("gradient norm", traces, UPDATES, Axis("gradient norm", "log")))
    if len(rates):
        views.append(View("learning rate", lines("learning rate", rates, 2), UPDATES, Axis("learning rate")))
    if not views:
        return None
    text = (
        "The norm over all parameters before clipping, of the last update of each line; the learning rate of the first "
        "group."
    )
    return Section("Gradient", figures=[of_views("Gradient norm and learning rate", text, views)])


def _configuration(log: RunLog) -> Section | None:
    if not log.settings:
        return None
    columns = {"setting": list(log.settings), "value": [str(value) for value in log.settings.values()]}
    text = f"As tbptt {log.version} resolved it." if log.version else ""
    return Section("Configuration", text, tables=[Table("configuration", columns, "Settings", folded=False)])


def _others(log: RunLog) -> Section | None:
    """Return the lines of kinds that this version does not know: newer ones, or a program's own."""
    others = {kind: columns for kind, columns in log.kinds.items() if kind not in _SHOWN_ELSEWHERE}
    if not others:
        return None
    counts = Counter({kind: len(columns) for kind, columns in others.items()})
    text = f"Lines of other kinds: {', '.join(f'{kind} ({count:,})' for kind, count in counts.items())}."
    return Section(
        "Other lines", text, tables=[Table(f"lines_{kind}", each.columns, kind) for kind, each in others.items()]
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.3g} s"
