"""The five things that alarms watch for: each a rule over looks at the training, with the numbers it remembers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, final

from tbptt.monitors.base import Update
from tbptt.monitors.readings import Running

__all__ = ["WATCHES", "Drift", "Explosion", "Finding", "Look", "NonFiniteNumbers", "Stalled", "Vanishing", "Watch"]

_NEWEST = 0.05
"""The weight of the newest look in running levels: they follow within about twenty looks."""
_SETTLED = 5
"""Looks before a level says anything."""
_RISEN = 3.0
"""How many times what it was at first a loss must be to have risen: that of noisy data may double by itself."""
_LARGE = 10.0
"""The root mean square of a state's values from which on it may be too large."""


@dataclass(frozen=True)
class Look:
    """What was seen since the last look.

    Args:
        update: the newest one; its own numbers are those of a single update.
        num_updates: since the last look, those refused included.
        num_broken: of them, those refused whose loss or gradient was not finite.
        loss: sum / count over the updates that were not refused; None for no loss.
        norms: gradient norms of updates that were not refused, before clipping: of each where a guard measures them,
            of the newest alone where none does.
        clipped: whether a guard clips gradients.
        boundary_norms: of the newest update, newest boundary first.
        state_norm: after the newest update; None for a state without values.
    """

    update: Update
    num_updates: int
    num_broken: int
    loss: float | None
    norms: tuple[float, ...]
    clipped: bool
    boundary_norms: tuple[float, ...]
    state_norm: float | None

    @property
    def growth(self) -> float | None:
        """The norm at the farthest boundary over that at the newest; None with fewer than two, or nothing to divide."""
        norms = self.boundary_norms
        if len(norms) < 2 or not norms[0] or not all(map(math.isfinite, norms)):
            return None
        return norms[-1] / norms[0]


@dataclass(frozen=True)
class Finding:
    """What is wrong, why it matters, and what to do."""

    message: str
    fix: str


class Watch(ABC):
    """Watches for one thing."""

    name: ClassVar[str]

    @abstractmethod
    def look(self, seen: Look) -> Finding | None:
        """Return what is wrong, as long as it is."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers, as plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""


@final
class Explosion(Watch):
    """A gradient norm far above any level it has had, a gradient that grows on its way back, or a loss that has risen.

    Args:
        factor: how many times the highest level a norm must be.
        growth: how many times the norm at the newest boundary that at the farthest must be.
    """

    name = "explosion"

    def __init__(self, factor: float, growth: float) -> None:
        self.factor, self.growth = factor, growth
        self._level, self._growth, self._loss = Running(_NEWEST), Running(_NEWEST), Running(_NEWEST)  # of logarithms
        self._highest: float | None = None  # that the level of the norm has been, once settled
        self._first: float | None = None  # the level of the loss, once settled

    def look(self, seen: Look) -> Finding | None:
        """Compare norms with the highest level before them, boundaries with one another, the loss with the first."""
        highest, largest = self._highest, max(_logs(seen.norms), default=-math.inf)
        self._learn(seen)
        if self._growth.count >= _SETTLED and self._growth.mean > math.log(self.growth):
            return self._on_its_way_back(seen)
        if highest is not None and largest > highest + math.log(self.factor) and not seen.clipped:
            return Finding(
                f"a gradient norm near the highest level that it has had, {math.exp(highest):.3g}, was expected, but "
                f"one of {math.exp(largest):.3g} came within the last {seen.num_updates} updates: a single such update "
                "can undo all those before it",
                f'guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm({_round(2 * math.exp(highest))})]',
            )
        if self._first is not None and self._loss.mean > self._first + math.log(_RISEN):
            return Finding(
                f"a loss that falls was expected, but its level has risen from {math.exp(self._first):.4g} to "
                f"{math.exp(self._loss.mean):.4g}: the updates are larger than what they were computed for holds",
                f'a learning rate of {_round(seen.update.learning_rate / 10)}; guards=[tbptt.NonFinite("raise"), '
                "tbptt.ClipNorm(1.0)]",
            )
        return None

    def _learn(self, seen: Look) -> None:
        logs = _logs(seen.norms)
        if logs:
            self._level.add(sum(logs) / len(logs))
        if logs and self._level.count >= _SETTLED:
            self._highest = self._level.mean if self._highest is None else max(self._highest, self._level.mean)
        if seen.growth is not None:
            self._growth.add(_log(seen.growth, self.growth**-2))
        if seen.loss is not None and 0 < seen.loss < math.inf:
            self._loss.add(math.log(seen.loss))
        if self._first is None and self._loss.count >= _SETTLED:
            self._first = self._loss.mean

    def _on_its_way_back(self, seen: Look) -> Finding:
        times, num = math.exp(self._growth.mean), len(seen.boundary_norms)
        return Finding(
            "a gradient that shrinks, or keeps its size, on its way back was expected, but at the oldest of the "
            f"{num} boundaries of the look-back it is {times:.3g} times what it is at the newest: the most distant "
            "steps decide the update, and clipping it would leave nothing of the others",
            f"{_tbptt(seen.update, seen.update.estimate.lookback // 2)}, and a lower learning rate",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the levels."""
        return {
            "level": self._level.state_dict(),
            "growth": self._growth.state_dict(),
            "loss": self._loss.state_dict(),
            "highest": self._highest,
            "first": self._first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the levels."""
        self._level.load_state_dict(state["level"])
        self._growth.load_state_dict(state["growth"])
        self._loss.load_state_dict(state["loss"])
        self._highest, self._first = state["highest"], state["first"]


@final
class Vanishing(Watch):
    """A gradient of which next to nothing arrives at the end of the look-back.

    Args:
        share: of the norm at the newest boundary, below which that at the farthest counts as nothing.
        patience: updates of learning before it is said.
    """

    name = "vanishing"

    def __init__(self, share: float, patience: int) -> None:
        self.share, self.patience = share, patience
        self._growth = Running(_NEWEST)  # of its logarithm
        self._since: int | None = None  # the update at which the level fell below the share

    def look(self, seen: Look) -> Finding | None:
        """Compare the boundaries with one another."""
        if seen.growth is not None:
            self._growth.add(_log(seen.growth, self.share**2))
        number, lookback = seen.update.number, seen.update.estimate.lookback
        if self._growth.count < _SETTLED or self._growth.mean >= math.log(self.share):
            self._since = None
            return None
        self._since = number if self._since is None else self._since
        if number - self._since < self.patience:
            return None
        return Finding(
            "a gradient that reaches the end of the look-back was expected, but at the oldest of its "
            f"{len(seen.boundary_norms)} boundaries it is {math.exp(self._growth.mean):.1e} of what it is at the "
            f"newest, and has been for {number - self._since} updates: the last part of the {lookback} steps costs "
            "time and memory, and teaches nothing",
            f"{_tbptt(seen.update, f'tbptt.Adaptive(max={lookback})')}, or a shorter k2; tbptt.horizon tells which",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the level, and since when it has been too low."""
        return {"growth": self._growth.state_dict(), "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the level."""
        self._growth.load_state_dict(state["growth"])
        self._since = state["since"]


@final
class NonFiniteNumbers(Watch):
    """NaN or infinity in what was learned from or is carried on, or in more than a tenth of all updates.

    An update that a guard has refused is harmless as long as it is rare: whoever asked for it knows.
    """

    name = "non_finite"

    def __init__(self) -> None:
        self._broken = 0.0  # the share of updates refused for it, the newest ten weighing a fifth

    def look(self, seen: Look) -> Finding | None:
        """Look at loss, gradients and state."""
        self._broken += 0.2 * (seen.num_broken / seen.num_updates - self._broken)
        places = {
            "the loss": seen.loss is None or math.isfinite(seen.loss),
            "the gradient": all(map(math.isfinite, (*seen.norms, *seen.boundary_norms))),
            "the carried state": seen.state_norm is None or math.isfinite(seen.state_norm),
        }
        faulty = [place for place, sound in places.items() if not sound]
        if faulty:
            return Finding(
                f"finite numbers were expected, but NaN or infinity stands in {' and '.join(faulty)}, or in its norm: "
                "it spreads to all that it touches, and does not go away by itself",
                'guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)], and go on from the last checkpoint with a '
                f"learning rate of {_round(seen.update.learning_rate / 3)}",
            )
        if self._broken > 0.1:
            return Finding(
                f"a refused update was expected to be rare, but {self._broken:.0%} of the latest ones had a loss or a "
                "gradient that was not finite: what these windows hold is not learned",
                f"a learning rate of {_round(seen.update.learning_rate / 3)}; or mask=torch.isfinite(targets) in the "
                "stream, if it is the data",
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the share."""
        return {"broken": self._broken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the share."""
        self._broken = state["broken"]


@final
class Stalled(Watch):
    """A loss whose running mean does not fall any more.

    Args:
        updates: without an improvement, before it is said.
        least: the relative improvement of the running mean that counts.
    """

    name = "stalled"

    def __init__(self, updates: int, least: float) -> None:
        self.updates, self.least = updates, least
        self._mean = Running(_NEWEST)
        self._best: float | None = None
        self._first: float | None = None
        self._since = 0  # the update of the best mean

    def look(self, seen: Look) -> Finding | None:
        """Compare the running mean with the best it has been."""
        number = seen.update.number
        if seen.loss is not None and math.isfinite(seen.loss):
            self._mean.add(seen.loss)
        if self._mean.count < _SETTLED:
            return None
        mean = self._mean.mean
        first = self._first = mean if self._first is None else self._first
        if self._best is None or mean < self._best - self.least * abs(self._best):
            self._best, self._since = mean, number
        waited = number - self._since
        if waited < self.updates or 0 <= mean < 1e-3 * first:  # that is solved, not stalled
            return None
        return Finding(
            f"a loss that falls was expected, but its running mean, {mean:.4g}, has not come {self.least:.1%} below "
            f"{self._best:.4g} for {waited} updates: either that is all there is to learn, or what would help lies "
            "further back than the gradient goes, or the learning rate is wrong",
            f"{_tbptt(seen.update, 2 * seen.update.estimate.lookback)} if tbptt.horizon says so; or a learning rate of "
            f"{_round(seen.update.learning_rate / 3)}; or stop",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the means."""
        return {"mean": self._mean.state_dict(), "best": self._best, "first": self._first, "since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the means."""
        self._mean.load_state_dict(state["mean"])
        self._best, self._first, self._since = state["best"], state["first"], state["since"]


@final
class Drift(Watch):
    """A state that grows without end: by `factor` in each of four doublings of the run, or a thousandfold.

    Only a norm above 10 counts: the state of a model that learns to use it grows, too, to about 1.

    Args:
        factor: by which its norm grows from one mark to the next.
        first: the update of the first mark; the others stand at twice, four times, ... of it.
    """

    name = "drift"

    def __init__(self, factor: float, first: int) -> None:
        self.factor = factor
        self._norm = Running(2 * _NEWEST)
        self._marks: list[float] = []
        self._next = first
        self._grows = False

    def look(self, seen: Look) -> Finding | None:
        """Compare the norm with those at the marks."""
        norm, number = seen.state_norm, seen.update.number
        if norm is None or not math.isfinite(norm):
            return None
        self._norm.add(norm)
        if number >= self._next:
            self._marks.append(self._norm.mean)
            while self._next <= number:
                self._next *= 2
            recent = self._marks[-5:]
            grown = [b >= self.factor * a > 0 for a, b in pairwise(recent)]
            self._grows = len(grown) == 4 and all(grown) and recent[-1] > _LARGE
        if self._grows:
            course = ", ".join(f"{mark:.3g}" for mark in self._marks[-5:])
            return self._finding(f"it went {course} over the last four doublings of the number of updates")
        if self._marks and norm > 1000 * self._marks[0] and norm > _LARGE:
            return self._finding(f"it went from {self._marks[0]:.3g} to {norm:.3g}")
        return None

    def _finding(self, course: str) -> Finding:
        return Finding(
            f"a carried state whose size settles was expected, but {course}: it leaves what the model has learned "
            "on, and in the end the numbers that hold it",
            "Window.reset where a new sequence begins; a gated or normalised layer, such as torch.nn.GRU, in place of "
            "one that only adds; optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.01)",
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the marks."""
        return {
            "norm": self._norm.state_dict(),
            "marks": list(self._marks),
            "next": self._next,
            "grows": self._grows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the marks."""
        self._norm.load_state_dict(state["norm"])
        self._marks, self._next, self._grows = list(state["marks"]), state["next"], state["grows"]


WATCHES: tuple[type[Watch], ...] = (Explosion, Vanishing, NonFiniteNumbers, Stalled, Drift)
"""All of them."""


def _logs(norms: tuple[float, ...]) -> list[float]:
    return [math.log(norm) for norm in norms if 0 < norm < math.inf]


def _log(ratio: float, least: float) -> float:
    """Return the logarithm of a ratio; what is below `least`, as after a reset of all lanes, counts as that."""
    return math.log(max(ratio, least))


def _tbptt(update: Update, k2: int | str) -> str:
    return f"tbptt.TBPTT(k1={update.steps}, k2={max(k2, 1) if isinstance(k2, int) else k2})"


def _round(value: float) -> str:
    """Return a number to one digit, as it would be typed."""
    return f"{value:.1g}" if value < 10 else f"{float(f'{value:.1g}'):g}"
