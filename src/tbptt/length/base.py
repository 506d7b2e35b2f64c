"""What every length policy is, and how far one has come."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from torch.optim import Optimizer

from tbptt.errors import ConfigError

__all__ = [
    "Length",
    "LengthState",
    "RateScaling",
    "States",
    "check_scaling",
    "check_seed",
    "check_whole",
    "is_whole",
    "scaled",
    "scaled_rate",
    "states_from",
]

RateScaling: TypeAlias = Literal["none", "linear", "sqrt"]


@dataclass(frozen=True)
class LengthState:
    """How far a policy has come.

    Args:
        updates: made with it.
        length: the length now, unrounded; of `Adaptive` only, as all below.
        norms: the running mean of the curve, at the lags of `Adaptive.lags`; empty before the first probe.
        weights: likewise of the parameters' gradient; see `tbptt.estimators.probe.Probe`.
        missed: running mean of the share of that gradient that the look-back asked for leaves out.
        probes: made.
        waited: updates since the last probe.
        worked: steps run forward and back since then.
        stage: of a `Curriculum`, from 0; its own, as those below.
        staged: updates made in this stage.
        loss: running mean of the loss in it; None before its first update, or where none is asked for.
    """

    updates: int = 0
    length: float = 0.0
    norms: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    missed: float = 0.0
    probes: int = 0
    waited: int = 0
    worked: int = 0
    stage: int = 0
    staged: int = 0
    loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> LengthState:
        """Return what `state_dict` described."""
        curves = {name: tuple(state[name]) for name in ("norms", "weights") if name in state}
        values: dict[str, Any] = dict(state) | curves
        return LengthState(**values)


States: TypeAlias = dict[str, LengthState]
"""How far each policy has come, by the name of its length; nothing for a number."""


def states_from(saved: Mapping[str, Mapping[str, Any]]) -> States:
    """Return the states that were saved, each by `LengthState.state_dict`."""
    return {name: LengthState.from_state_dict(each) for name, each in saved.items()}


class Length(ABC):
    """A length in steps that may change from update to update."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """The longest it will ever be: what memory has to be there for."""

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The shortest it will ever be."""

    @property
    def unit(self) -> int:
        """A number of steps that every length is a multiple of; 1 unless a policy knows better."""
        return 1

    def start(self) -> LengthState:
        """Return the state before the first update."""
        return LengthState()

    @abstractmethod
    def now(self, state: LengthState) -> int:
        """Return the length of the next update, in steps."""

    def after(self, state: LengthState, steps: int) -> LengthState:
        """Return the state after an update that ran `steps` steps forward and back."""
        return replace(state, updates=state.updates + 1, waited=state.waited + 1, worked=state.worked + steps)

    @property
    def asks_for_loss(self) -> bool:
        """Whether `learned` wants the loss of each update, which on a GPU has to be waited for."""
        return False

    def learned(self, state: LengthState, loss: float | None = None) -> LengthState:
        """Return the state after an update was learned from.

        Args:
            state: that `after` returned for it.
            loss: of its window, where the policy asks for it.
        """
        del loss  # the same whatever it is, unless a policy says otherwise
        return state

    def rate(self, length: int) -> float:
        """Return what the learning rate is multiplied by when the length is `length`."""
        del length  # the same for all, unless a policy says otherwise
        return 1.0


@contextmanager
def scaled_rate(optimizer: Optimizer, factor: float) -> Generator[None]:
    """Multiply the learning rate of all groups inside the block; for `estimate.rate_factor` in a loop of one's own.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> with scaled_rate(sgd, 2.0):
        ...     print(sgd.param_groups[0]["lr"])
        1.0
    """
    if factor == 1.0:
        yield
        return
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate


def scaled(ratio: float, how: RateScaling) -> float:
    """Return the factor of the learning rate for a length that is `ratio` times the usual one."""
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[how]


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number, numpy's own included."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_whole(owner: object, name: str, fix: str) -> None:
    """Refuse a field that is not a whole number from 1; numpy's become Python's."""
    value: Any = getattr(owner, name)
    if not is_whole(value) or value < 1:
        raise ConfigError(
            f"{name} of {type(owner).__name__} was expected to be a whole number, at least 1, but is {value!r}", fix=fix
        )
    object.__setattr__(owner, name, int(value))


def check_seed(owner: Any, fix: str = "seed=0") -> None:
    """Refuse a field `seed` that is not a whole number from 0; numpy's become Python's."""
    if not is_whole(owner.seed) or owner.seed < 0:
        raise ConfigError(f"a seed was expected, a whole number from 0, but {owner.seed!r} came", fix=fix)
    object.__setattr__(owner, "seed", int(owner.seed))


def check_scaling(how: object) -> None:
    """Refuse what is no scaling of the learning rate."""
    if how not in ("none", "linear", "sqrt"):
        raise ConfigError(
            f'scale_rate was expected to be "none", "linear" or "sqrt", but is {how!r}', fix='scale_rate="none"'
        )
