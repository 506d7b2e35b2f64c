"""What a model is judged by, besides its loss.

Letters: T time, B lanes, C classes, N targets that count.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tbptt.errors import ConfigError
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["Accuracy", "AreaUnderCurve", "BitsPerStep", "Metric", "metric"]


class Metric(ABC):
    """A number about a whole pass, collected window by window."""

    @abstractmethod
    def start(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def see(self, outputs: Tree, losses: Tensor, window: Window) -> None:
        """See one window: the outputs, the losses of its valid targets, shape (N,), and the window."""

    @abstractmethod
    def result(self) -> float:
        """Return the number; NaN when it is not defined for what was seen."""


class BitsPerStep(Metric):
    """The mean loss in bits: for text bits per character, if the loss is the cross-entropy in nats."""

    def start(self) -> None:
        """Forget what was seen."""
        self._sum, self._count = 0.0, 0

    def see(self, outputs: Tree, losses: Tensor, window: Window) -> None:
        """See one window."""
        del outputs, window  # the losses say it all
        self._sum += float(losses.double().sum())
        self._count += losses.numel()

    def result(self) -> float:
        """Return sum / count / ln 2."""
        return self._sum / self._count / math.log(2) if self._count else math.nan


class Accuracy(Metric):
    """The share of targets that are the most probable class; outputs (T, B, C)."""

    def start(self) -> None:
        """Forget what was seen."""
        self._right, self._count = 0, 0

    def see(self, outputs: Tree, losses: Tensor, window: Window) -> None:
        """See one window."""
        del losses  # not needed
        right = outputs.argmax(-1) == window.targets
        self._right += int(right[window.mask].sum())
        self._count += window.num_targets

    def result(self) -> float:
        """Return right / count."""
        return self._right / self._count if self._count else math.nan


class AreaUnderCurve(Metric):
    """The area under the ROC curve: how often a positive step is scored above a negative one.

    For outputs (T, B) that grow with the probability of target 1; ties count half. Keeps all scores of a pass.

    Reference: Mann & Whitney (1947); the rank form.
    """

    def start(self) -> None:
        """Forget what was seen."""
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []

    def see(self, outputs: Tree, losses: Tensor, window: Window) -> None:
        """See one window."""
        del losses  # not needed
        assert isinstance(window.targets, Tensor)
        self._scores.append(outputs[window.mask].double().cpu())
        self._labels.append(window.targets[window.mask].cpu() > 0.5)

    def result(self) -> float:
        """Return the area; NaN when all targets are alike."""
        scores, labels = torch.cat(self._scores), torch.cat(self._labels)
        positive, negative = int(labels.sum()), int((~labels).sum())
        if not positive or not negative:
            return math.nan
        _, tie, size = scores.unique(return_inverse=True, return_counts=True)
        last = size.cumsum(0).double()
        ranks = (last - (size - 1) / 2)[tie]  # tied scores share the middle of their ranks
        return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


_METRICS: dict[str, type[Metric]] = {"bits": BitsPerStep, "accuracy": Accuracy, "auc": AreaUnderCurve}


def metric(name: str) -> Metric:
    """Return the metric of this name: bits, accuracy or auc.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _METRICS:
        raise ConfigError(f"a metric of {', '.join(_METRICS)} was expected, but {name!r} came")
    return _METRICS[name]()
