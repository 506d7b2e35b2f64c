"""Refuse gradients that are not numbers."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

from tbptt.errors import ConfigError, NonFiniteError
from tbptt.estimators.base import Estimate
from tbptt.estimators.gradients import numbers_of
from tbptt.guards.base import Guard

__all__ = ["NonFinite"]

_SHOWN = 3  # parameters that an error names


class NonFinite(Guard):
    """Stop at gradients that hold NaN or infinity, or leave those updates out.

    One such gradient makes every weight it touches NaN for good, and no later guard can undo it. "raise" is
    for finding the fault; "skip" for long runs in which a rare overflow is known and harmless. Nothing is
    ever replaced by a number.

    Put it before clipping. Adds the metric `gradient_norm`.

    Args:
        action: "raise" stops the training; "skip" refuses the update and goes on from the last good state.
        limit: the number of updates in a row that "skip" may refuse, 1 or more; at the next it raises.

    Raises:
        ConfigError: another action, or a limit below 1.
        NonFiniteError: when called with gradients that are not finite, as `action` says.

    Exactness: exact: what passes is unchanged. Finite gradients whose norm overflows do pass. Allowed with unbiased
        estimators: "skip" chooses between an estimate and none, not between large and small ones. Whoever needs their
        mean to the last digit takes "raise", as an overflow is a large estimate that could not be written down.
    Cost: O(P) reads and one number compared.
    """

    def __init__(self, action: Literal["raise", "skip"] = "raise", limit: int = 10) -> None:
        chosen, most = cast("tuple[object, object]", (action, limit))  # whatever an unchecked caller gave
        if chosen not in ("raise", "skip"):
            raise ConfigError(
                f'action was expected to be "raise" or "skip", but is {chosen!r}: it decides whether training stops',
                fix='NonFinite("skip")',
            )
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ConfigError(
                f"limit was expected to be a whole number of updates, 1 or more, but is {most!r}: without "
                "one, a "
                "model that is lost would go on without learning",
                fix='NonFinite("skip", limit=10), or NonFinite("raise") to tolerate none',
            )
        self.action = action
        self.limit = limit
        self._num_refused = 0  # in a row

    def __call__(self, estimate: Estimate) -> Estimate | None:
        """Return the estimate if it is finite; None to leave the update out."""
        gradients = estimate.all_gradients
        if not estimate.num_injected or not gradients:
            return estimate
        # One number tells for all: the norm is finite only if every element is.
        norm = _norm(list(gradients.values()))
        faulty = [] if math.isfinite(norm) else _faulty(gradients)
        if not faulty:
            self._num_refused = 0
            # A norm that has overflowed is no measurement; whoever clips will measure it in float64.
            known = "gradient_norm" in estimate.metrics or not math.isfinite(norm)
            return estimate if known else estimate.with_gradients(gradients, gradient_norm=norm)
        if self.action == "skip" and self._num_refused < self.limit:
            self._num_refused += 1
            return None
        raise self._error(estimate, faulty)

    def _error(self, estimate: Estimate, faulty: list[str]) -> NonFiniteError:
        shown = ", ".join(map(repr, faulty[:_SHOWN])) + (", ..." if len(faulty) > _SHOWN else "")
        came = f"{len(faulty)} of {len(estimate.all_gradients)} parameters have NaN or infinity in theirs: {shown}"
        if bool(torch.isfinite(estimate.loss)):
            where = f"the loss itself is finite ({estimate.loss.item():.6g}), so it arose on the way back"
        else:
            where = f"the loss is {estimate.loss.item()} already, so it arose on the way forward, or in the data"
        if self.action == "skip":
            raise_because = f"{self.limit} updates in a row were refused before this one: nothing is being learned"
            fix = "lower the learning rate and resume; if the data hold NaN, mask those steps out"
        else:
            raise_because = "one update with it would make these weights NaN for good"
            fix = 'NonFinite("skip") leaves such updates out; ClipNorm(1.0) after it may prevent them'
        return NonFiniteError(f"finite gradients were expected, but {came}; {where}; {raise_because}", fix=fix)

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates in a row were refused."""
        return {"num_refused": self._num_refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._num_refused = int(state["num_refused"])


def _norm(gradients: list[Tensor]) -> float:
    norms = torch._foreach_norm([numbers_of(each) for each in gradients])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    if all(norm.device.type == "cpu" for norm in norms):
        return math.hypot(*[norm.item() for norm in norms])  # a third of the time of torch's own for a few parameters
    return torch.linalg.vector_norm(torch.stack([norm.to(gradients[0].device) for norm in norms])).item()


def _faulty(gradients: dict[str, Tensor]) -> list[str]:
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(numbers_of(gradient)).all())]
