"""One batch with a gradient a million times too large: what it costs, and what the guards save."""

from __future__ import annotations

import math
from functools import cache
from statistics import fmean

import pytest
import torch
from torch import nn

import tbptt
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard

UPDATES, POISONED = 600, 300


class Poison(Guard):
    """Makes one gradient a million times too large; for a trainer it is a part of the estimate."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, estimate: Estimate) -> Estimate:
        self.seen += 1
        if self.seen != POISONED:
            return estimate
        return estimate.with_gradients({name: 1e6 * value for name, value in estimate.gradients.items()})


def data(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signal = torch.sin(torch.arange(rows + 1) / 5).unsqueeze(1) + 0.3 * torch.randn(rows + 1, 1, generator=generator)
    return signal[:-1], signal[1:, 0]


@cache
def final_loss(guard: str, seed: int, poisoned: bool = True) -> float:
    """Train with plain SGD with momentum; return the loss on data that were not trained on."""
    chosen: dict[str, list[Guard]] = {
        "none": [],
        "z": [tbptt.ZClip()],
        "spike": [tbptt.SpikeRollback(every=10)],
    }
    torch.manual_seed(seed)
    model = tbptt.SequenceModel(1, 1, hidden=8, core="gru")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    falls = torch.optim.lr_scheduler.LambdaLR(sgd, lambda update: 1 - update / UPDATES)  # so that the end is no chance
    held_out = tbptt.ArrayStream(*data(100 + seed, 2000), lanes=8)
    summary = tbptt.Trainer(
        model,
        nn.MSELoss(),
        sgd,
        tbptt.TBPTT(8, 8),
        tbptt.ArrayStream(*data(seed, 16000), lanes=16),
        guards=[*([Poison()] if poisoned else []), *chosen[guard]],
        held_out=tbptt.HeldOut(held_out, every=10_000),
        scheduler=falls,
        seed=seed,
        checked=False,
    ).run(updates=UPDATES)
    return summary.validation["loss"]


def cost(guard: str) -> float:
    """The mean, over three seeds, of the loss in the clean run's without any guard, less one."""
    return fmean(final_loss(guard, seed) / final_loss("none", seed, poisoned=False) - 1 for seed in range(3))


@pytest.mark.parametrize("guard", ["z", "spike"])
def test_a_guard_saves_the_run(guard: str) -> None:
    assert abs(cost(guard)) < 0.02


@pytest.mark.filterwarnings("ignore:explosion at update:tbptt.errors.AlarmWarning")  # which is right
def test_without_a_guard_the_run_is_lost() -> None:
    without = cost("none")
    assert math.isnan(without) or without > 0.5
