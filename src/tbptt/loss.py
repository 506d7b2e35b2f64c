"""Losses by step, summed over the targets that count.

Letters: T time, B lanes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ShapeError
from tbptt.model import trainable_parameters
from tbptt.torch_losses import FUNCTIONS, TorchLoss, of_torch, wrong_class
from tbptt.tree import Tree, differentiable, tree_map
from tbptt.window import Window

__all__ = ["Counted", "Loss", "StepLoss", "Summed", "WindowLoss", "added", "filled"]

Loss: TypeAlias = "Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]] | WindowLoss | StepLoss"
"""`loss(outputs, targets)` -> losses by step, shape (T, B), or a dict of them; one of torch.nn's own losses; or a
`WindowLoss`."""


@dataclass(frozen=True)
class Counted:
    """The targets that count, in one window or in several together.

    Args:
        num: how many they are.
        weight: what the mean over them divides by: their number, or the sum of their class weights where the loss has
            some, as in torch.
    """

    num: int = 0
    weight: float = 0.0

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.num + other.num, self.weight + other.weight)

    def __bool__(self) -> bool:
        """Whether there is a mean to be learned from: of targets that all weigh nothing there is none, as of none."""
        return self.num > 0 and self.weight != 0

    @property
    def denominator(self) -> float | None:
        """The weight where it is not the number; see `Estimate.denominator`."""
        return None if self.weight == self.num else self.weight


class Summed(NamedTuple):
    """The losses of a window, summed over the targets that count.

    Args:
        total: the sum, 0-dim.
        counted: these targets.
        terms: the sum of each term of a loss that returns a dict, by name, 0-dim; empty for a single one.
    """

    total: Tensor
    counted: Counted
    terms: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class WindowLoss:
    """A loss that couples steps or lanes: pre-emphasis, a spectrum, a normaliser over the window, other lanes.

    It is given whole windows as they are, targets that do not count included, since there is nothing that could stand
    in their place; the losses of those are left out afterwards. So the estimator must run a window in one piece, and
    the loss depends on how long windows are: `TBPTT` with k2 >= k1, `FullBPTT` with a segment of k1 steps, `Telescope`
    and `Mixture` without segments, and whatever else does not cut a window. Anything else is refused, and so is a
    window in which a sequence begins after its first step, as the loss would couple two sequences.

    Args:
        fn: outputs, targets -> losses, shape (T, B), or a dict of such terms; a function or an nn.Module.

    Raises:
        CapabilityError: it is not callable.

    Example:
        >>> def difference(outputs, targets):
        ...     error = (outputs - targets).squeeze(-1)
        ...     return error.diff(dim=0, prepend=0 * error[:1]).square()
        >>> WindowLoss(difference).fn is difference
        True
    """

    fn: Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise CapabilityError(
                f"a function of outputs and targets was expected, but a {type(self.fn).__name__} came",
                fix="WindowLoss(lambda outputs, targets: ...)",
            )


@dataclass(frozen=True, eq=False)
class StepLoss:
    """A loss made ready: it gives the sum over the valid targets of a window, and what the mean divides by.

    Args:
        losses: outputs, targets -> losses by step, shape (T, B), or a dict of such terms, which are added.
        ignored: a target value that does not count (`ignore_index` of torch's losses), or None.
        module: the loss as it was given, where it is a module: it is moved, saved and put into eval mode with the
            model, and its parameters are trained. None for a function.
        weighted: a loss of torch whose mean divides by the weights of the targets, `weighted.weight[target]`.
        whole: whether it is to be given whole windows; see `WindowLoss`.
    """

    losses: Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]]
    ignored: int | None = None
    module: nn.Module | None = None
    weighted: nn.Module | None = field(default=None, repr=False)
    whole: bool = False

    @property
    def is_torchs(self) -> bool:
        """Whether it is a loss of torch.nn, which is known to be one of single steps."""
        return isinstance(self.losses, TorchLoss)

    @staticmethod
    def of(loss: Loss) -> StepLoss:
        """Make a loss ready: torch.nn's own are taken in their unreduced form.

        Element-wise losses of (T, B, ...) are averaged over the trailing dimensions, so that
        sum / count is torch's own mean; classification losses take outputs (T, B, C), class last, and
        targets (T, B). With class weights the mean divides by the weights of the targets that count, as torch's does;
        that of MultiMarginLoss, and of targets that are probabilities, by their number, as torch's does.

        Raises:
            ConfigError: `reduction="sum"`, which would have to be ignored.
            CapabilityError: not callable, or a torch.nn loss that does not compare outputs with targets.
        """
        if isinstance(loss, StepLoss):
            return loss
        if isinstance(loss, WindowLoss):
            return StepLoss(loss.fn, module=loss.fn if isinstance(loss.fn, nn.Module) else None, whole=True)
        for function, kind in FUNCTIONS.items():
            if loss is function:  # not by hash: a loss of the user's need not have one
                return StepLoss.of(kind())
        module = loss if isinstance(loss, nn.Module) else None
        if module is not None and type(module).__module__ == "torch.nn.modules.loss":
            divides_by_weights = isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss)
            ignored = cast("int | None", getattr(module, "ignore_index", None))
            return StepLoss(of_torch(module), ignored, module, module if divides_by_weights else None)
        if not callable(loss):
            raise CapabilityError(
                f"a loss(outputs, targets) was expected, but a {type(loss).__name__} came",
                fix="loss=torch.nn.CrossEntropyLoss()",
            )
        return StepLoss(loss, module=module)

    def own_parameters(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the loss's parameters that require a gradient and are not the model's, by name."""
        if self.module is None:
            return {}
        found = trainable_parameters(self.module)
        models = {id(each) for each in model.parameters()} if found else ()
        return {name: each for name, each in found.items() if id(each) not in models}

    def valid(self, window: Window) -> tuple[Tensor, int]:
        """Return which targets count, shape (T, B), and how many they are."""
        targets = window.targets
        if self.ignored is None or not isinstance(targets, Tensor) or targets.is_floating_point():
            return window.mask, window.num_targets
        valid = window.mask & (targets != self.ignored)
        return valid, int(valid.sum())

    def counted(self, window: Window) -> Counted:
        """Return how many targets count, and what a mean over them divides by."""
        valid, num = self.valid(window)
        weights = None if self.weighted is None else cast("Tensor | None", self.weighted.weight)
        targets = window.targets
        if weights is None or not num or not isinstance(targets, Tensor) or targets.is_floating_point():
            return Counted(num, float(num))
        chosen = targets if num == valid.numel() else targets[valid]
        try:
            return Counted(num, float(weights.double()[chosen].sum()))
        except IndexError as error:
            known = torch.where(valid, targets, 0)
            raise wrong_class(known, len(weights)) or error from error

    def by_step(self, outputs: Tree, window: Window) -> tuple[Tensor, Tensor]:
        """Return the losses, zero where a target does not count, and which do; shapes (T, B).

        Raises:
            ShapeError: see `terms_by_step`.
        """
        terms, valid = self.terms_by_step(outputs, window)
        return added(terms), valid

    def terms_by_step(self, outputs: Tree, window: Window) -> tuple[dict[str, Tensor], Tensor]:
        """Return each term of the losses by name, zero where a target does not count, and which do; shapes (T, B).

        The name of a loss that is a single one is empty. The loss never sees a target that does not count, nor the
        outputs there: a pair of both that does count stands in their place. So neither a NaN that stands for a missing
        value nor a division by a target that was made up can reach the gradient. Where none counts it is not called.

        Raises:
            ShapeError: a term is not of shape (T, B), or a class lies outside the outputs.
        """
        valid, num = self.valid(window)
        targets = window.targets
        if isinstance(self.losses, TorchLoss):
            self.losses.check(outputs, targets)
        if not num:
            return {"": _nothing(outputs, valid)}, valid
        if self.whole:
            _refuse_two_sequences(window)
        elif num < valid.numel():
            outputs, targets = filled(outputs, valid), filled(targets, valid)
        found: object = cast("Callable[[Tree, Tree], object]", self.losses)(outputs, targets)
        terms = cast("Mapping[str, object]", found) if isinstance(found, Mapping) else {"": found}
        for name, each in terms.items():
            if not isinstance(each, Tensor) or each.shape != valid.shape:
                raise _wrong_shape(name, each, valid)
        if not terms:
            raise _wrong_shape("", found, valid)
        known = cast("Mapping[str, Tensor]", terms)
        if num == valid.numel():
            return dict(known), valid
        return {name: torch.where(valid, each, 0.0) for name, each in known.items()}, valid

    def by_single_steps(self, who: str) -> StepLoss:
        """Return the loss itself, refusing one that is not of single steps.

        Raises:
            CapabilityError: it is a `WindowLoss`.
        """
        if self.whole:
            raise CapabilityError(
                f"a loss of single steps was expected by {who}, which looks at single losses or cuts its windows "
                "elsewhere than training does, but a WindowLoss came: it is another loss for each way of cutting",
                fix="a loss whose value at each step depends on that step alone",
            )
        return self

    def total(self, outputs: Tree, window: Window) -> Summed:
        """Return the losses of a window, summed over its valid targets."""
        counted = self.counted(window)
        if isinstance(self.losses, TorchLoss) and counted.num == window.mask.numel():
            self.losses.check(outputs, window.targets)
            total = self.losses.total(outputs, cast(Tensor, window.targets))  # one kernel of torch's, not three
            return Summed(total, counted, {})
        terms, _ = self.terms_by_step(outputs, window)
        sums = {name: each.sum() for name, each in terms.items()}
        return Summed(added(sums), counted, {name: each.detach() for name, each in sums.items() if name})


def filled(tree: Tree, valid: Tensor) -> Tree:
    """Return a tree of leaves (T, B, ...) with a valid entry in the place of all that are not.

    Args:
        tree: outputs or targets.
        valid: which of its steps and lanes are; one at least. Shape (T, B), bool.
    """
    step, lane = valid.nonzero()[0].tolist()

    def fill(leaf: Tensor) -> Tensor:
        chosen = valid.view(valid.shape + (1,) * (leaf.ndim - 2))
        return torch.where(chosen, leaf, leaf[step, lane].detach())

    return tree_map(fill, tree)


def added(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms."""
    first, *others = terms.values()
    for each in others:
        first = first + each
    return first


def _nothing(outputs: Tree, valid: Tensor) -> Tensor:
    """Return a zero for each step and lane, of the type of the outputs."""
    numbers = differentiable(outputs)
    return torch.zeros(valid.shape, dtype=numbers[0].real.dtype if numbers else None, device=valid.device)


def _refuse_two_sequences(window: Window) -> None:
    inside = [step for step in window.resets if step]
    if inside:
        lane = int(window.reset[inside[0]].nonzero()[0])
        raise CapabilityError(
            f"a window within one sequence was expected for a WindowLoss, but lane {lane} begins another one at step "
            f"{inside[0]} of {window.steps}: the loss would couple the end of one with the beginning of the next",
            fix="sequences of whole windows, or a loss of single steps",
        )


def _wrong_shape(name: str, losses: object, valid: Tensor) -> ShapeError:
    steps, lanes = valid.shape
    came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    whose = f"the term {name!r} of the loss" if name else "the loss"
    if isinstance(losses, Mapping):
        came = "an empty dict" if not losses else came
    return ShapeError(
        f"{whose} was expected to be one value for each step and lane, shape (T, B) = ({steps}, {lanes}), but it "
        f"returned {came}: a loss that was already averaged cannot be weighted by the targets that count",
        fix='leave out the mean: F.mse_loss(outputs, targets, reduction="none").mean(-1)',
    )
