"""What the tests of synthetic gradients share: systems with a predictor, and data that try it."""

from __future__ import annotations

from typing import Any

import torch
from systems import SYSTEMS, System, record, squared
from torch import Tensor, nn

from tbptt import SyntheticGradients, Window
from tbptt.estimators.predictor import Predictor, attached
from tbptt.testing import Recording

PREFIX = "synthetic_gradients."


def windows(recording: Recording, k1: int) -> list[Window]:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    begins = range(0, len(recording.inputs), k1)
    return [Window(*(part[begin : begin + k1] for part in parts), start=begin) for begin in begins]


def made(name: str, steps: int, estimator: SyntheticGradients, *, scale: float = 0.0) -> tuple[System, Recording]:
    """A system whose predictor has random weights of a size, and a recording with resets, also where windows begin."""
    torch.manual_seed(3)
    system = SYSTEMS[name]()
    recording = record(system, steps, masks=True, resets=True)
    recording.reset[estimator.k1 * 3, 0] = True  # at the first step of a window
    recording.reset[estimator.k1 * 4 + 1] = True  # all lanes, inside one
    recording.mask[estimator.k1 : 3 * estimator.k1] = False  # two windows without a target
    recording.mask[-1] = True
    module = None
    if estimator.predictor == "own":
        numbers = sum(leaf[0].numel() for leaf in system.initial(dict(system.model.named_parameters())))
        module = nn.Sequential(nn.Linear(numbers, 4), nn.Tanh(), nn.Linear(4, numbers, bias=False))
    estimator.attach(system.model, recording.inputs[:2], module)
    with torch.no_grad():
        for each in predictor_of(system.model).parameters():
            each.copy_(torch.randn_like(each) * scale)
    return system, recording


def predictor_of(model: nn.Module) -> Predictor:
    found = attached(model)
    assert found is not None
    return found


def own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters without the predictor's."""
    return {name: value for name, value in model.named_parameters() if not name.startswith(PREFIX)}


def ran(estimator: SyntheticGradients, model: nn.Module, given: list[Window], loss: Any = squared) -> list[Any]:
    carry, estimates = estimator.init(model, given[0].lanes), []
    for window in given:
        estimate, carry = estimator.estimate(model, loss, carry, window)
        estimates.append(estimate)
    return estimates
