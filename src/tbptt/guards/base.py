"""What every guard does: it sees an estimate before the optimizer does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import nn

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate, Estimator
from tbptt.estimators.boundary import ClipBoundary

__all__ = ["Guard", "RollBack", "SnapshotPlan", "Start", "check_guards", "guarded"]

Start: TypeAlias = Literal["usual", "sequence", "gap"]
"""The state that a window was run from: that after the steps before it; the initial one, in all lanes; or that of
other steps, as those before it were left out."""


@dataclass(frozen=True)
class RollBack:
    """A guard's verdict that the update must not be made, and that the ones before it are not to be trusted either.

    Args:
        reason: what the guard has seen, for monitors to tell.
    """

    reason: str


@dataclass(frozen=True)
class SnapshotPlan:
    """How often a guard that goes back wants what there is to go back to.

    Args:
        every: updates between two snapshots, at least 1.
        keep: how many are kept, at least 2.
    """

    every: int
    keep: int


class Guard(ABC):
    """Looks at an estimate, and passes it on, changes it, or refuses it.

    A guard only judges. It holds settings, and what it remembers; going back is done by whoever runs the training.

    Attributes:
        changes_mean: whether what passes has another mean than what came. Refused with an unbiased estimator.
        allow_bias: that its owner knows so, and means it.
        snapshots: what a guard that may answer `RollBack` needs; None for all others.
    """

    changes_mean: ClassVar[bool] = False
    allow_bias: bool = False
    snapshots: SnapshotPlan | None = None

    @abstractmethod
    def __call__(self, estimate: Estimate) -> Estimate | RollBack | None:
        """Return the estimate to use; None to leave this update out; `RollBack` to go back as well."""

    def begin(self, model: nn.Module, loss: nn.Module | None = None) -> None:
        """Hear, before the first estimate, which model they are for, and which loss, where that is a module."""
        del model, loss  # most guards judge by the gradient alone

    def unsettle(self, start: Start) -> None:
        """Hear, before an estimate, that it was not made from the usual state."""
        del start  # most guards do not mind

    def went_back(self, state: dict[str, Any]) -> None:
        """Hear that the run has gone back to where `state_dict` returned `state`."""
        self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what the guard remembers; nothing unless it says otherwise."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        del state  # nothing is remembered


def guarded(estimate: Estimate, guards: Iterable[Guard], start: Start = "usual") -> Estimate | RollBack | None:
    """Return what the guards, one after the other, let pass; the first verdict that is no estimate ends it.

    Args:
        estimate: of a window.
        guards: in order.
        start: the state that the window was run from.
    """
    guards = list(guards)
    if start != "usual":
        for guard in guards:  # all of them, also where an earlier one lets nothing pass
            guard.unsettle(start)
    for guard in guards:
        verdict = guard(estimate)
        if not isinstance(verdict, Estimate):
            return verdict
        estimate = verdict
    return estimate


def check_guards(guards: Iterable[object], estimator: Estimator | None, *, no_roll_back: str = "") -> list[Guard]:
    """Return the guards, once they are known to fit the estimator and whoever runs them.

    Args:
        guards: as they were given.
        estimator: whose estimates they are to see; None: they fit some estimator, at most.
        no_roll_back: why going back cannot be done here; empty where it can.

    Raises:
        ConfigError: what is no guard; a guard that changes the mean of an unbiased estimator without being allowed to;
            one that goes back where that cannot be done, or two of them.
    """
    checked = [_checked(guard) for guard in guards]
    for guard in checked:
        _refuse_bias(guard, estimator)
    backing = [type(guard).__name__ for guard in checked if guard.snapshots is not None]
    if backing and no_roll_back:
        raise ConfigError(
            f"guards that judge one update at a time were expected, but {backing[0]} goes back: {no_roll_back}",
            fix="ZClip() in its place, or training with tbptt.Trainer",
        )
    if len(backing) > 1:
        raise ConfigError(
            f"at most one guard that goes back was expected, but {' and '.join(backing)} came: each would undo what "
            "the other has learned from",
            fix="one SpikeRollback(...) among the guards",
        )
    return checked


def _checked(guard: object) -> Guard:
    if isinstance(guard, Guard):
        return guard
    if isinstance(guard, ClipBoundary):
        raise ConfigError(
            f"guards were expected, but {guard} is none: it acts on the state's gradient on its way back, before there "
            "is an estimate to guard, and is given to the estimator",
            fix=f"TBPTT(k1=..., k2=..., boundary={guard})",
        )
    raise ConfigError(
        f"guards were expected, but {guard!r} came, which is none: it would not know how to judge an estimate",
        fix="guards=[NonFinite(), ClipNorm(1.0)]",
    )


def _refuse_bias(guard: Guard, estimator: Estimator | None) -> None:
    if estimator is None or estimator.kind != "unbiased" or not guard.changes_mean or guard.allow_bias:
        return
    name = type(guard).__name__
    raise ConfigError(
        f"guards that leave the mean alone were expected with {estimator}, which is unbiased, but {name} weakens or "
        "drops its large estimates: these rare ones balance the many small ones, and without them the mean that the "
        "estimator promises is lost",
        fix=f"leave {name} out and lower the learning rate; or {name}(..., allow_bias=True), in a run's file "
        "guards.allow_bias = true, if that is known and meant",
    )
