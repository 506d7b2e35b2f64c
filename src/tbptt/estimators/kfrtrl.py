"""Kronecker-factored real-time recurrent learning: influence as one Kronecker product, for one linear map a step.

Letters: B lanes, S numbers of a lane's state, m columns of the weights' matrix, P = S m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.forward_mode import CarriedInfluence, Influence
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.perlane import check_single_steps
from tbptt.estimators.random_products import balance, norms_of, signs
from tbptt.length.base import check_seed
from tbptt.tree import LaneDims
from tbptt.window import Window

__all__ = ["KFRTRL"]

_APART = 1e-3
"""The relative distance beyond which an influence is no Kronecker product: far above rounding."""


@final
@dataclass(frozen=True)
class KFRTRL(CarriedInfluence):
    """Carry the influence of the weights on the state as one random Kronecker product, the exact one in the mean.

    For a recurrence that is one linear map at each step, h' = phi(W (h, x, 1)): the influence of a step is a Kronecker
    product, I = a x diag(d) with a = (h, x, 1), and so is what is carried, J ~ u x A with u of the length of a and A a
    matrix of the state's size. u <- c1 p0 u + c2 p1 a, A <- c1 D A / p0 + c2 diag(d) / p1, with signs c1, c2 and p0 =
    (|D A| / |u|)^(1/2), p1 = (|d| / |a|)^(1/2), in each lane alone. Much less noise than `UORO`, as the noise is one
    sign a step for the whole matrix.

    Not recommended for states of more than a few hundred numbers, whose D costs as many backward passes; nor for LSTM
    and GRU, whose steps are more than one linear map, and which are refused.

    Args:
        k1: steps of a window, at least 1. Losses go back within the window exactly; the influence is brought on step by
            step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        seed: of the signs.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: unbiased at weights that stay (tests/estimators/test_random_influence.py). Weights that move leave an
        influence that is a mixture of what it was with those of then, as with `RTRL`. A weight that the state depends
        on in another way, such as an embedding before the recurrence, is refused.
    Cost: a step forward and S + 2 back; S^3 operations and S^2 + m numbers in each lane.
    Reference: Mujika, Meier & Steger (2018), arXiv:1805.10842.

    Example:
        >>> import tbptt
        >>> model, stream = torch.nn.RNN(1, 4), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 4), lanes=2)
        >>> estimator = KFRTRL()
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(1):
        ...     estimate, carry = estimator.estimate(model, torch.nn.MSELoss(), carry, window)
        >>> carry.influence["state"].shape
        torch.Size([2, 4, 4])
    """

    seed: int = 0

    kind: ClassVar[str] = "unbiased"
    stepwise: ClassVar[bool] = True

    @classmethod
    def examples(cls) -> tuple[KFRTRL, ...]:
        """Return windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4, seed=3)

    def __post_init__(self) -> None:
        CarriedInfluence.__post_init__(self)
        check_seed(self)

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Return nothing, for a model that can be run step by step."""
        del dims  # not needed yet
        check_single_steps(model, window.inputs)
        return {}

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return (q A)^T u^T, each weight its columns."""
        rows = torch.einsum("bs,bst->bt", arrived, influence["state"])
        return {name: (rows.T @ each).flatten() for name, each in influence["columns"].items()}

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return the two factors after a step."""
        slopes, columns = _factored(segment)
        news = torch.diag_embed(slopes)
        if not influence or segment.segment.start is None:
            return {"state": news, "columns": columns}
        moved = torch.bmm(segment.state_jacobian(), influence["state"])
        alive = (moved.flatten(1).norm(dim=1) > 0).to(
            moved.dtype
        )  # in a lane that starts anew nothing of before is left
        before: dict[str, Tensor] = {name: alive[:, None] * each for name, each in influence["columns"].items()}
        chance = signs((self.seed, draws), moved[:, 0, :1].expand(-1, 2))
        old = chance[:, 0] * balance(moved.flatten(1).norm(dim=1), norms_of(before, moved))
        new = chance[:, 1] * balance(slopes.norm(dim=1), norms_of(columns, moved))
        return {
            "state": moved / old[:, None, None] + news / new[:, None, None],
            "columns": {name: old[:, None] * before[name] + new[:, None] * each for name, each in columns.items()},
        }


def _factored(segment: LaneSegment) -> tuple[Tensor, dict[str, Tensor]]:
    """Return d, (B, S), and a, in the columns of each weight, (B, ...), for a step whose influence is their product.

    Raises:
        CapabilityError: it is none.
    """
    end = segment.end
    lanes, size = end.shape
    scale = 1.0 + torch.arange(size, dtype=end.dtype, device=end.device) / size  # tells units apart
    plain, _ = segment.pulled(torch.ones_like(end))
    other, _ = segment.pulled(scale.expand_as(end))
    for name, each in plain.items():
        value = segment.parameters[list(segment.names).index(name)]
        rows = each.view(lanes, value.shape[0] if value.ndim else 1, -1)
        if rows.shape[1] != size or not _near(other[name].view_as(rows), rows * scale[:, None]):
            raise _refusal(name, f"each row of {name} drives more than one number of the state, or another one")
    rows = {name: each.view(lanes, size, -1) for name, each in plain.items()}
    joined = torch.cat(list(rows.values()), 2)
    strongest = joined.norm(dim=1).argmax(1)
    slopes = joined[torch.arange(lanes, device=end.device), :, strongest]
    squares = slopes.square().sum(1, keepdim=True)
    known = squares > 0
    columns = {
        name: torch.where(known, torch.einsum("bs,bsm->bm", slopes, each) / torch.where(known, squares, 1.0), 0.0)
        for name, each in rows.items()
    }
    for name, each in rows.items():
        if not _near(each, slopes[:, :, None] * columns[name][:, None], joined):
            raise _refusal(name, "the influence of its step is no such product")
    return slopes, columns


def _near(found: Tensor, wanted: Tensor, scale: Tensor | None = None) -> bool:
    size = wanted.norm() if scale is None else scale.norm()
    return bool((found - wanted).norm() <= _APART * size)


def _refusal(name: str, why: str) -> CapabilityError:
    return CapabilityError(
        f"a recurrence of one linear map, h' = phi(W (h, x, 1)), was expected, as nn.RNN of one layer is, but {why}: "
        f"the influence of {name} cannot be carried as a Kronecker product",
        fix="UORO(k1), which takes any model; or freeze the weight; or RTRL(k1) for a small model",
    )
