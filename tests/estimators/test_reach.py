"""Measured reach against the formula, written out here once more, for the whole grid."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from systems import SYSTEMS, B, D
from torch import nn

from tbptt import TBPTT
from tbptt.checks.reach import measure_reach

K1 = (1, 3, 8, 16)
K2 = (1, 2, 7, 8, 13, 40)


def formula(k1: int, k2: int, losses: str) -> list[int]:
    """DESIGN: k2 > k1 reaches k2 - k1 + 1 to k2 steps; else the last k2 steps see 1 to k2, or every piece does."""
    if k2 > k1:
        return list(range(k2 - k1 + 1, k2 + 1))
    if losses == "tail":
        return [0] * (k1 - k2) + list(range(1, k2 + 1))
    return [step % k2 + 1 for step in range(k1)]


@pytest.mark.parametrize(("k1", "k2"), list(product(K1, K2)))
@pytest.mark.parametrize(("losses", "replay"), [("tail", "recompute"), ("all", "retain")])  # at most one matters
def test_measured_reach_is_the_formula(k1: int, k2: int, losses: str, replay: str) -> None:
    torch.manual_seed(0)
    estimator = TBPTT(k1, k2, losses=losses, replay=replay)
    found = measure_reach(nn.GRU(D, 3).double(), torch.randn(5, 1, D).double(), estimator)
    assert [reach.measured for reach in found] == formula(k1, k2, losses)
    assert [reach.asked for reach in found] == formula(k1, k2, losses)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_kind_of_model_is_probed(name: str) -> None:
    torch.manual_seed(0)
    model = SYSTEMS[name]().model
    found = measure_reach(model, torch.randn(5, B, D).double(), TBPTT(3, 7))
    assert [reach.measured for reach in found] == [5, 6, 7]
    assert all(reach.agrees for reach in found)


def test_long_look_backs_are_probed_where_they_should_end() -> None:
    found = measure_reach(nn.GRU(D, 3).double(), torch.randn(5, 1, D).double(), TBPTT(256, 512), [0, 255])
    assert [reach.measured for reach in found] == [257, 512]


def test_an_estimator_that_reaches_too_far_is_caught() -> None:
    class OneTooFar(TBPTT):
        def reach(self, steps: int) -> tuple[int, ...]:
            return tuple(max(0, each - 1) for each in super().reach(steps))

    found = measure_reach(nn.GRU(D, 3).double(), torch.randn(5, 1, D).double(), OneTooFar(3, 7))
    assert not any(reach.agrees for reach in found)


def test_a_model_that_looks_back_less_is_not_the_estimators_fault() -> None:
    class Last2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Linear(D, 3)

        def forward(self, inputs, state=None):
            lifted = torch.tanh(self.lift(inputs))
            before = torch.zeros_like(lifted[:1]) if state is None else state
            return lifted + torch.cat([before, lifted[:-1]]), lifted[-1:]

    found = measure_reach(Last2().double(), torch.randn(5, 1, D).double(), TBPTT(3, 7))
    assert [reach.measured for reach in found] == [2, 2, 2]
    assert all(reach.agrees for reach in found)
