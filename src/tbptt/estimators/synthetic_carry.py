"""What `SyntheticGradients` carries from window to window.

Letters: B lanes, S numbers of a lane's state, P parameters of the predictor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tbptt.estimators.carry import ChainCarry
from tbptt.tree import Tree, all_finite

__all__ = ["SyntheticCarry"]


@dataclass(eq=False)
class SyntheticCarry:
    """What `SyntheticGradients` carries.

    Attributes:
        chain: the model's state, and what is known of it.
        trace: what each weight of the predictor has done to the prediction for this state, through all predictions
            made before it. Shape (B, S, P); None for nothing, and without traces.
        owed: the gradients of windows without a target, by parameter: they wait for the next one with a target.
    """

    chain: ChainCarry
    trace: Tensor | None = None
    owed: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def state(self) -> Tree | None:
        """The model's state after the last window, detached; None before the first."""
        return self.chain.state

    @property
    def finite(self) -> bool:
        """Whether the state, the trace and what is owed are."""
        return self.chain.finite and all_finite([self.trace, self.owed])

    def state_dict(self) -> dict[str, Any]:
        """Return the carry as plain values and tensors."""
        return {"chain": self.chain.state_dict(), "trace": self.trace, "owed": dict(self.owed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ShapeError: it was saved with another number of lanes.
        """
        self.chain.load_state_dict(state["chain"])
        self.trace, self.owed = state["trace"], dict(state["owed"])
