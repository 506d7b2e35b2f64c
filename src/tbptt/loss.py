"""Losses by step, summed over the targets that count.

Letters: T time, B lanes, C classes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.model import trainable_parameters
from tbptt.tree import Tree, differentiable, leaf_names, tensors, tree_map
from tbptt.window import Window

__all__ = ["Counted", "Loss", "StepLoss", "Summed"]

Loss: TypeAlias = "Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]] | StepLoss"
"""`loss(outputs, targets)` -> losses by step, shape (T, B), or a dict of them; or one of torch.nn's own losses."""

_BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
_BY_ELEMENT = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)
_FUNCTIONS: dict[object, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


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
class StepLoss:
    """A loss made ready: it gives the sum over the valid targets of a window, and what the mean divides by.

    Args:
        losses: outputs, targets -> losses by step, shape (T, B), or a dict of such terms, which are added.
        ignored: a target value that does not count (`ignore_index` of torch's losses), or None.
        module: the loss as it was given, where it is a module: it is moved, saved and put into eval mode with the
            model, and its parameters are trained. None for a function.
        weighted: a loss of torch whose mean divides by the weights of the targets, `weighted.weight[target]`.
    """

    losses: Callable[[Tree, Tree], Tensor | Mapping[str, Tensor]]
    ignored: int | None = None
    module: nn.Module | None = None
    weighted: nn.Module | None = field(default=None, repr=False)

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
        for function, kind in _FUNCTIONS.items():
            if loss is function:  # not by hash: a loss of the user's need not have one
                return StepLoss.of(kind())
        if not isinstance(loss, nn.Module) or type(loss).__module__ != "torch.nn.modules.loss":
            if not callable(loss):
                raise CapabilityError(
                    f"a loss(outputs, targets) was expected, but a {type(loss).__name__} came",
                    fix="loss=torch.nn.CrossEntropyLoss()",
                )
            return StepLoss(loss, module=loss if isinstance(loss, nn.Module) else None)
        if not isinstance(loss, _BY_CLASS + _BY_ELEMENT):
            known = ", ".join(kind.__name__ for kind in _BY_CLASS + _BY_ELEMENT)
            raise CapabilityError(
                f"torch.nn.{type(loss).__name__} is not a loss of outputs against targets, step by step; "
                f"these are: {known}",
                fix="pass a function loss(outputs, targets) that returns losses of shape (T, B)",
            )
        if loss.reduction == "sum":
            raise ConfigError(
                'reduction="sum" was asked for, but a window\'s loss is always sum / count over its valid '
                "targets, so that the learning rate does not depend on the window's length",
                fix=f"torch.nn.{type(loss).__name__}(), and scale the learning rate if a sum is meant",
            )
        if isinstance(loss, _BY_CLASS):
            by_class = _ClassLoss(_reduced(loss, "none"), _reduced(loss, "sum"))
            ignored = cast("int | None", getattr(loss, "ignore_index", None))
            return StepLoss(by_class, ignored, loss, None if isinstance(loss, nn.MultiMarginLoss) else loss)
        return StepLoss(_ElementLoss(_reduced(loss, "none"), _reduced(loss, "sum")), module=loss)

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
            raise _wrong_class(known, len(weights)) or error from error

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
        if isinstance(self.losses, _TorchLoss):
            self.losses.check(outputs, targets)
        if not num:
            return {"": _nothing(outputs, valid)}, valid
        if num < valid.numel():
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

    def total(self, outputs: Tree, window: Window) -> Summed:
        """Return the losses of a window, summed over its valid targets."""
        counted = self.counted(window)
        if isinstance(self.losses, _TorchLoss) and counted.num == window.mask.numel():
            self.losses.check(outputs, window.targets)
            total = self.losses.total(outputs, cast(Tensor, window.targets))  # one kernel of torch's, not three
            return Summed(total, counted, {})
        terms, _ = self.terms_by_step(outputs, window)
        sums = {name: each.sum() for name, each in terms.items()}
        return Summed(added(sums), counted, {name: each.detach() for name, each in sums.items() if name})


@dataclass(frozen=True)
class _TorchLoss(ABC):
    """A loss of torch.nn, as it is for each target, and summed."""

    unreduced: nn.Module
    summed: nn.Module

    def check(self, outputs: Tree, targets: Tree) -> None:
        """Refuse outputs and targets that cannot be compared, without comparing them.

        Raises:
            ShapeError: they are of other shapes than the loss takes, or not one tensor each.
        """
        for name, tree in (("outputs", outputs), ("targets", targets)):
            if not isinstance(tree, Tensor):
                raise self._not_one(name, tree)
        self.fit(outputs, targets)

    def _not_one(self, name: str, tree: Tree) -> ShapeError:
        loss = type(self.unreduced).__name__
        if tree is None:
            return ShapeError(
                f"{loss} was expected to see {name}, but there are none: it compares outputs with targets",
                fix="a stream with targets, or a function loss(outputs, targets) that needs none",
            )
        shapes = [f"{at} {tuple(leaf.shape)}" for at, leaf in zip(leaf_names(tree), tensors(tree), strict=True)]
        entry = repr(next(iter(tree))) if isinstance(tree, Mapping) and tree else "0"
        chosen = {"outputs": "outputs", "targets": "targets"} | {name: f"{name}[{entry}]"}
        return ShapeError(
            f"{loss} was expected to see one tensor of {name}, but a {type(tree).__name__} of {', '.join(shapes)} "
            "came: it is not said which of them to compare",
            fix=f"loss=lambda outputs, targets: {self.example(**chosen)}, or a dict of several such terms",
        )

    @abstractmethod
    def example(self, outputs: str, targets: str) -> str:
        """Return how the loss is called without the mean over steps and lanes, as code."""

    @abstractmethod
    def fit(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse tensors of other shapes than the loss takes."""

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the losses by step, shape (T, B)."""

    @abstractmethod
    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return their sum, 0-dim."""


class _ClassLoss(_TorchLoss):
    """Over classes: outputs (T, B, C) against targets (T, B)."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._apply(self.unreduced, outputs, targets).view(outputs.shape[:2])

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._apply(self.summed, outputs, targets)

    def example(self, outputs: str, targets: str) -> str:
        flat = f"{outputs}.flatten(0, 1), {targets}.flatten()"
        return f'F.cross_entropy({flat}, reduction="none").view({targets}.shape)'

    def fit(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 3 or targets.shape not in (outputs.shape[:2], outputs.shape):
            raise ShapeError(
                f"{type(self.unreduced).__name__} was expected to see outputs (T, B, C), class last, and targets "
                f"(T, B), but outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} came",
                fix="let the model end in nn.Linear(hidden, classes), and give class indices as targets",
            )

    def _apply(self, loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            return loss.forward(outputs.flatten(0, 1), targets.flatten(0, 1))
        except (IndexError, RuntimeError) as error:
            wrong = None if targets.is_floating_point() else _wrong_class(targets, outputs.shape[2])
            if wrong is None:
                raise
            raise wrong from error


class _ElementLoss(_TorchLoss):
    """Over elements: outputs and targets of one shape (T, B, ...)."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._apply(self.unreduced, outputs, targets)
        return losses if losses.ndim == 2 else losses.flatten(2).mean(2)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = self._apply(self.summed, outputs, targets)
        return total if outputs.ndim == 2 else total / outputs.shape[2:].numel()

    def example(self, outputs: str, targets: str) -> str:
        return f'F.mse_loss({outputs}, {targets}, reduction="none").mean(-1)'

    def fit(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape:  # torch would broadcast, and compare every lane with every other
            raise ShapeError(
                f"{type(self.unreduced).__name__} was expected to see outputs and targets of one shape, but outputs "
                f"{tuple(outputs.shape)} and targets {tuple(targets.shape)} came",
                fix="outputs.squeeze(-1) in the model, or targets.unsqueeze(-1) in the stream",
            )

    def _apply(self, loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
        return loss.forward(outputs, targets if targets.dtype == outputs.dtype else targets.to(outputs.dtype))


def _reduced(loss: nn.Module, reduction: str) -> nn.Module:
    other = copy.copy(loss)
    vars(other)["reduction"] = reduction
    return other


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


def _wrong_class(targets: Tensor, classes: int) -> ShapeError | None:
    wrong = ((targets < 0) | (targets >= classes)).nonzero()
    if not len(wrong):
        return None
    step, lane = wrong[0].tolist()
    return ShapeError(
        f"targets in 0..{classes - 1} were expected, since the outputs have {classes} classes, but target "
        f"{int(targets[step, lane])} stands at step {step} of the window, lane {lane} ({len(wrong)} such)",
        fix=f"give the model at least {int(targets.max()) + 1} outputs, or mask these targets",
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
