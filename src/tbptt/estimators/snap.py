"""Sparse n-step approximation: the influence on those numbers of the state alone that a weight reaches in n steps.

Letters: B lanes, S numbers of a lane's state, P parameters that the state depends on, K numbers that one of them
reaches at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from tbptt.estimators.forward_mode import CarriedInfluence, Influence, check_size
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.sparsity import Reached, coloured, probe, seeds_of
from tbptt.length.base import check_whole
from tbptt.tree import LaneDims
from tbptt.window import Window

__all__ = ["SnAp"]


@final
@dataclass(frozen=True)
class SnAp(CarriedInfluence):
    """Carry the influence of each weight on those numbers of the state alone that it reaches in n steps.

    J <- M (D J + I), step by step, where M holds what a weight reaches in n steps at most: with n = 1 the unit that a
    weight belongs to, all numbers of it for an LSTM. What goes round by other units is left out, unless n reaches it;
    with all reached it is `RTRL`, and for a dense network n = 2 reaches all. What reaches what is found out by
    derivatives at random states and inputs, when training begins.

    For sparse networks, and as a first step beyond truncation: n = 1 goes any number of steps back, along each unit
    alone.

    Args:
        k1: steps of a window, at least 1. Losses go back within the window exactly; the influence is brought on step by
            step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        n: steps, at least 1.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased, by what goes round by numbers that are not reached; M is applied after the gradient is made,
        which is a step more exact than the published form (tests/estimators/test_forward_mode.py).
    Cost: a step forward and back, C times back more for I and C' times for D, in B K P numbers, K being how many
        numbers a weight reaches at most. C and C' are 1 where each weight, and each number, reaches one other; C' is S
        for a dense network. Numbers that do not meet are pulled back together (Curtis, Powell & Reid 1974).
    Reference: Menick et al. (2021), arXiv:2006.07232.

    Example:
        >>> import tbptt
        >>> model, stream = torch.nn.GRU(1, 4), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 4), lanes=2)
        >>> estimator = SnAp(n=1)
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(1):
        ...     estimate, carry = estimator.estimate(model, torch.nn.MSELoss(), carry, window)
        >>> carry.influence["influence"].shape  # lanes, numbers reached, numbers of all weights
        torch.Size([2, 1, 84])
    """

    n: int = 1

    kind: ClassVar[str] = "biased"
    stepwise: ClassVar[bool] = True

    @classmethod
    def examples(cls) -> tuple[SnAp, ...]:
        """Return one step and two, in windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(n=2), cls(k1=4)

    def __post_init__(self) -> None:
        CarriedInfluence.__post_init__(self)
        check_whole(self, "n", "SnAp(n=1)")

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """Find out what reaches what."""
        pattern = probe(model, window, dims)
        table = Reached.of(pattern.reached(self.n))
        own, state = torch.cat(list(pattern.weights.values()), 1), pattern.state.float()
        return {
            "rows": table.rows,
            "known": table.known,
            "sizes": table.sizes,
            "own": torch.gather(own, 0, table.rows) & table.known,
            "weight_groups": coloured(own.float() @ own.float().T > 0),
            "state": pattern.state,
            "state_groups": coloured(state @ state.T > 0),
        }

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return what arrives at the numbers that a weight reaches, times the influence on them."""
        table = Reached(influence["rows"], influence["known"], influence["sizes"])
        total = sum(
            (arrived[:, rows].to(each.dtype) * each).sum(0)
            for rows, each in zip(table.rows, influence["influence"].unbind(1), strict=True)
        )
        assert isinstance(total, Tensor)
        return table.split(total)

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return D J + I where a weight reaches, nothing elsewhere."""
        del draws  # nothing is drawn
        end = segment.end
        lanes, most = len(end), len(influence["rows"])
        check_size(
            lanes * influence["rows"].numel(),
            f"the influences of {influence['rows'].shape[1]} weights on {most} numbers each of {lanes} lanes' states",
            "a smaller n; or UORO(k1), which keeps a sum of two vectors instead",
        )
        news = self._own(influence, segment)
        before = influence.get("influence")
        if before is not None and segment.segment.start is not None:
            news = news + self._moved(influence, segment, before)
        return influence | {"influence": news}

    def _own(self, influence: Influence, segment: LaneSegment) -> Tensor:
        """Return I where a weight reaches. Shape (B, K, P)."""
        groups: list[list[int]] = influence["weight_groups"]
        found, _ = segment.jacobians(seeds_of(groups, segment.end))
        like = next(iter(found.values()), segment.end)
        sizes: dict[str, int] = influence["sizes"]
        missing = {
            name: like.new_zeros(len(like), len(groups), size) for name, size in sizes.items() if name not in found
        }
        joined = torch.cat([found.get(name, missing.get(name, like)) for name in sizes], 2)
        colour = _colours(groups, segment.end)[influence["rows"]]  # (K, P)
        picked = torch.gather(joined, 1, colour.expand(len(joined), *colour.shape))
        return torch.where(influence["own"], picked, 0.0)

    def _moved(self, influence: Influence, segment: LaneSegment, before: Tensor) -> Tensor:
        """Return D J where a weight reaches. Shape (B, K, P)."""
        groups: list[list[int]] = influence["state_groups"]
        seeds = seeds_of(groups, segment.end)
        found = [segment.pulled(seed, weights=False)[1] for seed in seeds]
        jacobian = torch.stack([each for each in found if each is not None], 1).to(before.dtype)  # (B, colours, S)
        full = jacobian[:, _colours(groups, segment.end)] * influence["state"]  # (B, S, S)
        rows, known, size = influence["rows"], influence["known"], segment.end.shape[1]
        if len(rows) ** 2 > size:  # dense products are faster than so many picked ones
            return _through_all(full, before, rows, known)
        moved: list[Tensor] = []
        for to, there in zip(rows, known, strict=True):
            parts = (full[:, to, at] * each for at, each in zip(rows, before.unbind(1), strict=True))
            moved.append(torch.where(there, sum(parts), 0.0))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return torch.stack(moved, 1)


def _through_all(jacobian: Tensor, before: Tensor, rows: Tensor, known: Tensor) -> Tensor:
    """Return the same by way of all numbers of the state."""
    lanes, size = jacobian.shape[:2]
    where = rows.expand(lanes, *rows.shape)
    full = before.new_zeros(lanes, size, rows.shape[1]).scatter_add(1, where, before * known)
    return torch.where(known, torch.gather(torch.bmm(jacobian, full), 1, where), 0.0)


def _colours(groups: list[list[int]], like: Tensor) -> Tensor:
    """Return the group of each number of the state. Shape (S,)."""
    found = torch.empty(like.shape[1], dtype=torch.int64, device=like.device)
    for colour, group in enumerate(groups):
        found[group] = colour
    return found
