"""Alarms: what goes wrong in a run, said once, with what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any, cast

from tbptt.errors import AlarmWarning, ConfigError
from tbptt.monitors.base import Alarm, Monitor, Plan, Update
from tbptt.monitors.lines import check_every
from tbptt.monitors.readings import LossSum, state_norm
from tbptt.monitors.watches import WATCHES, Drift, Explosion, Finding, Look, NonFiniteNumbers, Stalled, Vanishing, Watch

__all__ = ["KINDS", "Alarms"]

KINDS = tuple(watch.name for watch in WATCHES)
"""The names of all alarms."""

_COOL_DOWN = 1000  # updates between two alarms of a kind
_STALLED_BY = 0.001  # the relative improvement of the loss that counts
_FIRST_MARK = 100  # the update at which the state's norm is marked first


class Alarms(Monitor):
    """Watch a run, and say what goes wrong and what to do: as a warning, in `raised`, and in stability.jsonl.

    Each kind is said once when it begins, and again only when it was over in between and 1000 updates have passed
    since. `warnings.simplefilter("error", AlarmWarning)` stops the run at the first one, with a checkpoint. The
    trainer has one `Alarms()` that watches for all of these; one of your own among its monitors takes its place:

        explosion   (a) a gradient norm more than `explosion` times any level it has had, where no guard clips; the
                    level is a running geometric mean (the newest look weighs 0.05; it counts from the fifth look
                    on), and a norm which fell as the model learned, and rises to where it was, is no alarm.
                    (b) the running geometric mean of the norm at the farthest boundary over that at the newest is
                    more than `growth`: the gradient grows on its way back. (c) The running geometric mean of the
                    loss is three times what it was in the first five looks: the updates are too large.
        vanishing   that ratio has been below `vanishing` for `patience` updates: the last part of k2 is wasted, or
                    lanes are reset before it. The patience is for models that have not learned to look back yet.
        non_finite  NaN or infinity in the loss, in the gradient of an update that no guard refused, or in the state;
                    or more than a tenth of the latest updates were refused for it.
        stalled     the running mean of the loss (the newest look weighs 0.05) has not fallen by 0.1 % of its best for
                    `stalled` updates; nor is it below a thousandth of what it was at first, which is solved.
        drift       the norm of the carried state, marked at updates 100, 200, 400, ..., has grown by `drift` or more
                    in each of the last four doublings, or is 1000 times what it was at the first; and it is above 10. A
                    factor of 2 is a steady growth, 1.41 that of a random walk, 1 of what settles.

    What cannot be seen: explosion (b) and vanishing need two boundaries inside the look-back. There are such for
    k2 > k1 other than 2 k1, and none for k2 <= k1; one alone says nothing, for the gradient of a state and that of the
    weights are not in one unit. `LagCurves` sees every regime. How far beyond k2 the gradient would have gone is for
    `tbptt.horizon`. A spike between two looks is seen only where a guard measures every norm, as `NonFinite` and
    `ClipNorm` do. A stall may be the end of learning: an alarm is a question.

    Args:
        watch: the kinds to watch for; none: `watch=()`.
        every: updates between two looks, 1 or more.
        explosion: how many times the highest level, above 1. The default's origin: unclipped runs that learn well
            have single norms of up to 67 times (benchmarks/results/quality_alarms.json), with other seeds more.
        growth: how many times the newest boundary's, above 1; healthy runs stay below 1.
        vanishing: the share, above 0 and below 1. The default's origin: a hundredth of the relative bias of 0.1 with
            which `Adaptive` is content.
        patience: updates, 1 or more, that the look-back must have been wasted for.
        stalled: updates, 1 or more.
        drift: the factor from mark to mark, above 1; below the random walk's 1.41.

    Raises:
        ConfigError: a kind that there is not, or a threshold that cannot be meant.

    Attributes:
        raised: the alarms so far, those before a resume included.
        hearers: the monitors that are told, before the warning is issued; the trainer fills it with all others.

    Cost: for most updates a few Python additions; at a look some reductions of the state, and of the gradients where
        no guard measures them.
    """

    def __init__(
        self,
        *,
        watch: Collection[str] = KINDS,
        every: int = 10,
        explosion: float = 1000.0,
        growth: float = 100.0,
        vanishing: float = 1e-3,
        patience: int = 3000,
        stalled: int = 5000,
        drift: float = 1.3,
    ) -> None:
        unknown = sorted(set(watch) - set(KINDS))
        if unknown or isinstance(watch, str):
            raise ConfigError(
                f"kinds among {', '.join(KINDS)} were expected, but {', '.join(unknown) or watch!r} came: nobody would "
                "watch for it",
                fix='Alarms(watch=("explosion", "non_finite"))',
            )
        _check("explosion", explosion, 1.0, math.inf, "Alarms(explosion=1000.0)")
        _check("growth", growth, 1.0, math.inf, "Alarms(growth=100.0)")
        _check("vanishing", vanishing, 0.0, 1.0, "Alarms(vanishing=0.001)")
        _check("patience", patience, 0.0, math.inf, "Alarms(patience=3000)")
        _check("stalled", stalled, 0.0, math.inf, "Alarms(stalled=5000)")
        _check("drift", drift, 1.0, math.inf, "Alarms(drift=1.3)")
        self.every = check_every(every, "Alarms(every=10)")
        every_watch: list[Watch] = [
            Explosion(explosion, growth),
            Vanishing(vanishing, patience),
            NonFiniteNumbers(),
            Stalled(stalled, _STALLED_BY),
            Drift(drift, _FIRST_MARK),
        ]
        self.watches = [each for each in every_watch if each.name in watch]
        self.hearers: Sequence[Monitor] = ()
        self.raised: list[Alarm] = []
        self._active: set[str] = set()  # what has been said, and is not over
        self._clear()
        self._start = self.state_dict()

    def _clear(self) -> None:
        self._losses = LossSum()
        self._norms: list[float] = []
        self._num_updates = self._num_broken = 0

    def begin(self, plan: Plan) -> None:
        """Forget an earlier run, if this one begins anew."""
        if plan.update == 0:
            self.load_state_dict(self._start)

    def update(self, update: Update) -> None:
        """Count one update, and look if it is time."""
        estimate = update.estimate
        self._num_updates += 1
        if update.refused:
            norm = update.gradient_norm()
            sound = norm is not None and math.isfinite(norm) and math.isfinite(estimate.loss_sum.item())
            self._num_broken += not sound
        else:
            self._losses.add(estimate)
            if "gradient_norm" in estimate.metrics:
                self._norms.append(estimate.metrics["gradient_norm"])
        if update.number % self.every == 0 and self.watches:
            self._look(update)

    def _look(self, update: Update) -> None:
        estimate = update.estimate
        if not self._norms and update.applied:
            self._norms.append(estimate.gradient_norm().item())
        seen = Look(
            update=update,
            num_updates=self._num_updates,
            num_broken=self._num_broken,
            loss=self._losses.mean(),
            norms=tuple(self._norms),
            clipped="clip_scale" in estimate.metrics or "clipped_share" in estimate.metrics,
            boundary_norms=() if update.refused else tuple(estimate.boundary_norms.tolist()),
            state_norm=state_norm(update.state),
        )
        self._clear()
        news = [alarm for watch in self.watches if (alarm := self._alarm(watch, watch.look(seen), update.number))]
        self.raised += news
        for alarm in news:
            for hearer in self.hearers:
                hearer.alarm(alarm)
        for alarm in news:  # the last thing: it may be an error, for whoever has asked for that
            warnings.warn(str(alarm), AlarmWarning, stacklevel=4)

    def _alarm(self, watch: Watch, finding: Finding | None, number: int) -> Alarm | None:
        """Return a finding as an alarm, unless it has been said."""
        if finding is None:
            self._active.discard(watch.name)
            return None
        last = max((alarm.update for alarm in self.raised if alarm.name == watch.name), default=-_COOL_DOWN)
        if watch.name in self._active or number - last < _COOL_DOWN:
            return None
        self._active.add(watch.name)
        return Alarm(watch.name, number, finding.message, finding.fix)

    def state_dict(self) -> dict[str, Any]:
        """Return the alarms so far, what they have seen, and what has been seen since the last look."""
        return {
            "raised": [asdict(alarm) for alarm in self.raised],
            "active": sorted(self._active),
            "watches": {watch.name: watch.state_dict() for watch in self.watches},
            **self._losses.state_dict(),
            "norms": list(self._norms),
            "updates": self._num_updates,
            "broken": self._num_broken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state` was taken."""
        self.raised = [Alarm(**alarm) for alarm in state["raised"]]
        self._active = set(state["active"])
        for watch in self.watches:
            if watch.name in state["watches"]:
                watch.load_state_dict(state["watches"][watch.name])
        self._losses = LossSum.from_state_dict(state)
        self._norms = list(state["norms"])
        self._num_updates, self._num_broken = state["updates"], state["broken"]


def _check(name: str, value: float, least: float, most: float, fix: str) -> None:
    number = cast(object, value)  # whatever a caller without a type checker gave
    if not isinstance(number, int | float) or isinstance(number, bool) or not least < number < most:
        between = f"above {least:g}" + (f" and below {most:g}" if most < math.inf else "")
        raise ConfigError(
            f"{name} was expected to be a number {between}, but is {number!r}: the alarm would always ring, or never",
            fix=fix,
        )
