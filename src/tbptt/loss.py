"""Losses by step, summed over the targets that count.

Letters: T time, B lanes, C classes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.model import trainable_parameters
from tbptt.tree import Tree, tree_map
from tbptt.window import Window

__all__ = ["Loss", "StepLoss"]

Loss: TypeAlias = "Callable[[Tree, Tree], Tensor] | StepLoss"
"""`loss(outputs, targets)` -> losses by step, shape (T, B); or one of torch.nn's own losses."""

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


@dataclass(frozen=True, eq=False)
class StepLoss:
    """A loss made ready: it gives the sum over the valid targets of a window, and their number.

    Args:
        losses: outputs, targets -> losses by step, shape (T, B).
        ignored: a target value that does not count (`ignore_index` of torch's losses), or None.
        module: the loss as it was given, where it is a module: it is moved, saved and put into eval mode with the
            model, and its parameters are trained. None for a function.
    """

    losses: Callable[[Tree, Tree], Tensor]
    ignored: int | None = None
    module: nn.Module | None = None

    @staticmethod
    def of(loss: Loss) -> StepLoss:
        """Make a loss ready: torch.nn's own are taken in their unreduced form.

        Element-wise losses of (T, B, ...) are averaged over the trailing dimensions, so that
        sum / count is torch's own mean; classification losses take outputs (T, B, C), class last, and
        targets (T, B). Class weights scale the losses but not the count.

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
            return StepLoss(by_class, cast("int | None", getattr(loss, "ignore_index", None)), loss)
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

    def by_step(self, outputs: Tree, window: Window) -> tuple[Tensor, Tensor]:
        """Return the losses, zero where a target does not count, and which do; shapes (T, B).

        The loss never sees a target that the mask leaves out: it is set to zero first, so that a NaN
        that stands for a missing value cannot reach the gradient.

        Raises:
            ShapeError: the loss is not of shape (T, B), or a class lies outside the outputs.
        """
        valid, count = self.valid(window)
        targets = window.targets
        if count < valid.numel():
            targets = tree_map(lambda leaf: _fill(leaf, valid), targets)
        losses = self.losses(outputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != valid.shape:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _wrong_shape(losses, valid)
        return (losses if count == valid.numel() else torch.where(valid, losses, 0.0)), valid

    def total(self, outputs: Tree, window: Window) -> tuple[Tensor, int]:
        """Return the sum of the losses over the window's valid targets, 0-dim, and their number."""
        count = self.valid(window)[1]
        if count == window.mask.numel() and isinstance(self.losses, _TorchLoss) and isinstance(window.targets, Tensor):
            return self.losses.total(outputs, window.targets), count  # torch's own sum: one kernel, not three
        return self.by_step(outputs, window)[0].sum(), count


@dataclass(frozen=True)
class _TorchLoss(ABC):
    """A loss of torch.nn, as it is for each target, and summed."""

    unreduced: nn.Module
    summed: nn.Module

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

    def _apply(self, loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim != 3 or targets.shape not in (outputs.shape[:2], outputs.shape):
            raise ShapeError(
                f"{type(loss).__name__} was expected to see outputs (T, B, C), class last, and targets "
                f"(T, B), but outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} came",
                fix="let the model end in nn.Linear(hidden, classes), and give class indices as targets",
            )
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

    def _apply(self, loss: nn.Module, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:  # torch would broadcast, and compare every lane with every other
            raise ShapeError(
                f"{type(loss).__name__} was expected to see outputs and targets of one shape, but outputs "
                f"{tuple(outputs.shape)} and targets {tuple(targets.shape)} came",
                fix="outputs.squeeze(-1) in the model, or targets.unsqueeze(-1) in the stream",
            )
        return loss.forward(outputs, targets if targets.dtype == outputs.dtype else targets.to(outputs.dtype))


def _reduced(loss: nn.Module, reduction: str) -> nn.Module:
    other = copy.copy(loss)
    vars(other)["reduction"] = reduction
    return other


def _fill(targets: Tensor, valid: Tensor) -> Tensor:
    return targets.masked_fill(~valid.view(valid.shape + (1,) * (targets.ndim - 2)), 0)


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


def _wrong_shape(losses: object, valid: Tensor) -> ShapeError:
    steps, lanes = valid.shape
    came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
    return ShapeError(
        f"the loss was expected to return one value for each step and lane, shape (T, B) = ({steps}, {lanes}), "
        f"but returned {came}: a loss that was already averaged cannot be weighted by the targets that count",
        fix='leave out the mean: F.mse_loss(outputs, targets, reduction="none").mean(-1)',
    )
