"""What the tests of the evolution strategies share: data with resets, and a run over windows."""

from __future__ import annotations

from typing import Any

import torch
from systems import System, record, squared
from torch import Tensor, nn

from tbptt import PES, ESSingle, Estimate, TruncatedES, Window
from tbptt.estimators.perturbation import Perturbation
from tbptt.testing import Recording

METHODS = [TruncatedES, PES, ESSingle]
RULES = {
    "truncated": TruncatedES(3, 4, 0.3, seed=5),
    "pes": PES(3, 4, 0.3, seed=5),
    "single": ESSingle(3, 4, 0.3, seed=5),
    "refreshed": ESSingle(3, 4, 0.3, seed=5, refresh=2),
}


def half_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


def itself(outputs: Tensor, targets: Tensor) -> Tensor:
    del targets  # a loss that is linear in the weights
    return outputs


def over(
    estimator: Perturbation, model: nn.Module, windows: list[Window], carry: Any = None, loss: Any = squared
) -> Any:
    """Return the estimates of all windows, and the carry."""
    carry = estimator.init(model, windows[0].lanes) if carry is None else carry
    estimates: list[Estimate] = []
    for window in windows:
        estimate, carry = estimator.estimate(model, loss, carry, window)
        estimates.append(estimate)
    return estimates, carry


def cut(recording: Recording, steps: int) -> list[Window]:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    return [Window(*(part[at : at + steps] for part in parts)) for at in range(0, len(parts[0]), steps)]


def with_resets(system: System, steps: int) -> Recording:
    """Lanes that are reset alone and together, at the start and in the middle of windows of 3, and a mask."""
    recording = record(system, steps, masks=True, resets=False)
    recording.mask[::3] = True
    for step, lanes in ((0, [0, 1]), (4, [0]), (8, [1]), (10, [0, 1]), (14, [1]), (15, [1]), (28, [0])):
        recording.reset[step, lanes] = True
    return recording


class Weighted(nn.Module):
    """h' = decay h + w . x, shown as it is: linear in its P weights."""

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size).double())
        self.decay = decay

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1]) if state is None else state
        shown = []
        for step in inputs:
            state = self.decay * state + step @ self.weight
            shown.append(state)
        return torch.stack(shown), state


def reset_alone() -> list[Window]:
    """Three lanes of a quadratic loss, reset one by one, in the middle of windows of 4."""
    torch.manual_seed(2)
    inputs, targets = torch.randn(28, 3, 2).double(), torch.randn(28, 3).double()
    reset = torch.zeros(28, 3, dtype=torch.bool)
    for step, lane in ((6, 0), (11, 1), (18, 2), (22, 0)):
        reset[step, lane] = True
    parts = (inputs, targets, torch.ones(28, 3, dtype=torch.bool), reset)
    return [Window(*(part[at : at + 4] for part in parts)) for at in range(0, 28, 4)]
