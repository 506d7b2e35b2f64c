"""Every regime of (k1, k2), against oracles that share no code with the library."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from systems import SYSTEMS, B, record, relative, squared

from tbptt import TBPTT, Window
from tbptt.testing import Recording, frozen_boundary

K1 = (1, 3, 8, 16)
K2 = (1, 2, 7, 8, 13, 40)
# Of the two choices at most one matters, by whether k2 is shorter or longer than k1; the other must change nothing.
CHOICES = (("tail", "recompute"), ("all", "retain"))
STEPS = 101  # more than twice the longest look-back, and no multiple of any k1 > 1: the last window is short


def windows(recording: Recording, k1: int, end: int = STEPS) -> list[Window]:
    parts = (recording.inputs, recording.targets, recording.mask, recording.reset)
    return [Window(*(part[begin : min(begin + k1, end)] for part in parts), start=begin) for begin in range(0, end, k1)]


def judged(k1: int, updates: int) -> set[int]:
    """The updates to compare with the (slow) oracle: the ends, where things go wrong, and some between."""
    return {0, 1, 2, updates // 2, updates - 2, updates - 1}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(("k1", "k2"), list(product(K1, K2)))
def test_every_regime_is_the_gradient_with_frozen_boundaries(name: str, k1: int, k2: int) -> None:
    torch.manual_seed(K1.index(k1) * 10 + K2.index(k2))
    system = SYSTEMS[name]()
    recording = record(system, STEPS, masks=True, resets=True)
    parameters = {key: value.detach() for key, value in system.model.named_parameters()}
    wanted: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for losses, replay in CHOICES:
        estimator = TBPTT(k1, k2, losses=losses, replay=replay)
        carry = estimator.init(system.model, B)
        parts = windows(recording, k1)
        for index, window in enumerate(parts):
            estimate, carry = estimator.estimate(system.model, squared, carry, window)
            if index not in judged(k1, len(parts)):
                continue
            key = (index, losses if k2 < k1 else "")  # the oracle does not know replay: weights stay the same
            if key not in wanted:
                end = window.start + window.steps
                wanted[key] = frozen_boundary(recording, parameters, window.start, end, k1=k1, k2=k2, losses=losses)
            assert relative(estimate.gradients, wanted[key]) < 1e-10, (index, losses, replay)
