"""A model on a held-out stream, with a state of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tbptt.coupling import refuse_coupled
from tbptt.errors import ConfigError
from tbptt.loss import Counted, Loss, StepLoss, added
from tbptt.metrics import Metric
from tbptt.model import eval_mode, find_lane_dims
from tbptt.pathways import segment_steps
from tbptt.side_state import preserved
from tbptt.streams.base import Stream
from tbptt.unroll import unroll

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    loss: Loss,
    stream: Stream,
    metrics: Mapping[str, Metric] | None = None,
    *,
    steps: int | None = None,
) -> dict[str, float]:
    """Run `model` once over all of `stream`, carrying its state, and measure.

    Model and loss are in eval mode, without a graph. The mode of each of their parts, the random generators and every
    other stream's state are afterwards as they were. The stream is rewound before, and put back there after: a stream
    with new data in each pass shows the same ones every time.

    Args:
        model: the model.
        loss: as for training.
        stream: the held-out stream.
        metrics: further numbers, by name.
        steps: how many steps at a time, 256 where left out; the result does not depend on it, but for a `WindowLoss`,
            for which it must be said. In whole segments of the model, of as many steps or fewer, but one segment at
            least.

    Returns:
        "loss", the mean over all valid targets, by class weights where the loss has some; "targets", their number;
        "loss/NAME", for each term of a loss that returns a dict of them, which add up to "loss"; and the metrics.

    Raises:
        ConfigError: the stream has no valid target; or a `WindowLoss`, and it is not said how long windows are.
        CapabilityError: a loss that couples steps or lanes and is no `WindowLoss`.

    Cost: one forward pass; memory of `steps` steps.
    """
    step_loss, metrics = StepLoss.of(loss), metrics or {}
    if steps is None and step_loss.whole:
        raise ConfigError(
            "steps was expected to be given with a WindowLoss, but is left out: it is another loss for windows of "
            "another length",
            fix="evaluate(model, loss, stream, steps=64), the k1 of training",
        )
    steps = 256 if steps is None else steps
    device = next(model.parameters()).device
    state, dims, looked, counted = None, None, False, Counted()
    sums: dict[str, float] = {}
    for each in metrics.values():
        each.start()
    segment = segment_steps(model)
    steps = max(segment, steps // segment * segment)
    stream.rewind()
    start = stream.state_dict()
    try:
        with torch.no_grad(), preserved(device=device), eval_mode(model, step_loss.module):
            for window in stream.windows(steps):
                window = window.to(device)
                dims, looked = dims if looked else find_lane_dims(model, window.inputs), True
                outputs, state = unroll(model, window, state, dims)
                terms, valid = step_loss.terms_by_step(outputs, window)
                if not counted.num:
                    refuse_coupled(step_loss, outputs, window, model)
                counted += step_loss.counted(window)
                for name, each in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(each[valid].double().sum())
                losses = added(terms)[valid]
                for each in metrics.values():
                    each.see(outputs, losses, window)
    finally:
        stream.load_state_dict(start)
    if not counted:
        raise ConfigError("the held-out stream has no target that counts, so there is nothing to measure")
    found = {"loss": sum(sums.values()) / counted.weight, "targets": float(counted.num)}
    found |= {f"loss/{name}": each / counted.weight for name, each in sums.items() if name}
    return found | {name: each.result() for name, each in metrics.items()}
