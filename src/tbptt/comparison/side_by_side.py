"""`tbptt.compare`: the measurements, one after the other."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import nn
from torch.optim import Optimizer

from tbptt.checks import check
from tbptt.comparison.costs import Cost, costs
from tbptt.comparison.excerpt import Excerpt, plan, read
from tbptt.comparison.failures import Failures
from tbptt.comparison.figures import Figures, figures
from tbptt.comparison.gradients import Draws, Reference, draw, full_gradients
from tbptt.comparison.notes import notes_on
from tbptt.comparison.races import BuildOptimizer, Race, race
from tbptt.comparison.result import Comparison, Curve, Row
from tbptt.comparison.settings import copied, named, prepared
from tbptt.errors import CapabilityError, ConfigError, EndOfStream
from tbptt.estimators.base import Estimator
from tbptt.guards.base import Guard, check_guards
from tbptt.loss import Loss, StepLoss
from tbptt.metrics import Metric
from tbptt.model import check_trainable
from tbptt.randomness import random_state, set_random_state
from tbptt.streams.arrays import check_whole
from tbptt.streams.base import Stream
from tbptt.window import Window

__all__ = ["compare"]

_EXAMPLE = 24
"""Steps; only for what an estimator adds to the model, which most take one at a time."""


def compare(
    estimators: Mapping[str, Estimator] | Sequence[Estimator],
    model: nn.Module,
    stream: Stream,
    *,
    loss: Loss,
    optimizer: BuildOptimizer | None = None,
    seconds: float | None = None,
    updates: int | None = None,
    guards: Sequence[Guard] = (),
    held_out: Stream | None = None,
    metrics: Mapping[str, Metric] | None = None,
    points: int = 8,
    span: int | None = None,
    burn_in: int | None = None,
    longest: int | None = None,
    repeats: int = 8,
    seed: int = 0,
) -> Comparison:
    """Measure what each estimator's gradient is worth, what it costs, and how far training gets with it.

    Gradients first, with the weights as they are and dropout off: after a burn-in the stream is cut into spans, and in
    each the estimator's gradient is set against full back-propagation to the first step that was read. A span's
    estimate is the mean of its windows' gradients, weighted by the losses that each injects, so that estimators with
    short and with long windows are judged on the same losses. Then time and memory, of all in turn. Then, where there
    is an optimizer, a race: training from the same weights on the same data, by turns of half a second, each estimator
    on a clock of its own.

    The model, the streams and the random generators are afterwards as they were. An estimator that fails or
    diverges does not stop the others: its row says why, and its curve ends there.

    Args:
        estimators: by name, or in a sequence; without names they are called as they are written.
        model: the model, with the weights to compare at and to start from.
        stream: what to read, from where it is.
        loss: as for training.
        optimizer: parameters -> optimizer, such as `torch.optim.Adam`; None: no race.
        seconds: of its own clock that each estimator trains for.
        updates: that each makes; with `seconds` as well, whichever is over first.
        guards: in the race, between estimate and optimizer; gradients are compared without. Where one changes
            the mean of an unbiased estimator without `allow_bias=True`, that one does not race, and its row says why.
        held_out: what to validate on during the race, ten times, off the clock; afterwards rewound.
        metrics: what to measure there besides the loss, by name.
        points: how many spans.
        span: steps of each; left out: a common multiple of the windows' lengths, 32 at least, or the longest of them
            where that is more than four times as long.
        burn_in: steps before the first span, which the full gradient reaches back at least; left out: twice the longest
            look-back, from 256 to 1024.
        longest: steps before a span that the full gradient need not go beyond, to save memory; left out: all.
        repeats: how often a random estimator is asked, 3 at least; one found not to be random is asked twice.
        seed: of the repeats and of the race.

    Raises:
        ConfigError: settings that cannot be meant, or no target that counts.
        CapabilityError: a model that cannot be trained in windows, or an optimizer that is one already.
        CheckError: a model that does not carry its state.
        StreamError: the stream's pass has fewer steps than burn-in and spans.
        Exception: what the first estimator raised, if all of them failed to give a gradient.

    Exactness: the reference is exact for the losses of the spans back to the first step read, 0 to rounding for an
        estimator that reaches so far (tests/comparison/test_gradients.py); bias is corrected for the noise of few
        repeats. With one span more the figures would be others: intervals are over points and repeats.
    Cost: memory of all steps read, B lanes and their graph, for the reference; points x (repeats + 1) gradients. Time
        of (points + 1) / 2 passes over them, of `repeats` for each random estimator, and of the races.

    Example:
        >>> from tbptt.estimators import TBPTT
        >>> from tbptt.streams import ArrayStream
        >>> stream = ArrayStream(torch.randn(1000, 3), torch.randn(1000, 3), lanes=2)
        >>> found = compare([TBPTT(k1=4, k2=4), TBPTT(k1=4, k2=64)], nn.GRU(3, 3), stream, loss=nn.MSELoss(), points=2)
        >>> [row.name for row in found.rows], found.rows[0].relative_bias > found.rows[1].relative_bias
        (['TBPTT(k1=4, k2=4)', 'TBPTT(k1=4, k2=64)'], True)
    """
    chosen = named(estimators)
    _check_sizes(points=(points, 1), span=(span, 1), burn_in=(burn_in, 0), longest=(longest, 1), repeats=(repeats, 3))
    _check_sizes(seed=(seed, 0))
    if seed >= 2**32:
        raise ConfigError(f"a seed below 2**32 was expected, as numpy takes it, but {seed} came", fix="seed=0")
    setting = _race(optimizer, seconds, updates, guards, held_out, metrics or {}, stream)
    check_guards(guards, None)
    check_trainable(model)
    step_loss, failures = StepLoss.of(loss), Failures()
    with _left_alone(stream, held_out):
        with _left_alone(stream, held_out):
            inputs = _example(stream).to(next(model.parameters()).device).inputs
        sizes = plan(chosen, model, stream.lanes, inputs, failures, points=points, span=span, burn_in=burn_in)
        with _left_alone(stream, held_out):
            excerpt = read(stream, sizes, next(model.parameters()).device)
        check(model, excerpt.window).raise_if_failed()
        reference, drawn = _gradients(model, chosen, step_loss, excerpt, longest, repeats, seed, failures)
        spent = costs(model, failures.sound(chosen), step_loss, excerpt, seed, failures)
        curves: dict[str, Curve] = {}
        if setting is not None:
            runs = race(model, failures.sound(chosen), step_loss, stream, setting, inputs, seed, failures)
            curves = {name: runs.get(name, Curve()) for name in chosen}
    worth = {name: figures(each.errors, reference.gradients) for name, each in drawn.items() if each.finite}
    rows = tuple(
        _row(name, each, worth.get(name), drawn.get(name), spent.get(name), curves.get(name), failures)
        for name, each in chosen.items()
    )
    notes = notes_on(failures.sound(chosen), model, inputs, sizes, reference, longest)
    return Comparison(rows, curves, len(reference.points), sizes.span, reference.reach, notes)


def _gradients(
    model: nn.Module,
    estimators: Mapping[str, Estimator],
    loss: StepLoss,
    excerpt: Excerpt,
    longest: int | None,
    repeats: int,
    seed: int,
    failures: Failures,
) -> tuple[Reference, dict[str, Draws]]:
    """Return the full gradients, and what each estimator that does not fail makes of them."""
    still, its = copied(model, loss)
    for module in (still, its.module):
        if module is not None:
            module.eval()
    drawn: dict[str, Draws] = {}
    with torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no backward pass in eval mode
        reference = full_gradients(still, its, excerpt, longest)
        for name, estimator in failures.sound(estimators).items():
            with failures.kept(name):
                example = excerpt.window[: excerpt.sizes.span].inputs
                its_own, its_loss = prepared(still, its, estimator, example)
                drawn[name] = draw(its_own, estimator, its_loss, excerpt, reference, repeats=repeats, seed=seed)
                if not drawn[name].finite:
                    failures.add(name, "its gradient at the points compared is not finite")
    failures.raise_if_all(estimators)
    return reference, drawn


def _row(
    name: str,
    estimator: Estimator,
    worth: Figures | None,
    drawn: Draws | None,
    cost: Cost | None,
    curve: Curve | None,
    failures: Failures,
) -> Row:
    curve = curve or Curve()
    measured = {**(asdict(worth) if worth else {}), **(asdict(cost) if cost else {})}
    return Row(
        name=name,
        estimator=repr(estimator),
        kind=estimator.kind,
        lookback=drawn.lookback if drawn else math.nan,
        updates=curve.updates[-1] if curve.updates else 0,
        final_loss=curve.train_loss[-1] if curve.train_loss else math.nan,
        final_validation=curve.validation_loss[-1] if curve.validation_loss else math.nan,
        failed=failures.reasons.get(name, ""),
        **measured,
    )


def _example(stream: Stream) -> Window:
    """Return a few steps for a model to be run on; afterwards the stream is elsewhere."""
    try:
        return stream.read(_EXAMPLE)
    except EndOfStream:
        stream.rewind()
        return stream.read(_EXAMPLE)


@contextmanager
def _left_alone(*streams: Stream | None) -> Generator[None]:
    """Leave the random generators and the streams' cursors as they were."""
    given = [each for each in streams if each is not None]
    places, random = [each.state_dict() for each in given], random_state()
    try:
        yield
    finally:
        for each, place in zip(given, places, strict=True):
            each.load_state_dict(place)
        set_random_state(random)


def _check_sizes(**sizes: tuple[int | None, int]) -> None:
    for name, (value, least) in sizes.items():
        if value is not None:
            check_whole(name, value, least)


def _race(
    optimizer: BuildOptimizer | None,
    seconds: float | None,
    updates: int | None,
    guards: Sequence[Guard],
    held_out: Stream | None,
    metrics: Mapping[str, Metric],
    stream: Stream,
) -> Race | None:
    """Return how to train, or None where nothing is to be trained.

    Raises:
        ConfigError: settings that cannot be meant together.
        CapabilityError: an optimizer instead of what makes one.
    """
    if isinstance(optimizer, Optimizer):
        raise CapabilityError(
            f"a function that makes an optimizer of parameters was expected, but a {type(optimizer).__name__} came: it "
            "is bound to one model, and each estimator trains a copy of its own",
            fix=f"optimizer=lambda parameters: torch.optim.{type(optimizer).__name__}(parameters, lr=...)",
        )
    if optimizer is None:
        given = {"seconds": seconds, "updates": updates, "guards": guards, "held_out": held_out, "metrics": metrics}
        for name, value in given.items():
            if value is not None and value != () and value != {}:
                raise ConfigError(
                    f"an optimizer was expected together with {name}, but none came: without one nothing is trained",
                    fix="optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3)",
                )
        return None
    if seconds is None and updates is None:
        raise ConfigError("it is not said how long each estimator trains", fix="seconds=30, or updates=1000")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(
            f"seconds were expected to be a number above 0, but are {seconds!r}: no training would fit in",
            fix="seconds=30",
        )
    if updates is not None:
        check_whole("updates", updates, 1)
    if metrics and held_out is None:
        raise ConfigError(
            "a held-out stream was expected together with metrics, but none came: there is nothing to measure them on",
            fix="held_out=ArrayStream(...) of data that are not trained on",
        )
    if held_out is stream:
        raise ConfigError(
            "a held-out stream of its own was expected, but it is the one to train on: validating would move that",
            fix="held_out=ArrayStream(...) of data that are not trained on",
        )
    return Race(optimizer, seconds, updates, guards, held_out, metrics)
