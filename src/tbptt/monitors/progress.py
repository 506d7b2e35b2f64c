"""A live display of a run for people, on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO, cast

from tbptt.errors import ConfigError
from tbptt.monitors.base import Monitor, Plan, Update, Validation
from tbptt.monitors.readings import LossSum

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Progress"]

_REDRAW_S = 0.25  # faster than this nobody reads
_LINE_S = 5.0  # between plain lines, which stay in the log for ever
_SMOOTHING = 0.3  # weight of the newest rate


class Progress(Monitor):
    """Show where a run is: loss, tokens/s, gradient norm, look-back, updates, time left, last validation.

    On a terminal, a bar that redraws in place; anywhere else, one plain line every few seconds. The loss is
    sum / count since the last time it was shown; tokens/s are steps times lanes. NO_COLOR is respected.

    Args:
        console: a rich console to draw on; left out: stderr.
        updates: the number of updates at which the run ends, where the plan does not know it.
        every_s: seconds between two drawings, 0 or more; left out: 0.25 on a terminal, which is also the
            least there, and 5 for plain lines.

    Cost: a few Python additions an update; everything else only when it draws.
    """

    def __init__(
        self, console: Console | None = None, *, updates: int | None = None, every_s: float | None = None
    ) -> None:
        number = cast(object, 0.0 if every_s is None else every_s)  # from a caller without a type checker
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number < math.inf:
            raise ConfigError(
                f"every_s was expected to be a number of seconds, 0 or more, but is {every_s!r}: nothing "
                "would ever "
                "be shown",
                fix="Progress(every_s=5)",
            )
        self._given_console = console
        self._given_updates = updates
        self._given_every_s = every_s
        self._display: _Bar | _Lines | None = None
        self._every_s = _LINE_S
        self._plan = Plan(0, None, 1)
        self._begun_s = self._drawn_s = 0.0
        self._clear()

    def _clear(self) -> None:
        self._last: Update | None = None
        self._losses = LossSum()
        self._num_updates = self._lane_steps = 0
        self._num_refused = 0  # in the whole run, unlike the others
        self._update_rate = self._token_rate = math.nan
        self._loss = math.nan
        self._validation: Validation | None = None

    def begin(self, plan: Plan) -> None:
        """Take the terminal, if there is one."""
        self.end()
        self._clear()
        self._plan = plan if plan.updates is not None else replace(plan, updates=self._given_updates)
        self._begun_s = self._drawn_s = time.monotonic()
        console = self._given_console
        if console is None and _is_terminal(sys.stderr):
            from rich.console import Console

            console = Console(stderr=True)
        if console is not None and console.is_terminal:
            self._every_s = max(self._given_every_s or 0.0, _REDRAW_S)
            self._display = _Bar(console)
        else:
            self._every_s = _LINE_S if self._given_every_s is None else self._given_every_s
            self._display = _Lines(console.file if console is not None else sys.stderr)

    def update(self, update: Update) -> None:
        """Count one update, and draw if it is time."""
        self._last = update.to_keep()
        self._losses.add(update.estimate)
        self._num_updates += 1
        self._lane_steps += update.steps * update.lanes
        self._num_refused += update.refused
        if time.monotonic() - self._drawn_s >= self._every_s:
            self._draw()

    def validation(self, validation: Validation) -> None:
        """Keep the metrics in sight; as plain text, in a line of their own."""
        self._validation = validation
        if isinstance(self._display, _Lines):
            self.message(f"validation after update {validation.number}: {_named(validation.metrics)}")

    def message(self, text: str) -> None:
        """Print `text` above the bar."""
        console = self._given_console
        display = self._display or _Lines(sys.stderr if console is None else console.file)
        try:
            display.message(text)
        except (OSError, ValueError):
            self._release()

    def end(self) -> None:
        """Show the last numbers and give the terminal back, whatever happens."""
        try:
            if self._num_updates and self._display is not None:
                self._draw()
        finally:
            self._release()

    def _draw(self) -> None:
        now_s = time.monotonic()
        since_s = max(now_s - self._drawn_s, 1e-9)  # a coarse clock may not have moved
        loss = self._losses.mean()
        self._loss = math.nan if loss is None else loss
        self._update_rate = _smooth(self._update_rate, self._num_updates / since_s)
        self._token_rate = _smooth(self._token_rate, self._lane_steps / since_s)
        self._drawn_s = now_s
        self._losses = LossSum()
        self._num_updates = self._lane_steps = 0
        update, updates = self._last, self._plan.updates
        if update is None or self._display is None:
            return
        validation = "" if self._validation is None else f"validation  {_named(self._validation.metrics)}"
        share = update.number / updates if updates else None
        facts = self._facts(update, now_s)
        try:
            self._display.draw(facts, share, validation)
        except (OSError, ValueError):  # the terminal is gone, or its file closed: no reason to stop training
            self._release()

    def _release(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            try:
                display.close()
            except (OSError, ValueError):
                return  # nothing to give back

    def _facts(self, update: Update, now_s: float) -> list[str]:
        updates, norm = self._plan.updates, update.gradient_norm()
        facts = [
            f"update {update.number}/{updates}" if updates else f"update {update.number}",
            f"loss {self._loss:.4f}" if self._loss == self._loss else "loss nan",
            f"{_quantity(self._token_rate)} tokens/s",
            f"gradient norm {norm:.3g}" if norm is not None else "no gradient",
            f"look-back {update.estimate.lookback}",
        ]
        if self._num_refused:
            facts.append(f"{self._num_refused} refused")
        if updates and self._update_rate > 0:
            facts.append(f"{_duration(max(updates - update.number, 0) / self._update_rate)} left")
        else:
            facts.append(f"{_duration(now_s - self._begun_s)} gone")
        return facts


class _Lines:
    """One line a drawing, for logs."""

    def __init__(self, file: TextIO | Any) -> None:
        self._file = file

    def draw(self, facts: list[str], share: float | None, validation: str) -> None:
        del share, validation  # the first is in the facts, the second has had its own line
        self.message("  ".join(facts))

    def message(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def close(self) -> None:
        """There is nothing to give back."""


class _Bar:
    """A bar with two lines of text that are drawn in place."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        # No thread of its own: it draws when told. stdout is redirected only where it is the same terminal;
        # data that go to a file or a pipe must stay there.
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=_is_terminal(sys.stdout))
        self._live.start()

    def draw(self, facts: list[str], share: float | None, validation: str) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(expand=True)  # a group would put the text behind the bar, out of sight
        if share is not None:
            grid.add_row(ProgressBar(total=1.0, completed=min(share, 1.0)))
        grid.add_row(Text(" · ".join(facts)))
        if validation:
            grid.add_row(Text(validation))
        self._live.update(grid, refresh=True)

    def message(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()


def _is_terminal(file: TextIO | Any) -> bool:
    try:
        return bool(file.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no such stream, or closed
        return False


def _smooth(old: float, new: float) -> float:
    return new if math.isnan(old) else old + _SMOOTHING * (new - old)


def _named(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.5g}" for name, value in metrics.items())


def _quantity(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
