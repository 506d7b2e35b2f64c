"""What each past step did to one prediction.

Letters: T time, B lanes, C classes, L steps looked back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.horizon.inputs import InputTap
from tbptt.horizon.samples import places
from tbptt.length.base import is_whole
from tbptt.loss import Loss, StepLoss
from tbptt.model import check_trainable, eval_mode
from tbptt.pathways import in_segments, segment_steps
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.tree import tensors
from tbptt.unroll import unroll

__all__ = ["Influence", "influences"]


@dataclass(frozen=True, eq=False)
class Influence:
    """One prediction, and how strongly it depended on what came before.

    Args:
        inputs: the steps, oldest first, of one lane. Shape (L, ...).
        target: what was to be predicted at the last of them; None where the stream has no plain targets.
        loss: of the prediction.
        norms: of the gradient of that loss with respect to each step's input, or to what an embedding made of it.
            Shape (L,), float64.
    """

    inputs: Tensor
    target: Tensor | None
    loss: float
    norms: Tensor


def influences(
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    *,
    steps: int = 200,
    count: int = 6,
    lanes: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Influence]:
    """Return, for some predictions in a stream, the influence of each of the last `steps` inputs.

    The model runs in eval mode, its state carried from the stream's beginning; its mode, the random generators and
    the stream's cursor are afterwards as they were.

    Args:
        model: as for training.
        loss: as for training.
        stream: data with at least one tensor of inputs.
        steps: how far back, L, at least 2. With a model of segments fewer may be shown: those of whole segments, as far
            as the loss.
        count: how many predictions.
        lanes: whose; left out: one after the other.
        seed: of the places.

    Raises:
        CapabilityError: there is nothing to take a gradient of: symbols, and no embedding.
        ConfigError: too few steps, or passes too short to look so far back.

    Cost: for each prediction a pass forward and back over L steps.
    """
    check_trainable(model)
    for name, value, least in (("steps", steps, 2), ("count", count, 1)):
        if not is_whole(value) or value < least:
            raise ConfigError(
                f"{name} was expected to be a whole number, at least {least}, but is {value!r}", fix=f"{name}={least}"
            )
    step_loss, start = StepLoss.of(loss).by_single_steps("horizon.influences"), stream.state_dict()
    device = next(model.parameters()).device
    try:
        with preserved(model, device=device), eval_mode(model, step_loss.module):
            found: list[Influence] = []
            draws = np.random.default_rng(seed)
            segment = segment_steps(model)
            run = in_segments(steps, segment)  # in whole segments; what is too much, or after the loss, is left out
            for number, place in enumerate(places(model, step_loss, stream, run, count, run, draws, segment)):
                tap = InputTap(model)
                with tap.enter(place.window) as window:
                    outputs, _ = unroll(model, window, place.state, place.dims)
                losses, valid = step_loss.by_step(outputs, window)
                at = run - 1 - place.early
                seen = slice(max(0, at + 1 - steps), at + 1)
                choices = valid[at].nonzero().flatten().tolist() if lanes is None else list(lanes)
                lane = choices[number % len(choices)]
                if not tap.tapped[0]:
                    raise CapabilityError(
                        "numbers or symbols behind an nn.Embedding were expected, but the model has neither: there is "
                        "nothing that a gradient could be taken of",
                        fix="feed one-hot numbers instead of ids",
                    )
                gradients = torch.autograd.grad(losses[at, lane], tap.tapped[0], allow_unused=True)
                targets = tensors(window.targets)
                found.append(
                    Influence(
                        inputs=tensors(window.inputs)[0][seen, lane].detach(),
                        target=targets[0][at, lane] if len(targets) == 1 else None,
                        loss=float(losses[at, lane].detach()),
                        norms=tap.norms(0, list(gradients), run)[seen, lane].cpu(),
                    )
                )
            return found
    finally:
        stream.load_state_dict(start)
