"""The losses of torch.nn, step by step.

Letters: T time, B lanes, C classes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.tree import Tree, leaf_names, tensors

__all__ = ["FUNCTIONS", "TorchLoss", "of_torch", "wrong_class"]

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
FUNCTIONS: dict[object, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def of_torch(loss: nn.Module) -> TorchLoss:
    """Return a loss of torch.nn in its unreduced form.

    Raises:
        ConfigError: `reduction="sum"`, which would have to be ignored.
        CapabilityError: it does not compare outputs with targets, step by step.
    """
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
    kind = _ClassLoss if isinstance(loss, _BY_CLASS) else _ElementLoss
    return kind(_reduced(loss, "none"), _reduced(loss, "sum"))


@dataclass(frozen=True)
class TorchLoss(ABC):
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


class _ClassLoss(TorchLoss):
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
            wrong = None if targets.is_floating_point() else wrong_class(targets, outputs.shape[2])
            if wrong is None:
                raise
            raise wrong from error


class _ElementLoss(TorchLoss):
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


def wrong_class(targets: Tensor, classes: int) -> ShapeError | None:
    """Return a refusal of the first target that is no class; None where there is none."""
    wrong = ((targets < 0) | (targets >= classes)).nonzero()
    if not len(wrong):
        return None
    step, lane = wrong[0].tolist()
    return ShapeError(
        f"targets in 0..{classes - 1} were expected, since the outputs have {classes} classes, but target "
        f"{int(targets[step, lane])} stands at step {step} of the window, lane {lane} ({len(wrong)} such)",
        fix=f"give the model at least {int(targets.max()) + 1} outputs, or mask these targets",
    )
