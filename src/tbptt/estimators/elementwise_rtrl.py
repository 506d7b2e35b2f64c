"""Exact online gradients for element-wise recurrences, at the cost of the weights themselves.

Letters: B lanes, N units of a recurrence, A numbers of a unit's state (2 for a complex one), P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.forward_mode import CarriedInfluence, Influence
from tbptt.estimators.lane_segment import LaneSegment
from tbptt.estimators.sparsity import initial_segment, rounding, tried_step
from tbptt.model import find_lane_dims, trainable_parameters
from tbptt.recurrence import Recurrence, recurrences_of
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, tensors
from tbptt.window import Window

__all__ = ["ElementwiseRTRL"]

_ROUNDINGS = 256
"""How many roundings of the largest number derivatives may lie from those of an element-wise recurrence."""
_SCALES = (0.1, 1.0, 10.0, 100.0) * 2
"""How far states are moved that are tried before the first step."""


@dataclass(frozen=True)
class _Units:
    """A recurrence's numbers among those of a lane's state: from `begin` on, A for each of N units."""

    begin: int
    units: int
    parts: int
    names: tuple[str, ...]

    def of(self, rows: Tensor) -> Tensor:
        """Return its numbers of rows (B, S). Shape (B, N, A)."""
        own = rows[:, self.begin : self.begin + self.units * self.parts]
        return own.view(len(rows), self.units, self.parts)

    def seed(self, like: Tensor, part: int, scale: Tensor | float = 1.0) -> Tensor:
        """Return a gradient of the end state that is `scale`, (N,), at a part of its units. Shape (B, S)."""
        seed = torch.zeros_like(like)
        self.of(seed)[:, :, part] = scale
        return seed


@final
@dataclass(frozen=True)
class ElementwiseRTRL(CarriedInfluence):
    """Carry the exact influence of each weight along, for recurrences in which each unit goes on from itself alone.

    Where unit k of the state depends on unit k before and on no other, as in `tbptt.models.ELSTM` and `LRU`, a weight
    of unit k influences that unit only: what `RTRL` keeps for all units is then one number for each weight. No
    truncation at all, at any length, for the cost of the weights themselves.

    The model says which of its recurrences are so, in `recurrences()`; it is seen to be so before the first step.

    Args:
        k1: steps of a window, at least 1.
        keep_outputs: whether estimates hold the window's outputs.

    Raises:
        ConfigError: a k1 that is no number of steps.

    Exactness: exact, at weights that stay, for one layer that is fed by the inputs, and for all that comes after the
        last layer (tests/estimators/test_elementwise_rtrl.py). In a stack it is exact for the *last* recurrent layer
        only: weights of lower layers, and of an embedding, reach the state of those above as well, which is followed
        within a window and no further. `tbptt.check` names them. Weights that move make it a mixture, as with `RTRL`.
    Cost: a window forward, once back for its losses, and once for each layer, twice for a complex one; B P numbers, 2 B
        P where they are complex.
    Reference: Irie, Gopalakrishnan & Schmidhuber (2024), arXiv:2305.19044; Zucchet et al. (2023), arXiv:2305.15947;
        Mozer (1989).

    Example:
        >>> import tbptt
        >>> model, stream = tbptt.models.ELSTM(1, 4), tbptt.ArrayStream(torch.randn(80, 1), torch.randn(80, 4), lanes=2)
        >>> estimator = ElementwiseRTRL()
        >>> carry = estimator.init(model, stream.lanes)
        >>> for window in stream.windows(1):
        ...     estimate, carry = estimator.estimate(model, torch.nn.MSELoss(), carry, window)
        >>> numbers = sum(trace.numel() for trace in carry.influence["traces"].values())
        >>> numbers < 2 * sum(parameter.numel() for parameter in model.parameters())  # of two lanes
        True
    """

    kind: ClassVar[str] = "exact"

    @classmethod
    def examples(cls) -> tuple[ElementwiseRTRL, ...]:
        """Return windows of one step and of several; see `Estimator.examples`."""
        return cls(), cls(k1=4)

    def begin(self, model: nn.Module, window: Window, dims: LaneDims | None) -> Influence:
        """See what the model says of itself, and whether it is so."""
        del dims  # looked for again, on the example
        found, _ = _examined(model, window.inputs)
        return {"units": [[each.begin, each.units, each.parts, list(each.names)] for each in found], "traces": {}}

    def limits(self, model: nn.Module, inputs: Tree) -> str:
        """Return which weights reach the state in another way than through their own recurrence."""
        found, reached = _examined(model, inputs)
        names = [name for name, own in reached.items() if own != {each.begin for each in found if name in each.names}]
        if not names:
            return ""
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return (
            f"not exact for {shown}: they reach the state in other ways than as rows of the recurrence that names "
            "them, which are followed within a window only"
        )

    def past(self, influence: Influence, arrived: Tensor) -> dict[str, Tensor]:
        """Return what arrives at each unit times the influence on it, of its own weights."""
        found: dict[str, Tensor] = {}
        for each in _units_in(influence):
            own = each.of(arrived)
            for name in each.names:
                if name in influence["traces"]:
                    trace = influence["traces"][name]
                    found[name] = (own.transpose(1, 2)[..., None].to(trace.dtype) * trace).sum((0, 1)).flatten()
        return found

    def brought_on(self, influence: Influence, segment: LaneSegment, draws: int) -> Influence:
        """Return D J + I, unit by unit."""
        del draws  # nothing is drawn
        end, traces = segment.end, dict[str, Tensor]()
        for each in _units_in(influence):
            pulled = [segment.pulled(each.seed(end, part)) for part in range(each.parts)]
            for name in each.names:
                rows = [found.get(name) for found, _ in pulled]
                like = next((row for row in rows if row is not None), None)
                before = influence["traces"].get(name)
                if like is not None:
                    news = torch.stack([torch.zeros_like(like) if row is None else row for row in rows], 1)
                    news = news.view(len(end), each.parts, each.units, -1)
                elif before is not None:  # as of a learned start, once the sequence has begun
                    news = torch.zeros_like(before)
                else:
                    continue
                starts = [start for _, start in pulled if start is not None]
                if before is not None and starts:
                    news = news + _through([each.of(start) for start in starts], before)
                traces[name] = news
        return influence | {"traces": traces}


def _through(slopes: list[Tensor], before: Tensor) -> Tensor:
    """Return D J, unit by unit. `slopes`: of each of A parts by those before, (B, N, A). `before`: (B, A, N, r)."""
    if len(slopes) == 1:
        return slopes[0].transpose(1, 2)[..., None].to(before.dtype) * before
    return torch.einsum("bnac,bcnr->banr", torch.stack(slopes, 2).to(before.dtype), before)


def _units_in(influence: Influence) -> list[_Units]:
    return [_Units(begin, units, parts, tuple(names)) for begin, units, parts, names in influence["units"]]


def _declared(model: nn.Module) -> tuple[Recurrence, ...]:
    found = recurrences_of(model)
    if not found:
        raise CapabilityError(
            f"a model that names its element-wise recurrences was expected, but {type(model).__name__} names none: "
            "without them the influence of each weight on all of the state would be needed",
            fix="tbptt.models.ELSTM, LRU, or SequenceModel(core='lru'); in a model of your own, def recurrences(self): "
            "return (tbptt.Recurrence(leaf=0, parameters=(...)),); for any other small model RTRL(k1)",
        )
    return found


def _examined(model: nn.Module, inputs: Tree) -> tuple[list[_Units], dict[str, set[int]]]:
    """Return a model's recurrences, seen to be what it says, and which of them each weight reaches by where they begin.

    Raises:
        CapabilityError: they are not.
    """
    declared = _declared(model)
    dims = find_lane_dims(model, inputs)
    with preserved(model, device=tensors(inputs)[0].device):
        torch.manual_seed(0)
        steps = tensors(inputs)[0].shape[0]
        tried = [tried_step(model, inputs, at % steps, dims, moved=by) for at, by in enumerate((0.0, *_SCALES))]
        found = _laid_out(declared, tried[0].segment.end, dims, trainable_parameters(model))
        reached: dict[str, set[int]] = {}
        initial = initial_segment(model, dims)
        for segment in tried if initial is None else [initial, *tried]:
            for each in found:
                for part in range(each.parts):
                    for name in _seen(each, part, segment):
                        reached.setdefault(name, set()).add(each.begin)
    return found, reached


def _laid_out(
    declared: tuple[Recurrence, ...], state: Tree, dims: LaneDims | None, parameters: dict[str, Tensor]
) -> list[_Units]:
    found: list[_Units] = []
    begin, sizes = 0, list[tuple[int, int, int] | None]()
    for leaf, dim in zip(tensors(state), dims or (), strict=False):
        parts = 2 if leaf.is_complex() else 1 if leaf.is_floating_point() else 0
        units = leaf.numel() // leaf.shape[dim or 0]
        sizes.append((begin, units, parts) if parts else None)
        begin += units * parts
    for each in declared:
        place = sizes[each.leaf] if 0 <= each.leaf < len(sizes) else None
        trained = tuple(name for name in each.parameters if name in parameters)
        wrong = [name for name in trained if place is not None and parameters[name].shape[:1] != (place[1],)]
        if place is None or wrong:
            raise CapabilityError(
                f"a recurrence over a tensor of the state was expected, its weights with one row for each unit, but "
                f"{each} came with {len(sizes)} tensors" + (f", and {wrong[0]} has other rows" if wrong else ""),
                fix="let recurrences() name the tensor by its place and weights whose first dimension are its units",
            )
        found.append(_Units(*place, trained))
    return found


def _seen(each: _Units, part: int, segment: LaneSegment) -> list[str]:
    """Return the weights that a recurrence's state depends on, once its units are seen to be apart."""
    end = segment.end
    scale = 1.0 + torch.rand(each.units, dtype=end.dtype, device=end.device)
    plain, start = segment.pulled(each.seed(end, part))
    other, moved = segment.pulled(each.seed(end, part, scale))
    pairs = [] if start is None or moved is None else [("the state before", each.of(start), each.of(moved))]
    near = min(_ROUNDINGS * rounding(segment), 0.1)
    for name in each.names:
        if name in plain:
            shape = (len(end), each.units, -1)
            pairs.append((name, plain[name].view(shape), other[name].view(shape)))
    for what, ones, scaled in pairs:
        wanted = ones * scale[:, None].to(ones.dtype)
        if not bool((scaled - wanted).norm() <= near * wanted.norm()):  # so that NaN is refused
            raise CapabilityError(
                f"an element-wise recurrence was expected, but a unit depends on another unit's part of {what}: its "
                "influence would be wrong",
                fix="name only element-wise recurrences in recurrences(); for this model RTRL(k1) or SnAp(n=1)",
            )
    return list(plain)
