"""What the same model would lose with fresh weights: a trained one that is far worse has diverged."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from tbptt.horizon.samples import with_context
from tbptt.horizon.sent import Place
from tbptt.loss import StepLoss

__all__ = ["diverged", "fresh_loss", "has_diverged"]

_RISEN = 3.0
"""How many times the loss of fresh weights a loss must be, as for the alarm `explosion`: noisy data may double it."""


def fresh_loss(model: nn.Module, loss: StepLoss, found: Sequence[Place], steps: int) -> float:
    """Return the mean loss of the places by a copy of the model with weights drawn anew; nan where nothing draws them.

    They are drawn by `reset_parameters()`, which each module must have that holds parameters of its own.

    Args:
        model: stays as it is.
        loss: as for training.
        found: the places.
        steps: of context; weights that have learned nothing make no use of more.
    """
    owners = [name for name, each in model.named_modules() if any(True for _ in each.parameters(recurse=False))]
    fresh = copy.deepcopy(model)
    for name in owners:
        draw = getattr(fresh.get_submodule(name), "reset_parameters", None)
        if draw is None:
            return math.nan
        draw()
    return float(np.mean([with_context(fresh, loss, place, steps) for place in found]))


def has_diverged(loss: float, fresh: float) -> bool:
    """Tell whether a loss is far above that of fresh weights; never where that is unknown, or not above 0."""
    return fresh > 0 and loss > _RISEN * fresh


def diverged(loss: float, fresh: float) -> str:
    """Return in words what `has_diverged` found."""
    return (
        f"the model's loss is {loss:.4g}, and that of the same model with fresh weights {fresh:.4g}: it has diverged, "
        "and its gradients say nothing"
    )
