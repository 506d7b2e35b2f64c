"""Measure how far back the gradients of a model go.

Letters: B lanes, N probes, L longest lag, K look-backs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from tbptt.checks import check
from tbptt.curve import Floats, dense, lag_grid, needed_lookback
from tbptt.errors import ConfigError, EndOfStream, NonFiniteError
from tbptt.horizon.costs import measure_costs
from tbptt.horizon.fresh import diverged, fresh_loss, has_diverged
from tbptt.horizon.lyapunov import lyapunov_exponents
from tbptt.horizon.report import HorizonReport
from tbptt.horizon.samples import Samples, places, sample, ways_of
from tbptt.horizon.sent import Plan
from tbptt.horizon.statistics import GradientStatistics, band
from tbptt.length.base import is_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable
from tbptt.pathways import segment_steps
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.tree import differentiable

__all__ = ["measure"]

_SHORTEST, _LONGEST = 64, 1024
"""Where the search for a sufficient longest lag begins and ends, when none is given."""
_SEARCH_TOLERANCE = 0.01
_LARGEST_STATE = 512
"""Numbers of one lane's state up to which the Lyapunov exponent is measured: each step takes as many lanes."""
_LYAPUNOV_STEPS = 300


def measure(
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    *,
    max_lag: int | None = None,
    probes: int = 16,
    lookbacks: Sequence[int] | None = None,
    resolution: int | None = None,
    burn_in: int | None = None,
    pathways: bool = True,
    gradients: bool = True,
    context: bool = True,
    costs: bool = True,
    lyapunov: bool = True,
    seed: int = 0,
    checked: bool = True,
) -> HorizonReport:
    """Send single losses far back, and report what arrives where, what each look-back misses, and what it costs.

    A probe is the loss of one step, in all lanes, at a random place of the stream that the state has been carried to.
    Its gradient is followed to the state and to the input k steps before; the parameters' gradient is summed up on the
    way, so that one backward pass gives the gradient of every look-back. The model, its mode, the random generators
    and the stream's cursor stay as they are.

    What is measured belongs to the weights as they are. A model that has not learned yet to use its past has a short
    curve, whatever the task needs: `HorizonReport.learned` and the recommendation say so. Measure again after some
    training; or train with `Adaptive`, which keeps measuring.

    Args:
        model: as for training, in the mode that it trains in.
        loss: as for training.
        stream: data like those of training. Its passes must be longer than max_lag and the burn-in.
        max_lag: how far back, steps, at least 2. Memory for so many is needed. Left out: doubled from 64, up to 1024,
            until a look-back of half of it cuts off less than 1 %, and is context enough.
        probes: losses sent back; at least 3 for an uncertainty.
        lookbacks: the look-backs whose gradients are compared; left out: about four to a doubling.
        resolution: the steps between two lags, for models that take no shorter chunks; left out: those of a segment
            where the model says so (`tbptt.pathways.HasSegments`), else 1.
        burn_in: steps run before the first probe; left out: max_lag.
        pathways: whether to tell apart by which ways the gradient goes back, where a model says which it has
            (`tbptt.pathways.HasPathways`): attention, memory, recurrence.
        gradients: whether to compare the parameters' gradients.
        context: whether to measure the loss with little context.
        costs: whether to measure time and memory of each look-back.
        lyapunov: whether to measure the largest Lyapunov exponent, where the state of a lane has up to 512 numbers
            and the model runs by single steps.
        seed: of the places, and of what the model draws.
        checked: whether to check first that the model carries its state, as the trainer does. Leave it on.

    Raises:
        ConfigError: settings that cannot be meant, or passes too short to look so far back.
        StreamError: no target comes.
        CapabilityError: the model cannot be trained in windows.
        CheckError: the model does not carry its state.
        NonFiniteError: a weight, a loss or a gradient is not a finite number.

    Exactness: each probe's gradients are exact (autograd) for its look-back; up to 32768 parameters so are their inner
        products, beyond they are sketched (`Sketch`). The closed forms are in tests/horizon.
    Cost: a probe is a forward and a backward pass over max_lag steps in as many pieces as there are lags, and with
        context a forward pass for each look-back. Telling ways apart: one piece for each step, or segment, and a
        backward pass for each way.

    Example:
        >>> import torch, tbptt
        >>> stream = tbptt.ArrayStream(torch.randn(4000, 3), torch.randn(4000, 8), lanes=4)
        >>> model = torch.nn.GRU(3, 8)
        >>> report = measure(model, torch.nn.MSELoss(), stream, max_lag=40, probes=4, costs=False)
        >>> report.recommend(tolerance=0.1).needed < 40
        True
    """
    check_trainable(model)
    segment = segment_steps(model)
    resolution = segment if resolution is None else resolution
    settings = {"max_lag": max_lag, "probes": probes, "resolution": resolution, "burn_in": burn_in}
    _check(settings)
    _check_segments(resolution, segment)
    _refuse_broken(model)
    if checked:
        _refuse_unfit(model, stream, resolution)
    step_loss = StepLoss.of(loss).by_single_steps("horizon.measure")
    start = stream.state_dict()
    device = next(model.parameters()).device
    try:
        with preserved(model, device=device):
            torch.manual_seed(seed)
            longest, notes = (
                (max_lag, []) if max_lag is not None else _search(model, step_loss, stream, resolution, seed)
            )
            plan = _plan(longest, lookbacks, resolution, gradients, context)
            stream.load_state_dict(start)
            draws = np.random.default_rng(seed)
            before = plan.longest if burn_in is None else burn_in
            found = places(model, step_loss, stream, plan.longest, probes, before, draws, resolution)
            if pathways:
                plan = replace(plan, ways=ways_of(model, found[-1], resolution))
            seen = sample(model, step_loss, found, plan)
            statistics = None if seen.gradients is None else GradientStatistics(seen.gradients)
            learned = None if seen.context is None else _uses_its_past(seen.context[:, 0], seen.losses)
            loss_of_fresh = fresh_loss(model, step_loss, found, resolution)
            notes += _notes(seen, statistics, learned, loss_of_fresh)
            at = plan.lookbacks
            return HorizonReport(
                state=band(plan.lags, seen.state),
                inputs=None if seen.inputs is None else band(range(plan.longest), seen.inputs),
                bias=None if statistics is None else statistics.bias(at),
                cosine=None if statistics is None else statistics.cosine(at),
                signed=None if statistics is None else statistics.signed(at),
                context=None if seen.context is None else band(at, seen.context),
                costs=measure_costs(model, step_loss, found[0], at) if costs else None,
                lyapunov=_exponent(model, step_loss, stream, seed) if lyapunov and resolution == 1 else None,
                loss=float(seen.losses.mean()),
                learned=learned,
                probes=probes,
                lanes=found[0].window.lanes,
                max_lag=plan.longest,
                samples=seen.state,
                single=None if statistics is None else statistics.single,
                model=type(model).__name__,
                notes=tuple(notes),
                fresh_loss=loss_of_fresh,
                resolution=resolution,
                pathways=seen.ways,
            )
    finally:
        stream.load_state_dict(start)


def _check(settings: dict[str, Any]) -> None:
    least = {"max_lag": 2, "probes": 1, "resolution": 1, "burn_in": 0}
    for name, value in settings.items():
        if value is not None and (not is_whole(value) or value < least[name]):
            raise ConfigError(
                f"{name} was expected to be a whole number, at least {least[name]}, but is {value!r}",
                fix="tbptt.horizon.measure(model, loss, stream, max_lag=256)",
            )


def _check_segments(resolution: int, segment: int) -> None:
    if resolution % segment:
        raise ConfigError(
            f"a resolution in multiples of the model's segments of {segment} steps was expected, but {resolution} "
            "came: it can be cut at their ends only",
            fix=f"resolution={segment}, or leave it out",
        )


def _refuse_broken(model: nn.Module) -> None:
    broken = [name for name, each in model.named_parameters() if not bool(torch.isfinite(each).all())]
    if broken:
        others = f" and {len(broken) - 1} others" if len(broken) > 1 else ""
        raise NonFiniteError(
            f"finite weights were expected, but NaN or infinity stands in {broken[0]}{others}: the model has diverged, "
            "and no look-back mends that",
            fix="weights from before it diverged, and from there a lower learning rate and "
            'guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)]',
        )


def _refuse_unfit(model: nn.Module, stream: Stream, resolution: int) -> None:
    """Check the model on the first steps of a pass; passes of fewer than three are refused later, for what they are."""
    start = stream.state_dict()
    stream.rewind()
    try:
        example = stream.read(max(24, 3 * resolution))
    except EndOfStream:
        return
    finally:
        stream.load_state_dict(start)
    if example.steps >= 3:
        check(model, example.to(next(model.parameters()).device)).raise_if_failed()


def _notes(seen: Samples, statistics: GradientStatistics | None, learned: bool | None, fresh: float) -> list[str]:
    loss = float(seen.losses.mean())
    if has_diverged(loss, fresh):
        return [diverged(loss, fresh)]
    notes: list[str] = []
    if statistics is not None and not statistics.is_measurable:
        notes.append(
            "the mean gradient does not stand out of the noise of the probes, so its bias is not measurable: usual "
            "near a minimum; more probes or lanes would tell"
        )
    if learned is False:
        notes.append("the model makes no use of its past yet: the curve is a lower bound; train on, and measure again")
    return notes


def _search(model: nn.Module, loss: StepLoss, stream: Stream, resolution: int, seed: int) -> tuple[int, list[str]]:
    """Return a longest lag that is long enough, as far as a few probes can tell, and notes."""
    start = stream.state_dict()
    longest = _SHORTEST * resolution
    while True:
        plan = _plan(longest, [resolution, longest // 2, longest], resolution, gradients=False, context=True)
        stream.load_state_dict(start)
        try:
            found = places(model, loss, stream, longest, 4, longest, np.random.default_rng(seed), resolution)
        except ConfigError:
            if longest == _SHORTEST * resolution:
                raise
            longest //= 2
            return longest, [f"no lag longer than {longest} steps was tried: a pass of the stream has no room for it"]
        seen = sample(model, loss, found, plan)
        norms = seen.state.mean(0)
        enough = needed_lookback(dense(plan.lags, norms), _SEARCH_TOLERANCE) if norms.any() else 1
        if enough is not None and enough <= longest // 2 and not _wants_more_context(seen):
            return longest, []
        if longest >= _LONGEST * resolution:
            return longest, [f"no lag longer than {longest} steps was tried: say max_lag to look farther back"]
        longest *= 2


def _wants_more_context(seen: Samples) -> bool:
    """Tell whether the loss with half of the longest lag as context is higher than with all of the past."""
    assert seen.context is not None
    alone, half, _ = seen.context.mean(0)
    whole = seen.losses.mean()
    return bool(half - whole > max(0.05 * (alone - whole), 0.01 * abs(whole)))


def _plan(longest: int, lookbacks: Sequence[int] | None, resolution: int, gradients: bool, context: bool) -> Plan:
    if longest % resolution:
        raise ConfigError(
            f"a max_lag in multiples of the resolution of {resolution} steps was expected, but {longest} came",
            fix=f"max_lag={math.ceil(longest / resolution) * resolution}",
        )
    pieces = longest // resolution
    chosen = [each * resolution for each in lag_grid(pieces, dense_up_to=6, ratio=1.2)]
    if lookbacks is not None:
        for each in lookbacks:
            if not is_whole(each) or not 1 <= each <= longest or each % resolution:
                raise ConfigError(
                    f"look-backs from {resolution} to max_lag = {longest} were expected, in multiples of the "
                    f"resolution, but {each!r} came",
                    fix=f"lookbacks={chosen}",
                )
        chosen = sorted({*lookbacks, longest})
    lags = [each * resolution for each in lag_grid(pieces, dense_up_to=64, ratio=1.04)]
    return Plan(tuple(sorted({*lags, *chosen})), tuple(chosen), gradients, context)


def _uses_its_past(alone: Floats, losses: Floats) -> bool:
    """Tell whether losses with one step of context are higher than with all of it, by what counts and is certain."""
    better = alone - losses
    error = float(better.std(ddof=1)) / math.sqrt(len(better)) if len(better) > 1 else 0.0
    return bool(better.mean() > max(2 * error, 0.01 * abs(float(alone.mean()))))


def _exponent(model: nn.Module, loss: StepLoss, stream: Stream, seed: int) -> float | None:
    """Return the largest Lyapunov exponent; None where the state is too large, or the passes are too short."""
    try:
        draws = np.random.default_rng(seed)
        place = places(model, loss, stream, _LYAPUNOV_STEPS, 1, _LYAPUNOV_STEPS, draws)[0]
    except ConfigError:
        return None
    numbers = sum(leaf.numel() for leaf in differentiable(place.state))
    if numbers > _LARGEST_STATE * place.window.lanes:
        return None
    exponents = lyapunov_exponents(model, place.window, place.state, place.dims)
    return None if exponents is None else float(exponents[0])
