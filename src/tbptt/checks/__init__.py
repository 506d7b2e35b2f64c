"""Does this model really carry its state? An answer by experiment, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from tbptt.checks.carry import detached_training, gradient_carry, value_carry
from tbptt.checks.lanes import batch_norm, in_place_safety, lane_independence, randomness, reset, state
from tbptt.checks.pathways import pathways
from tbptt.checks.precision import without_autocast
from tbptt.checks.reach import Reach, measure_reach, reach
from tbptt.checks.report import CheckItem, CheckReport
from tbptt.checks.rounding import rounding
from tbptt.checks.trial import Trial
from tbptt.checks.values import Facts, measure_values
from tbptt.checks.windows import Calls, calls_of, steps_needed
from tbptt.errors import ConfigError, TbpttError
from tbptt.estimators.base import Estimator
from tbptt.model import check_trainable
from tbptt.randomness import seed_everything
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["CheckItem", "CheckReport", "Reach", "check", "check_on_stream", "known_items", "measure_reach"]

_Question = Callable[[Trial, Facts, Calls], CheckItem | None]

_QUESTIONS: dict[str, _Question] = {
    "value carry": value_carry,
    "gradient carry": gradient_carry,
    "detached training": lambda trial, facts, calls: detached_training(trial, facts),
    "in-place safety": lambda trial, facts, calls: in_place_safety(trial, facts),
    "lane independence": lambda trial, facts, calls: lane_independence(trial, facts),
    "reset": lambda trial, facts, calls: reset(trial, facts),
    "randomness": lambda trial, facts, calls: randomness(trial, facts),
    "batch norm": lambda trial, facts, calls: batch_norm(trial, facts),
    "pathways": lambda trial, facts, calls: pathways(trial, facts),
}
_NAMES = ("state", *_QUESTIONS, "rounding", "reach")


def check(
    model: nn.Module,
    example: Window | Tree,
    estimator: Estimator | None = None,
    *,
    chunks: Sequence[int] | None = None,
    accept: Iterable[str] = (),
) -> CheckReport:
    """Find out by experiment whether `model` carries its state, and how far gradients reach.

    The experiments run on a copy, in eval and in training mode, with the same random numbers for all runs that are
    compared, in double precision where the model allows that: one pass against chunks, aligned, uneven and single
    steps, for outputs and for gradients; the gradient against central differences; calls as long as the estimator's
    windows and look-back against short ones; training cut at each chunk; two chunks before one backward pass; one lane
    changed; one lane reset; and of a model that says by which ways its past comes (`tbptt.pathways`), whether each is
    used and sends a gradient back. Where a model draws other random numbers in one pass than in chunks, torch's are
    held still, and batch normalisation uses its running statistics. Where part of the model computes in float32
    whatever it is asked for, what rounding does to it is measured and allowed for. A model of 16 bits is tried in its
    own precision, too: there, chunks may be no farther from the copy than rounding takes one pass.

    Args:
        model: what is to be trained.
        example: a window, or inputs (T, B, ...) alone, like those it will be trained on; at least 3 steps. Of them 24
            are used, of two lanes (four to see whether lanes mix), and of the estimator's windows all that there are,
            up to 1024; all steps where the model does not take so few. For a model with segments, at least three.
        estimator: whose windows and reach to try, on top of the model's own questions; left out: none.
        chunks: lengths of the chunks, two or more; left out: three of a third each.
        accept: names of items whose failure is known and accepted, such as "lane independence": they become notes.

    Returns:
        The report: false, with causes and fixes, for a model that fails. A limit that the model itself speaks of,
        by an error, is noted and is no failure.

    Raises:
        CapabilityError: not a model that could be trained in windows at all.
        ShapeError: an example too short to be cut.
        ConfigError: chunks that are none, or an unknown item to accept.

    Cost: about 30 passes over 24 steps, three over the longest call, and up to 40 000 steps of the model for the reach:
        of an LSTM of 32 lanes x 1024 as much time as some 7 updates of TBPTT(64, 64) (benchmarks/speed/check.py).

    Example:
        >>> bool(check(nn.GRU(3, 5), torch.randn(12, 2, 3)))
        True
    """
    accepted = known_items(accept)
    check_trainable(model)
    window = example if isinstance(example, Window) else Window(example)
    device, autocast = next(model.parameters()).device, without_autocast(model, window.inputs)
    # without cuDNN, whose recurrent layers have no backward pass in eval mode, where dropout is off
    with preserved(device=device), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), autocast:
        seed_everything(0)
        trial = Trial.prepare(model, window, chunks)
        items = [_ask(lambda: state(trial), "state", accepted)]
        if not items[0].passed:  # without a state there is nothing else to ask
            return CheckReport(_name(model), trial.tried, tuple(items))
        try:
            facts = Facts(measure_values(trial, train=False), measure_values(trial, train=True))
        except Exception as error:  # what goes wrong in one pass
            items.append(_went_wrong("value carry", error))
            return CheckReport(_name(model), trial.tried, tuple(items))
        calls = calls_of(trial, estimator)
        for name, question in _QUESTIONS.items():
            item = _ask(lambda question=question: question(trial, facts, calls), name, accepted)
            items += [item] if item.detail else []
        if trial.half is not None and all(item.passed for item in items):
            items.append(_ask(lambda: rounding(trial, facts), "rounding", accepted))
        if estimator is not None and all(item.passed for item in items):
            takes_steps = not isinstance(items[1].measured.get("steps"), str)
            items.append(_ask(lambda: reach(trial, estimator, takes_steps=takes_steps), "reach", accepted))
            items += _exactness(trial, estimator)
        return CheckReport(_name(model), _tried(trial, calls), tuple(items))


def known_items(accept: Iterable[str], *, checked: bool = True) -> frozenset[str]:
    """Return the items of a check whose failure is accepted.

    Raises:
        ConfigError: a name of none, or names for a check that is not made.
    """
    names = [accept] if isinstance(accept, str) else list(accept)
    if names and not checked:
        raise ConfigError(
            f"a check was expected for accept={names!r}, but checked=False came: nothing would be asked, and nothing "
            "accepted",
            fix="leave checked=False out: what is accepted does not stop the training",
        )
    unknown = [name for name in names if name not in _NAMES]
    if unknown:
        raise ConfigError(
            f"names of items of the check were expected to be accepted, {', '.join(_NAMES)}, but {unknown[0]!r} came: "
            "nothing would be accepted by it",
            fix='accept=["lane independence"]',
        )
    return frozenset(names)


def _tried(trial: Trial, calls: Calls) -> str:
    words = f"{trial.tried}, in eval and in training mode"
    words += "".join(f"; {name} steps" for name in calls.plans)
    return words + (f"; not tried: {calls.untried}" if calls.untried else "")


def check_on_stream(
    model: nn.Module, stream: Stream, estimator: Estimator, steps: int, accept: Iterable[str] = ()
) -> CheckReport:
    """Check `model` on the first steps of a stream, which is afterwards where it was.

    Args:
        model: what is to be trained.
        stream: what it is to be trained on.
        estimator: whose reach to measure.
        steps: of a window. Three windows are read, for a model that takes no other length, or as many steps as the
            look-back has; most need fewer.
        accept: as in `check`.
    """
    place = stream.state_dict()
    stream.rewind()
    try:
        example = stream.read(steps_needed(estimator, steps))
    finally:
        stream.load_state_dict(place)
    return check(model, example.to(next(model.parameters()).device), estimator, accept=accept)


def _name(model: nn.Module) -> str:
    inner = dict(model.named_children()).get("module")
    return type(model).__name__ if inner is None else f"{type(model).__name__}({type(inner).__name__})"


def _exactness(trial: Trial, estimator: Estimator) -> list[CheckItem]:
    """Return what of its promise an estimator does not keep for a model, or why it does not take it; else nothing."""

    def limits() -> CheckItem:
        return CheckItem("exactness", "note", estimator.limits(trial.model, trial.window.inputs))

    item = _ask(limits, "exactness", frozenset())
    return [item] if item.detail else []


def _ask(question: Callable[[], CheckItem | None], name: str, accepted: frozenset[str]) -> CheckItem:
    """Return the answer to a question; without any detail if it does not concern the model."""
    try:
        item = question() or CheckItem(name, "ok", "")
    except Exception as error:  # whatever goes wrong in a model is an answer, and belongs on the page
        item = _went_wrong(name, error)
    if item.passed or name not in accepted:
        return item
    return replace(item, verdict="note", detail=f"accepted: {item.detail}")


def _went_wrong(name: str, error: Exception) -> CheckItem:
    fix = error.fix if isinstance(error, TbpttError) else ""
    message = error.message if isinstance(error, TbpttError) else f"{type(error).__name__}: {error}"
    return CheckItem(name, "fail", "could not be run", message, fix)
