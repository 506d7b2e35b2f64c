"""Unbiased online recurrent optimization: influence as one product of two random vectors.

Letters: B lanes, S numbers of a lane's state, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from tbptt.errors import CapabilityError
from tbptt.estimators.forward_mode import CarriedInfluence, Influence
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.random_products import balance, norms_of, signs
from tbptt.length.base import check_seed

__all__ = ["UORO"]

_APART = 1e-2
"""The relative distance beyond which two ways to the same number differ by more than rounding."""


@final
@dataclass(frozen=True)
class UORO(CarriedInfluence):
    """Carry the influence of the weights on the state as one random product of two vectors, the exact one in the mean.

    J ~ s theta^T in each lane, with random signs nu for each window: s <- rho_0 D s + rho_1 nu, theta <- theta / rho_0
    + nu^T I / rho_1, and rho_0 = (|theta| / |D s|)^(1/2), rho_1 = (|nu^T I| / |nu|)^(1/2), which makes the noise least.
    Takes any model, at the cost of its weights; a window's own losses go back within it exactly, and only what came
    before is random.

    Not recommended where its noise, which grows with the size of the state, cannot be averaged away: take a learning
    rate some ten times below that of `RTRL`, many lanes, and longer windows.

    Args:
        k1: steps of a window, at least 1. The longer, the less noise.
        keep_outputs: whether estimates hold the window's outputs.
        seed: of the signs.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: unbiased at weights that stay (tests/estimators/test_random_influence.py), with a variance that is some
        ten to a hundred times the gradient's square for states of 10 to 100 numbers. While weights move, s and theta
        are mixtures of those of all weights there have been, as with `RTRL`.
    Cost: a window forward, twice back, and forward mode once, which is twice back more; S + P numbers in each lane,
        none shared among lanes.
    Reference: Tallec & Ollivier (2018), "Unbiased online recurrent optimization", arXiv:1702.05043; with windows, as in
        the authors' code, and the estimate made before the vectors move on.

    Example:
        >>> import tbptt
        >>> model, stream = torch.nn.GRU(1, 4), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 4), lanes=2)
        >>> estimator = UORO(k1=4)
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(4):
        ...     estimate, carry = estimator.estimate(model, torch.nn.MSELoss(), carry, window)
        >>> carry.influence["state"].shape
        torch.Size([2, 4])
    """

    seed: int = 0

    kind: ClassVar[str] = "unbiased"

    @classmethod
    def examples(cls) -> tuple[UORO, ...]:
        """Return windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4, seed=3)

    def __post_init__(self) -> None:
        CarriedInfluence.__post_init__(self)
        check_seed(self)

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return what arrives along the state's vector, times the weights' vector."""
        along = (arrived * influence["state"]).sum(1)
        return {name: along.to(each.dtype) @ each for name, each in influence["weights"].items()}

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return the two vectors after a segment, rho_0 f + rho_1 nu and theta / rho_0 + b / rho_1."""
        end = segment.end
        nu = signs((self.seed, draws), end)
        news, before = segment.pulled(nu)
        weights: dict[str, Tensor] = influence.get("weights", {})
        moved = torch.zeros_like(end)
        if weights and segment.segment.start is not None:
            moved = segment.pushed(influence["state"])
            assert before is not None
            _check_twice(nu, moved, before, influence["state"])
        alive = (moved.norm(dim=1) > 0).to(end.dtype)  # in a lane that starts anew nothing of before is left
        weights = {name: _scaled(each, alive) for name, each in weights.items()}
        rho_0 = balance(norms_of(weights, end), moved.norm(dim=1))
        rho_1 = balance(norms_of(news, end), nu.norm(dim=1))
        return {
            "state": rho_0[:, None] * moved + rho_1[:, None] * nu,
            "weights": _added(
                {name: _scaled(each, 1 / rho_0) for name, each in weights.items()},
                {name: _scaled(each, 1 / rho_1) for name, each in news.items()},
            ),
        }


def _check_twice(nu: Tensor, moved: Tensor, before: Tensor, state: Tensor) -> None:
    """See that nu (D s) is (nu D) s: D s is had by going back twice, which not every function of a user's can."""
    apart = ((nu * moved).sum(1) - (before * state).sum(1)).abs()
    if bool((apart > _APART * (before.norm(dim=1) * state.norm(dim=1) + nu.norm(dim=1) * moved.norm(dim=1))).any()):
        raise CapabilityError(
            "a model that can be differentiated twice was expected, but a function of it has a backward pass whose own "
            "derivative is another one, as where it calls autograd without create_graph: the influence brought on "
            "would be wrong",
            fix="torch.autograd.grad(..., create_graph=torch.is_grad_enabled()) in it; or TBPTT(k1, k2)",
        )


def _scaled(vectors: Tensor, factors: Tensor) -> Tensor:
    return vectors * factors[:, None].to(vectors.dtype)


def _added(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    both = {name: each + right[name] if name in right else each for name, each in left.items()}
    return both | {name: each for name, each in right.items() if name not in left}
