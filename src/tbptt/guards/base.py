"""What every guard does: it sees an estimate before the optimizer does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from tbptt.estimators.base import Estimate

__all__ = ["Guard", "guarded"]


class Guard(ABC):
    """Looks at an estimate, and passes it on, changes it, or refuses it."""

    @abstractmethod
    def __call__(self, estimate: Estimate) -> Estimate | None:
        """Return the estimate to use, or None to leave this update out."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the guard remembers; nothing unless it says otherwise."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        del state  # nothing is remembered


def guarded(estimate: Estimate, guards: Iterable[Guard]) -> Estimate | None:
    """Return what the guards, one after the other, let pass; None as soon as one refuses it."""
    for guard in guards:
        passed = guard(estimate)
        if passed is None:
            return None
        estimate = passed
    return estimate
