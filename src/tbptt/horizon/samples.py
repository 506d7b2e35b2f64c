"""The experiment: single losses at random places of a stream, each sent back as far as was asked for.

Letters: B lanes, N probes, L longest lag, K lags or look-backs, M numbers of a gradient's sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.coupling import refuse_coupled
from tbptt.curve import Floats
from tbptt.errors import ConfigError, EndOfStream, NonFiniteError, StreamError
from tbptt.horizon.inputs import InputTap, has_any
from tbptt.horizon.sent import Place, Plan, Sent
from tbptt.horizon.statistics import Sketch
from tbptt.horizon.ways import OneWay, Way
from tbptt.loss import StepLoss
from tbptt.model import find_lane_dims, trainable_parameters
from tbptt.pathways import in_segments, pathways_of
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.tree import LaneDims, Tree, detach
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Samples", "places", "sample", "ways_of", "with_context"]

_NEAR = 16
"""Steps after the last lag among which a loss with a target is looked for."""
_TRIES = 50
"""Stretches of the stream that are read without any target before that is an error."""


@dataclass(frozen=True, eq=False)
class Samples:
    """What each probe gave; curves are means over the lanes that had a target.

    Args:
        state: norm of the state's gradient at the plan's lags. Shape (N, K).
        inputs: norm of the input's gradient at lags 0..L-1. Shape (N, L); None where there is none to ask about.
        gradients: sketches of the parameters' gradient for each look-back. Shape (N, K, M); None if not asked for.
        losses: of the probes. Shape (N,).
        context: the same losses with only so many steps of context. Shape (N, K); None if not asked for.
        ways: the state's and the input's gradient told apart, by way.
    """

    state: Floats
    inputs: Floats | None
    gradients: Tensor | None
    losses: Floats
    context: Floats | None
    ways: dict[str, Way]


def places(
    model: nn.Module,
    loss: StepLoss,
    stream: Stream,
    longest: int,
    count: int,
    burn_in: int,
    draws: np.random.Generator,
    resolution: int = 1,
) -> list[Place]:
    """Read the stream, carrying the state on, and return places `longest` steps or a little more apart.

    Args:
        burn_in: steps run before the first.
        draws: how far the places lie from each other, so that they do not fall into step with a period of the data.
        resolution: all runs are of multiples of so many steps.

    Raises:
        ConfigError: a pass of the stream is too short.
        StreamError: no target comes.
    """
    device = next(model.parameters()).device
    state: Tree | None = None
    dims: LaneDims | None = None
    found: list[Place] = []
    empty = 0
    near = in_segments(_NEAR, resolution)
    gap = in_segments(burn_in, resolution)
    fresh = False  # whether this pass has just begun
    with torch.no_grad():
        while len(found) < count:
            wanted = gap + longest + near
            try:
                window = stream.read(wanted).to(device)
            except EndOfStream:
                if fresh:
                    raise StreamError("the stream has no steps, not even after rewind()") from None
                stream.rewind()
                fresh = True
                continue
            if dims is None:
                dims = find_lane_dims(model, window.inputs)
            if fresh and window.steps < wanted:
                raise _too_short(window.steps, longest, near, resolution)
            fresh = False
            last = _last_target(loss, window, longest) if window.steps == wanted else None
            whole = window.steps // resolution * resolution
            if last is None:
                empty += 1
                if empty > _TRIES:
                    raise StreamError(
                        f"a target among {_NEAR} consecutive steps was expected, but none came in {_TRIES} places",
                        fix="check the stream's mask; tbptt.horizon needs losses to send back",
                    )
                state = detach(unroll(model, window[:whole], state, dims)[1]) if whole else state
                gap = int(draws.integers(longest)) // resolution * resolution
                continue
            end = in_segments(last + 1, resolution)
            first = end - longest
            if first:
                state = detach(unroll(model, window[:first], state, dims)[1])
            found.append(Place(window[first:end], state, dims, end - 1 - last))
            state = detach(unroll(model, window[first:], state, dims)[1])
            gap = int(draws.integers(longest)) // resolution * resolution
    return found


def _too_short(steps: int, longest: int, near: int, resolution: int) -> ConfigError:
    """Return the error for passes of `steps` steps, with a max_lag for which they are long enough."""
    room = (steps - near) // 2 // resolution * resolution  # up to as many steps again lie before a place
    longer = "fewer lanes, which makes each of them longer"
    return ConfigError(
        f"passes of at least {2 * longest + near} steps were expected, to look {longest} steps back, but one has "
        f"{steps}: a gradient cannot be followed farther than the data go",
        fix=f"max_lag={room}, or {longer}" if room >= max(2, resolution) else f"more data, or {longer}",
    )


def _last_target(loss: StepLoss, window: Window, longest: int) -> int | None:
    valid, _ = loss.valid(window)
    steps = valid.any(1).nonzero().flatten().tolist()
    return steps[-1] if steps and steps[-1] >= max(longest, window.steps - _NEAR) else None


def ways_of(model: nn.Module, place: Place, resolution: int) -> tuple[str, ...]:
    """Return by which ways the past comes, as the model tells them apart; none for one way only."""
    state = place.state
    if state is None:
        with torch.no_grad():
            _, state = unroll(model, place.window[:resolution], None, place.dims)
    return tuple(pathways_of(model, state))


def sample(model: nn.Module, loss: StepLoss, found: Sequence[Place], plan: Plan) -> Samples:
    """Send the loss of each place back, and measure on its way.

    Raises:
        NonFiniteError: a loss or a gradient is not a finite number.

    Cost: for each place a pass forward and back over L steps in as many pieces as there are lags; with context, one
        forward pass for each look-back. With ways: in pieces as short as can be, and a backward pass more for each.
    """
    parameters = list(trainable_parameters(model).values())
    sketch = Sketch(sum(each.numel() for each in parameters))
    states: list[Tensor] = []
    inputs: list[Tensor] = []
    gradients: list[Tensor] = []
    losses: list[float] = []
    context: list[list[float]] = []
    ways: dict[str, list[OneWay]] = {name: [] for name in plan.ways}
    with torch.no_grad(), preserved(model, device=found[0].window.mask.device):
        outputs, _ = unroll(model, found[0].window, found[0].state, found[0].dims)
        refuse_coupled(loss, outputs, found[0].window, model)
    for place in found:
        tap = InputTap(model) if has_any(place.window.inputs, model) else None
        probe = Sent(model, loss, place, plan, parameters if plan.gradients else [], tap, sketch)
        states.append(probe.state)
        losses.append(probe.loss)
        for name, each in probe.ways.items():
            ways[name].append(each)
        if probe.inputs is not None:
            inputs.append(probe.inputs)
        if plan.gradients:
            gradients.append(torch.stack(probe.gradients))
        if plan.context:
            context.append([with_context(model, loss, place, steps) for steps in plan.lookbacks])
    _refuse_broken([losses, states, inputs, gradients, context], len(found))
    return Samples(
        state=torch.stack(states).numpy(),
        inputs=torch.stack(inputs).numpy() if len(inputs) == len(found) else None,
        gradients=torch.stack(gradients) if plan.gradients else None,
        losses=np.array(losses),
        context=np.array(context) if plan.context else None,
        ways={name: Way.of(plan.lags, each) for name, each in ways.items()},
    )


def _refuse_broken(measured: Sequence[Sequence[float | list[float] | Tensor]], count: int) -> None:
    broken = {
        number
        for each in measured
        for number, numbers in enumerate(each)
        if not bool(torch.isfinite(torch.as_tensor(numbers)).all())
    }
    if broken:
        raise NonFiniteError(
            f"finite losses and gradients were expected, but those of {len(broken)} of {count} probes hold NaN or "
            "infinity: either the model has diverged, or its data are not finite, and no look-back mends that",
            fix="weights from before it diverged, and a lower learning rate from there; or "
            "Window(mask=torch.isfinite(...)), if it is the data",
        )


def with_context(model: nn.Module, loss: StepLoss, place: Place, steps: int) -> float:
    """Return the loss of a place when the model sees only its last `steps` steps, from its initial state."""
    with torch.no_grad():
        window = place.window[place.window.steps - steps :]
        outputs, _ = unroll(model, window, None, place.dims)
        losses, valid = loss.by_step(outputs, window)
        at = steps - 1 - place.early
        return float(losses[at][valid[at]].double().mean())
