"""Whether a loss is one of single steps and lanes, found out by experiment.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.loss import StepLoss, filled
from tbptt.randomness import seed_everything
from tbptt.side_state import SideState, preserved
from tbptt.tree import Tree, as_leaves, clone, differentiable, tensors, tree_map
from tbptt.window import Window

__all__ = ["refuse_coupled"]

_COPIES = 4
"""How many steps are made of a window that has only one."""
_SHRINK = 1 / 64
"""By how much the outputs of such steps differ, relatively: what is a probability, or has a sign, stays one."""
_VARY = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Targets of which there are others than those that came: classes, counts, flags."""
_SEEDS = 4
"""With how many other random numbers a change has to show again."""
_ROUNDING = 16.0
"""By how many units of rounding two losses may differ that are computed by the same operations on the same numbers."""


def refuse_coupled(loss: StepLoss, outputs: Tree, window: Window, model: nn.Module) -> None:
    """Refuse a loss whose value at one step and lane depends on the outputs or targets of another.

    It is called again and again on one window, each time with the same random numbers: some steps are given the
    outputs and targets of others, and the losses of the rest must stay; and their gradient must be zero at the others'
    outputs. For every two steps, and every two lanes, there is a call in which one is changed and the other is not.
    Where the loss keeps a running number of its own, gives another value when it is called again, or draws as many
    random numbers as the values say, only the gradient is looked at.

    Losses of torch.nn's own and a `WindowLoss` are not looked at. Afterwards the model, the loss and the random
    generators are as they were, but for what a function keeps in variables of its own.

    Args:
        loss: the loss.
        outputs: of the model for this window. Leaves (T, B, ...).
        window: the steps.
        model: whose modules the loss may call.

    Raises:
        CapabilityError: it is coupled.

    Cost: about 2 log2(T B) calls of the loss, without the model.
    """
    valid, num = loss.valid(window)
    if loss.is_torchs or loss.whole or not num:
        return
    targets = window.targets
    if num < valid.numel():
        outputs, targets = filled(outputs, valid), filled(targets, valid)
    modules = (model,) if loss.module is None else (model, loss.module)
    with preserved(*modules, device=valid.device) as before, torch.enable_grad():
        experiment = _Experiment(loss, clone(outputs), targets, before, modules)
        found = experiment.coupled()
    if found is not None:
        raise _refusal(loss, *found, experiment.size)


class _Experiment:
    """One loss on one window, each time from the same side state."""

    def __init__(
        self, loss: StepLoss, outputs: Tree, targets: Tree, before: SideState, modules: tuple[nn.Module, ...]
    ) -> None:
        self.loss, self.before, self.modules = loss, before, modules
        self.outputs, self.targets = outputs, targets
        single = self._size()[0] == 1  # of one step nothing can be told
        if single:
            self._make_several()
        self.size = self._size()
        self.varied = tree_map(lambda leaf: _varied(leaf, made=single), self.targets)

    def coupled(self) -> tuple[str, int, int] | None:
        """Return "step" or "lane", one of them, and another one whose loss it has a part in; None for none."""
        leaves = as_leaves(self.outputs)
        for targets in (self.varied, self.targets):  # it may not take those that were made up
            self.targets = targets
            try:
                base, after = self._called(leaves, targets)
            except Exception:  # or it wants the graph of the model, or will not take a single step made several
                continue
            found = self._by_gradient(base, leaves)
            return found or self._by_value(base.detach(), after)
        return None

    def _by_gradient(self, base: Tensor, leaves: Tree) -> tuple[str, int, int] | None:
        inputs = differentiable(leaves)
        if not base.requires_grad or not inputs:
            return None
        for axis, moved, kept in _halves(self.size):
            chosen = base.index_select(axis, _index(kept, base))
            gradients = _gradients(chosen.sum(), inputs)
            sizes = [each.detach().abs().movedim(axis, 0).flatten(1).sum(1) for each in gradients if each is not None]
            if not sizes:
                continue
            total = torch.stack([each.to(sizes[0].dtype) for each in sizes]).sum(0).nan_to_num(0.0, 0.0, 0.0)
            least = _ROUNDING * torch.finfo(total.dtype).eps * float(total.max())
            wrong = [each for each in moved if float(total[each]) > least]
            if wrong:
                return self._named(axis, wrong[0], self._which(base, inputs, axis, wrong[0], kept))
        return None

    def _which(self, base: Tensor, inputs: list[Tensor], axis: int, other: int, kept: list[int]) -> int:
        """Return the one whose loss sends most to `other`."""
        found: list[float] = []
        for each in kept:
            gradients = _gradients(base.select(axis, each).sum(), inputs)
            arrived = [g.select(axis, other).abs().sum().nan_to_num(0.0) for g in gradients if g is not None]
            found.append(float(torch.stack([part.double() for part in arrived]).sum()) if arrived else 0.0)
        return kept[found.index(max(found))]

    def _by_value(self, base: Tensor, after: SideState) -> tuple[str, int, int] | None:
        again, _ = self._called(self.outputs, self.targets)
        moved_on = {name.partition(".")[0] for name in self.before.differences(after)} - set(after.generators)
        if moved_on or bool(_differ(again.detach(), base).any()):
            return None
        first: tuple[str, int, int] | None = None
        for axis, moved, kept in _halves(self.size):
            found = self._changed(base, after, axis, moved, kept)
            if found is None:
                return None
            if found and first is None and self._holds(axis, moved, kept, found[0]):
                single = {each: self._changed(base, after, axis, [each], kept) or [] for each in moved}
                causes = [each for each in moved if found[0] in single[each]]
                first = self._named(axis, (causes or moved)[0], found[0])
        return first

    def _holds(self, axis: int, moved: list[int], kept: list[int], place: int) -> bool:
        """Tell whether the loss at a place changes with other random numbers as well.

        Where numbers are drawn until one is accepted, those of a few places may be others, and all after them the same.
        """
        for seed in range(_SEEDS):
            base, after = self._called(self.outputs, self.targets, seed)
            if place not in (self._changed(base.detach(), after, axis, moved, kept, seed) or []):
                return False
        return True

    def _changed(
        self,
        base: Tensor,
        after: SideState,
        axis: int,
        moved: list[int],
        kept: list[int],
        seed: int | None = None,
    ) -> list[int] | None:
        """Return those whose loss is another one when the moved ones are given what stands at some of the others.

        None where the loss has drawn more or fewer random numbers by it: then it has drawn other ones everywhere.
        """
        source = list(range(self.size[axis]))
        for each in moved:
            source[each] = min(kept, key=lambda other, each=each: abs(other - each))
        index = _index(source, base)
        outputs, targets = (
            tree_map(lambda leaf: leaf.index_select(axis, index), tree) for tree in (self.outputs, self.targets)
        )
        try:
            losses, ended = self._called(outputs, targets, seed)
        except Exception:  # a loss may want what a made-up window has not
            return []
        if after.differences(ended):
            return None
        differ = _differ(losses.detach(), base).any(1 - axis)
        return [each for each in kept if bool(differ[each])]

    def _called(self, outputs: Tree, targets: Tree, seed: int | None = None) -> tuple[Tensor, SideState]:
        """Return the losses, and the side state after; with the random numbers of the run where no seed is given."""
        self.before.restore(*self.modules)
        if seed is not None:
            seed_everything(seed)
        first = tensors(outputs)[0]
        window = Window(first.detach().flatten(2) if first.ndim > 2 else first.detach(), targets)
        losses, _ = self.loss.by_step(outputs, window)
        return losses, SideState.of(*self.modules, device=first.device, like=self.before)

    def _size(self) -> tuple[int, int]:
        steps, lanes = tensors(self.outputs)[0].shape[:2]
        return steps, lanes

    def _make_several(self) -> None:
        """Make several steps of one: those of other lanes, or with outputs that are a little smaller."""
        lanes = self._size()[1]
        shifts = range(_COPIES)

        def rolled(leaf: Tensor) -> Tensor:
            return torch.cat([leaf.roll(shift, 1) for shift in shifts])

        def shrunk(leaf: Tensor) -> Tensor:
            numbers = leaf.is_floating_point() or leaf.is_complex()
            return torch.cat([leaf * (1 - _SHRINK * shift) if numbers else leaf for shift in shifts])

        if lanes > 1:
            self.outputs, self.targets = tree_map(rolled, self.outputs), tree_map(rolled, self.targets)
        else:
            self.outputs = tree_map(shrunk, self.outputs)
            self.targets = tree_map(lambda leaf: torch.cat([leaf] * _COPIES), self.targets)

    def _named(self, axis: int, cause: int, changed: int) -> tuple[str, int, int]:
        return ("step", "lane")[axis], cause, changed


def _varied(targets: Tensor, *, made: bool) -> Tensor:
    """Return targets of which no step is like all others, so that it shows where one has a part in another's loss.

    Numbers become a little smaller from step to step, of classes and flags every second is another one: where they
    stay the same over the window, and of numbers also where the steps were made of one by exchanging its lanes, since
    what is computed of all of them together, as a standard deviation, would stay the same.

    Args:
        targets: shape (T, B, ...).
        made: whether the steps were made of a single one.
    """
    same = bool(((targets == targets[:1]) | (targets != targets)).all())  # NaN is the same as NaN
    steps = torch.arange(len(targets), device=targets.device).view(-1, *[1] * (targets.ndim - 1))
    if targets.is_floating_point() or targets.is_complex():
        return targets * (1 - _SHRINK * (steps % _COPIES)).to(targets.dtype) if same or made else targets
    if not same or targets.dtype not in _VARY:
        return targets
    if targets.dtype == torch.bool:
        return targets ^ (steps % 2 == 1)
    other = torch.where(targets > 0, targets - 1, torch.where(targets == 0, targets + 1, targets))
    return torch.where(steps % 2 == 1, other, targets)


def _halves(size: tuple[int, int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield axes with two halves of their places: any two places are apart in one of them, either way round."""
    for axis, length in enumerate(size):
        for bit in range((length - 1).bit_length()):
            one = [each for each in range(length) if each >> bit & 1]
            other = [each for each in range(length) if not each >> bit & 1]
            yield axis, one, other
            yield axis, other, one


def _gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True))


def _index(places: list[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Tell where two losses differ by more than rounding; NaN is the same as NaN. Shape (T, B)."""
    known = torch.where(other.isfinite(), other, 0.0).abs()
    least = _ROUNDING * torch.finfo(other.dtype).eps * known.max()
    same = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= least)
    return ~same


def _refusal(loss: StepLoss, axis: str, cause: int, changed: int, size: tuple[int, int]) -> CapabilityError:
    name = getattr(loss.losses, "__name__", type(loss.losses).__name__)
    why = (
        "windows are cut where the estimator, the stream and evaluate cut them, so that it would be another loss for "
        "each of them, and targets that do not count would have a part in it"
        if axis == "step"
        else "lanes are sequences of their own, of which there may be more or fewer, and those whose targets do not "
        "count would have a part in it"
    )
    return CapabilityError(
        f"a loss of single steps and lanes was expected, each from its own outputs and targets, but the value or the "
        f"gradient of {name} at {axis} {changed} depends on what stands at {axis} {cause} (of {size[0]} steps and "
        f"{size[1]} lanes): {why}",
        fix="loss=tbptt.WindowLoss(loss), which is given whole windows (k2 >= k1)",
    )
