"""Does this model really carry its state? An answer by experiment, in seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tbptt.checks.reach import Reach, measure_reach
from tbptt.checks.report import CheckItem, CheckReport
from tbptt.checks.trial import Trial
from tbptt.errors import TbpttError
from tbptt.estimators.base import Estimator
from tbptt.model import check_trainable, fork_random
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["CheckItem", "CheckReport", "Reach", "check", "measure_reach"]


def check(model: nn.Module, example: Window | Tree, estimator: Estimator | None = None) -> CheckReport:
    """Find out by experiment whether `model` carries its state, and how far gradients reach.

    The experiments run on a copy, in double precision where the model allows that, on at most 24 steps of at
    most 4 lanes of the example: one pass against chunks, aligned, uneven and single steps, for outputs and
    for gradients; two chunks before one backward pass; one lane changed; one lane reset.

    Args:
        model: what is to be trained.
        example: a window, or inputs (T, B, ...) alone, like those it will be trained on; at least 3 steps.
        estimator: whose reach to measure, on top of the model's own questions; left out: none.

    Returns:
        The report: false, with the causes, for a model that fails.

    Raises:
        CapabilityError: not a model that could be trained in windows at all.
        ShapeError: an example too short to be cut.

    Cost: about 30 passes over the example, and up to 40 000 steps of the model for the reach.

    Example:
        >>> bool(check(nn.GRU(3, 5), torch.randn(12, 2, 3)))
        True
    """
    check_trainable(model)
    # without cuDNN, whose recurrent layers have no backward pass in eval mode, where dropout is off
    with fork_random(next(model.parameters()).device), torch.backends.cudnn.flags(enabled=False):
        torch.manual_seed(0)
        trial = Trial.prepare(model, example if isinstance(example, Window) else Window(example))
        return CheckReport(type(model).__name__, tuple(_answers(trial, estimator)))


def _answers(trial: Trial, estimator: Estimator | None) -> list[CheckItem]:
    questions: list[Callable[[], CheckItem]] = [
        trial.state,
        trial.value_carry,
        trial.gradient_carry,
        trial.in_place,
        trial.lane_independence,
        trial.reset,
    ]
    items = [_ask(question) for question in questions]
    if estimator is not None and all(item.passed for item in items):
        items.append(_ask(lambda: trial.reach(estimator), "reach"))
    return items


def _ask(question: Callable[[], CheckItem], name: str = "") -> CheckItem:
    try:
        return question()
    except (TbpttError, RuntimeError, ValueError, TypeError, IndexError) as error:
        name = name or question.__name__.replace("_", " ")
        fix = error.fix if isinstance(error, TbpttError) else ""
        message = error.message if isinstance(error, TbpttError) else f"{type(error).__name__}: {error}"
        return CheckItem(name, False, "could not be run", message, fix)
