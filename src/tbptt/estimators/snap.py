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
from tbptt.estimators.random_products import spread
from tbptt.estimators.sparsity import Pattern, Reached, coloured, probe, rounding, seeds_of, seen_in
from tbptt.length.base import check_whole
from tbptt.tree import LaneDims
from tbptt.window import Window

__all__ = ["SnAp"]

_ROUNDINGS = 64
"""How many roundings of the largest number two sums may lie apart that are the same."""
_PURPOSE = 0x534E4150
"""Keeps the random directions that the pattern is tested along apart from all else that is drawn."""


@final
@dataclass(frozen=True)
class SnAp(CarriedInfluence):
    """Carry the influence of each weight on those numbers of the state alone that it reaches in n steps.

    J <- M (D J + I), step by step, where M holds what a weight reaches in n steps at most: with n = 1 the unit that a
    weight belongs to, all numbers of it for an LSTM. What goes round by other units is left out, unless n reaches it;
    with all reached it is `RTRL`, and for a dense network n = 2 reaches all. A weight of the initial state belongs to
    the numbers that it sets there.

    What reaches what is looked for by derivatives at random states and inputs when training begins, and is tested at
    each step along a random direction. A dependence that shows for the first time, such as that on the embedding of a
    new symbol or on a unit that was off, is added to the pattern before the influence of that step is computed: M is of
    the dependences seen so far, and only grows. Influence that M had no place for earlier is not recovered.

    For sparse networks, and as a first step beyond truncation: n = 1 goes any number of steps back, along each unit
    alone.

    Args:
        k1: steps of a window, at least 1. Losses go back within the window exactly; the influence is brought on step by
            step all the same.
        keep_outputs: whether estimates hold the window's outputs.
        n: steps, at least 1.

    Raises:
        ConfigError: a setting that cannot be meant.

    Exactness: biased, by what goes round by numbers that are not reached, and `RTRL` where all are
        (tests/estimators/test_snap_pattern.py); M is applied after the gradient is made, which is a step more exact
        than the published form (tests/estimators/test_forward_mode.py).
    Cost: a step forward and back, C times back more for I, C' times for D and once for the test, in B K P numbers, K
        being how many numbers a weight reaches at most. C and C' are 1 where each weight, and each number, reaches one
        other; C' is S for a dense network. Numbers that do not meet are pulled back together (Curtis, Powell & Reid
        1974). 2 S times back more where something new shows, and where a lane begins from an initial state that is
        learned.
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
        """Find out what reaches what, as far as random states and inputs show it."""
        return self._laid_out(probe(model, window, dims), {})

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return what arrives at the numbers that a weight reaches, times the influence on them."""
        table, before = _table(influence), influence["influence"]
        total = before.new_zeros(before.shape[2])
        for rows, each in zip(table.rows, before.unbind(1), strict=True):
            total = total + (arrived[:, rows].to(each.dtype) * each).sum(0)
        return table.split(total)

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return D J + I where a weight reaches, nothing elsewhere; the pattern first grows by what the step shows."""
        _check(influence, segment)
        seed = spread((draws, _PURPOSE), segment.end.shape[1], segment.end).expand_as(segment.end)
        along, back = segment.pulled(seed)
        news, jacobian = _compressed(influence, segment)
        if _missed(influence, segment, seed[0], along, back, news, jacobian):
            begun = torch.ones(segment.lanes, dtype=torch.bool, device=seed.device) if back is None else ~back.any(1)
            known = _pattern(influence)
            grown = known.joined(*seen_in(segment, begun))
            if grown.count() > known.count():
                influence = self._laid_out(grown, influence)
                _check(influence, segment)
            single = [[index] for index in range(segment.end.shape[1])]
            news, jacobian = _picked(influence, segment, single, influence["known"])
        before = influence.get("influence")
        if before is not None and jacobian is not None:
            news = news + _moved(influence, jacobian, before)
        return influence | {"influence": news}

    def _laid_out(self, pattern: Pattern, before: Influence) -> Influence:
        """Return the tables of a pattern, and the influence that there is in them: none at places that are new."""
        state, size = pattern.state.float(), len(pattern.state)
        table = Reached.of(pattern.reached(self.n), size, state.device)
        conflicts = torch.zeros_like(state)
        for each in pattern.weights.values():
            conflicts += each.float() @ each.float().T
        found: Influence = {
            "rows": table.rows,
            "known": table.known,
            "sizes": table.sizes,
            "own": table.chosen(pattern.weights, size),
            "start": table.chosen(pattern.starts, size),
            "weight_groups": coloured(conflicts > 0),
            "state": pattern.state,
            "state_groups": coloured(state @ state.T > 0),
        }
        if "influence" in before:
            found["influence"] = _table(before).moved(before["influence"], table, size)
        return found


def _table(influence: Influence) -> Reached:
    return Reached(influence["rows"], influence["known"], influence["sizes"])


def _pattern(influence: Influence) -> Pattern:
    table, size = _table(influence), len(influence["state"])
    own, start = table.spread(influence["own"], size), table.spread(influence["start"], size)
    return Pattern(influence["state"], own, start)


def _check(influence: Influence, segment: LaneSegment) -> None:
    most, weights = influence["rows"].shape
    check_size(
        segment.lanes * most * weights,
        f"the influences of {weights} weights on {most} numbers each of {segment.lanes} lanes' states",
        "a smaller n; or UORO(k1), which keeps a sum of two vectors instead",
    )


def _compressed(influence: Influence, segment: LaneSegment) -> tuple[Tensor, Tensor | None]:
    """Return I where a weight reaches, (B, K, P), and D, (B, S, S), as the pattern says; None at the initial state."""
    groups: list[list[int]] = influence["weight_groups"]
    news, jacobian = _picked(influence, segment, groups, influence["own"])
    if influence["state_groups"] != groups and jacobian is not None:
        groups = influence["state_groups"]
        found = [segment.pulled(seed, weights=False)[1] for seed in seeds_of(groups, segment.end)]
        jacobian = torch.stack([each for each in found if each is not None], 1)[:, _colours(groups, segment.end)]
    return news, None if jacobian is None else jacobian * influence["state"]


def _picked(
    influence: Influence, segment: LaneSegment, groups: list[list[int]], mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return I at the places of a mask, (K, P), and what is pulled back to the start, each number that of its group.

    Args:
        influence: its tables.
        segment: the step.
        groups: of numbers of the state, pulled back together.
        mask: the places of the table where I is wanted.
    """
    end, sizes = segment.end, influence["sizes"]
    colours, starts = _colours(groups, end), list[Tensor]()
    wanted, news = colours[influence["rows"]], end.new_zeros(len(end), *mask.shape)
    for colour, seed in enumerate(seeds_of(groups, end)):
        found, start = segment.pulled(seed)
        parts = [found.get(name, end.new_zeros(len(end), size)) for name, size in sizes.items()]
        if parts:
            news = torch.where(mask & (wanted == colour), torch.cat(parts, 1)[:, None], news)
        if start is not None:
            starts.append(start)
    return news, torch.stack(starts, 1)[:, colours] if starts else None


def _missed(
    influence: Influence,
    segment: LaneSegment,
    seed: Tensor,
    along: dict[str, Tensor],
    back: Tensor | None,
    news: Tensor,
    jacobian: Tensor | None,
) -> bool:
    """Tell whether a step depends on more than the pattern says: u I and u D, of a random u, are not those of it.

    What is smaller than the rounding of the largest is not told from none.

    Args:
        influence: the tables.
        segment: the step.
        seed: u. Shape (S,).
        along: u I, by name.
        back: u D; None at the initial state.
        news: I as the pattern has it.
        jacobian: D as the pattern has it.
    """
    near = _ROUNDINGS * rounding(segment)

    def differ(found: Tensor, terms: Tensor) -> bool:
        largest = terms.abs().sum(1).amax(1, keepdim=True)
        return bool(((found - terms.sum(1)).abs() > near * largest).any())

    table = _table(influence)
    terms = table.split(seed[table.rows] * news)
    for name, each in along.items():
        if each.numel() and (differ(each, terms[name]) if name in terms else bool((each != 0).any())):
            return True
    return back is not None and jacobian is not None and differ(back, seed[:, None] * jacobian)


def _moved(influence: Influence, jacobian: Tensor, before: Tensor) -> Tensor:
    """Return D J where a weight reaches. Shape (B, K, P)."""
    rows, known, full = influence["rows"], influence["known"], jacobian.to(before.dtype)
    if len(rows) ** 2 > full.shape[1]:  # dense products are faster than so many picked ones
        return _through_all(full, before, rows, known)
    moved: list[Tensor] = []
    for to, there in zip(rows, known, strict=True):
        parts = (full[:, to, at] * each for at, each in zip(rows, before.unbind(1), strict=True))
        moved.append(torch.where(there, sum(parts), 0.0))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return torch.stack(moved, 1) if moved else before


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
