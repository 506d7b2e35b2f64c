"""Does this model really carry its state? An answer by experiment, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tbptt.checks.carry import detached_training, gradient_carry, value_carry
from tbptt.checks.lanes import in_place_safety, lane_independence, reset, state
from tbptt.checks.pathways import pathways
from tbptt.checks.precision import without_autocast
from tbptt.checks.reach import Reach, measure_reach, reach
from tbptt.checks.report import CheckItem, CheckReport
from tbptt.checks.rounding import rounding
from tbptt.checks.trial import Trial
from tbptt.errors import TbpttError
from tbptt.estimators.base import Estimator
from tbptt.model import check_trainable, fork_random
from tbptt.streams.base import Stream
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["CheckItem", "CheckReport", "Reach", "check", "check_on_stream", "measure_reach"]

_QUESTIONS: list[Callable[[Trial], CheckItem]] = [
    value_carry,
    gradient_carry,
    detached_training,
    in_place_safety,
    lane_independence,
    reset,
]


def check(
    model: nn.Module,
    example: Window | Tree,
    estimator: Estimator | None = None,
    *,
    chunks: Sequence[int] | None = None,
) -> CheckReport:
    """Find out by experiment whether `model` carries its state, and how far gradients reach.

    The experiments run on a copy, in double precision where the model allows that: one pass against chunks,
    aligned, uneven and single steps, for outputs and for gradients; training cut at each chunk; two chunks
    before one backward pass; one lane changed; one lane reset; and of a model that says by which ways its past comes
    (`tbptt.pathways`), whether each is used and sends a gradient back. Where part of the model computes in float32
    whatever it is asked for, what rounding does to it is measured and allowed for. A model of 16 bits is tried
    in its own precision, too: there, chunks may be no farther from the copy than rounding takes one pass.

    Args:
        model: what is to be trained.
        example: a window, or inputs (T, B, ...) alone, like those it will be trained on; at least 3 steps, of
            which at most 24 are used, and at most 4 lanes; all steps where the model does not take so few. For a model
            with segments, at least three of them.
        estimator: whose reach to measure, on top of the model's own questions; left out: none.
        chunks: lengths of the chunks, two or more; left out: three of a third each.

    Returns:
        The report: false, with causes and fixes, for a model that fails. A limit that the model itself speaks of,
        by an error, is noted and is no failure.

    Raises:
        CapabilityError: not a model that could be trained in windows at all.
        ShapeError: an example too short to be cut.
        ConfigError: chunks that are none.

    Cost: about 40 passes over the example, and up to 40 000 steps of the model for the reach.

    Example:
        >>> bool(check(nn.GRU(3, 5), torch.randn(12, 2, 3)))
        True
    """
    check_trainable(model)
    window = example if isinstance(example, Window) else Window(example)
    # without cuDNN, whose recurrent layers have no backward pass in eval mode, where dropout is off
    device, autocast = next(model.parameters()).device, without_autocast(model, window.inputs)
    with fork_random(device), torch.backends.cudnn.flags(enabled=False), autocast:
        torch.manual_seed(0)
        trial = Trial.prepare(model, window, chunks)
        items = [_ask(lambda: state(trial), "state")]
        if items[0].passed:  # without a state there is nothing else to ask
            items += [_ask(lambda ask=ask: ask(trial), ask.__name__) for ask in _QUESTIONS]
            items += _pathways(trial)
            if trial.half is not None and all(item.passed for item in items):
                items.append(_ask(lambda: rounding(trial), "rounding"))
        if estimator is not None and all(item.passed for item in items):
            takes_steps = not isinstance(items[1].measured.get("steps"), str)
            items.append(_ask(lambda: reach(trial, estimator, takes_steps=takes_steps), "reach"))
            items += _exactness(trial, estimator)
        return CheckReport(_name(model), trial.tried, tuple(items))


def check_on_stream(model: nn.Module, stream: Stream, estimator: Estimator, steps: int) -> CheckReport:
    """Check `model` on the first steps of a stream, which is afterwards where it was.

    Args:
        model: what is to be trained.
        stream: what it is to be trained on.
        estimator: whose reach to measure.
        steps: of a window. Three windows are read, for a model that takes no other length; most need fewer steps.
    """
    place = stream.state_dict()
    stream.rewind()
    try:
        example = stream.read(max(24, 3 * min(steps, 1024)))
    finally:
        stream.load_state_dict(place)
    return check(model, example.to(next(model.parameters()).device), estimator)


def _name(model: nn.Module) -> str:
    inner = dict(model.named_children()).get("module")
    return type(model).__name__ if inner is None else f"{type(model).__name__}({type(inner).__name__})"


def _pathways(trial: Trial) -> list[CheckItem]:
    """Return by which ways the past comes, of a model that has several and says so; else nothing."""
    item = _ask(lambda: pathways(trial) or CheckItem("pathways", "ok", ""), "pathways")
    return [item] if item.detail else []


def _exactness(trial: Trial, estimator: Estimator) -> list[CheckItem]:
    """Return what of its promise an estimator does not keep for a model, or why it does not take it; else nothing."""
    item = _ask(lambda: CheckItem("exactness", "note", estimator.limits(trial.model, trial.window.inputs)), "exactness")
    return [item] if item.detail else []


def _ask(question: Callable[[], CheckItem], name: str) -> CheckItem:
    try:
        return question()
    except Exception as error:  # whatever goes wrong in a model is an answer, and belongs on the page
        fix = error.fix if isinstance(error, TbpttError) else ""
        message = error.message if isinstance(error, TbpttError) else f"{type(error).__name__}: {error}"
        return CheckItem(name.replace("_", " "), "fail", "could not be run", message, fix)
