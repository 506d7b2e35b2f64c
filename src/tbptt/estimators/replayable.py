"""Whether a model can be run again as it was run, and whether its calls may be joined and cut elsewhere then.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.history import Stretch
from tbptt.estimators.segments import Segment
from tbptt.side_state import SideState, as_then
from tbptt.tree import LaneDims, Tree, detach, tensors, time_cat
from tbptt.unroll import unroll
from tbptt.window import Window

if TYPE_CHECKING:
    from tbptt.estimators.run import Run

__all__ = ["MOST", "Digest", "cuts_between", "find_out", "joins_of", "refuse_other"]

_ROUNDINGS = 1e3
"""The same steps, run with other kernels or in other pieces, may differ by so many roundings of the largest output."""
MOST = 0.05
"""And by no more than this share of it, in whatever type."""


def cuts_between(run: Run, past: Stretch | None, cuts: Iterable[int], needed: bool) -> list[int]:
    """Return where the segments of a look-back are to begin: for most models, where it is asked for.

    A model that draws random numbers, or moves buffers, at each call is another model when its calls are cut
    elsewhere: its calls before the window stay as they were.

    Args:
        past: the steps before the window, which are run again.
        cuts: where segments are asked to begin, counted from the first step of the past.
        needed: whether the estimate depends on those before the window.

    Raises:
        CapabilityError: it does, and one lies within a call of such a model.
    """
    if past is None or run.carry.joins:
        return list(cuts)
    news, asked = past.window.steps, set(cuts)
    inside = sorted(each for each in asked if 0 < each < news and each not in past.calls)
    if inside and needed and run.carry.joins is False:
        raise CapabilityError(
            f"a look-back cut where calls of {type(run.model).__name__} began was expected, but it is to be cut "
            f"{news - inside[0]} steps before the window, within a call: the model draws random numbers, moves buffers "
            "or normalises over a call, so that in two calls it is another model than it was in one",
            fix="lengths that are multiples of k1 and windows of k1 steps, or TBPTT, which needs no such cuts",
        )
    return [*past.calls, *(each for each in asked if each >= news or needed)]


def find_out(run: Run, chain: Sequence[Segment], stretches: Sequence[Stretch]) -> None:
    """See once that the model can be run again, and set `joins` of the carry; later, whether it draws or moves by now.

    The newest segment is run again from what it found, and must give the outputs that it gave; then once more cut in
    two, or joined with the one before where it is too short. Joined may be calls that give the same outputs either
    way, and leave random generators, buffers and attributes as they found them.

    Raises:
        CapabilityError: other outputs came.
    """
    if run.carry.joins is None:
        gave = [segment.outputs for segment in chain]
        run.carry.joins = joins_of(run.model, stretches, run.carry.dims, run.carry.unit, gave)
        return
    newest = stretches[-1].side
    if SideState.of(run.model, device=run.device, like=newest) is not newest:
        run.carry.joins = False


def joins_of(
    model: nn.Module,
    stretches: Sequence[Stretch],
    dims: LaneDims | None,
    unit: int,
    gave: Sequence[Tree] | None = None,
) -> bool | None:
    """Run the newest stretches again, and tell whether the model's calls may be joined and cut; see `find_out`.

    Args:
        stretches: consecutive ones, each a call of the model, oldest first.
        dims: the lane dimensions of the state.
        unit: steps that the model may be cut at multiples of.
        gave: the outputs that they gave, with the same weights; None: the model is run twice.

    Returns:
        None where there are too few steps to tell.

    Raises:
        CapabilityError: other outputs came.
    """
    half = stretches[-1].window.steps // 2 // unit * unit
    size = 1 if half or len(stretches) == 1 else 2
    newest, known = stretches[-size:], None if gave is None else gave[-size:]
    if any(stretch.side is None for stretch in newest):
        return None
    if known is None:
        known, _ = _run(model, newest, dims)
    again, moves = _run(model, newest, dims)
    for stretch, one, other in zip(newest, again, known, strict=True):
        if not _agree(one, other):
            refuse_other(model, stretch.window)
    if moves:
        return False
    if not half and size == 1:
        return None  # one step tells nothing of cuts
    first = newest[0]
    whole = first.window if size == 1 else Window.join([stretch.window for stretch in newest])
    pieces: list[Tree] = []
    state = first.state
    try:
        with as_then(first.side, model, device=whole.mask.device):
            for piece in [whole[:half], whole[half:]] if half else [whole]:
                outputs, state = unroll(model, piece, state, dims)
                pieces.append(outputs)
                state = detach(state)
    except Exception:  # whatever a model says that cannot be cut there
        return False
    return _agree(time_cat(pieces), time_cat(list(known)))


def _run(model: nn.Module, stretches: Sequence[Stretch], dims: LaneDims | None) -> tuple[list[Tree], bool]:
    """Run stretches, each from what it found; return the outputs, and whether any random number was drawn or so."""
    found: list[Tree] = []
    moves = False
    for stretch in stretches:
        device = stretch.window.mask.device
        with as_then(stretch.side, model, device=device):
            found.append(detach(unroll(model, stretch.window, stretch.state, dims)[0]))
            moves |= SideState.of(model, device=device, like=stretch.side) is not stretch.side
    return found, moves


def refuse_other(model: nn.Module, window: Window) -> None:
    """Refuse a model that gave other outputs when a segment was run again.

    Raises:
        CapabilityError: always.
    """
    name = type(model).__name__
    raise CapabilityError(
        f"{name} was expected to give the same outputs when the segment of steps {window.start} to "
        f"{window.start + window.steps - 1} is run again, but gave others, though its attributes and buffers and the "
        "random generators (torch's, numpy's, Python's and its own) were as they had been: it reads something else, "
        "and the gradient would be that of another model",
        fix=f"keep what it reads as an attribute or a buffer of {name}, or in the state; or TBPTT(k1, k2) with "
        "k2 <= k1, which runs nothing again",
    )


def _agree(one: Tree, other: Tree) -> bool:
    return all(_close(a.detach(), b.detach()) for a, b in zip(tensors(one), tensors(other), strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    missing = one.isnan()
    if not torch.equal(missing, other.isnan()):
        return False
    apart = torch.where(missing | (one == other), 0, one - other).abs().max() if one.numel() else 0.0
    scale = torch.where(missing | one.isinf(), 0, one).abs().max() if one.numel() else 1.0
    return bool(apart <= tolerance(one.dtype) * scale)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far outputs of the same steps may be apart, relative to the largest."""
    return min(_ROUNDINGS * torch.finfo(dtype).eps, MOST)


class Digest:
    """A few numbers that tell outputs from others.

    Args:
        outputs: leaves (T, B, ...).
    """

    def __init__(self, outputs: Tree) -> None:
        self.sums: list[Tensor] = []
        self.tolerances: list[float] = []
        for leaf in tensors(outputs):
            rows = leaf.detach().reshape(leaf.shape[0], -1)
            if rows.is_complex():
                rows = torch.view_as_real(rows).flatten(1)
            self.tolerances.append(tolerance(rows.dtype) if rows.is_floating_point() else 0.0)
            rows = rows if rows.is_floating_point() else rows.double()
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            steps = torch.arange(1, 1 + len(rows), device=rows.device, dtype=torch.float64)
            means = rows.sum(1, dtype=torch.float64) / max(1, rows.shape[1]) ** 0.5  # no larger than the norms
            self.sums.append(torch.stack([norms.sum(), norms @ steps.cos(), means @ steps.sin()]))

    def agrees(self, other: Digest, within: float = 0.0) -> bool:
        """Tell whether both are of the same outputs, to rounding, or within a share of them."""
        for one, two, rounding in zip(self.sums, other.sums, self.tolerances, strict=True):
            if not bool(torch.isfinite(one).all()):
                if not torch.equal(one.isfinite(), two.isfinite()):
                    return False
            elif not bool((one - two).abs().max() <= max(rounding, within) * one[0]):
                return False
        return True
