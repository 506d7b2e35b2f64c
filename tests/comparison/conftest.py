"""Estimators whose bias and variance are what a test says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from tbptt import TBPTT, Carry, Estimate, Estimator, Loss, Window


@dataclass(frozen=True)
class Fake(Estimator):
    """TBPTT whose gradient is multiplied by a random factor, drawn evenly around `mean`."""

    inner: TBPTT
    mean: float = 1.0
    deviation: float = 0.0
    fails_at: int = -1  # the step of the stream

    kind: ClassVar[str] = "unbiased"

    @classmethod
    def examples(cls) -> tuple[Fake, ...]:
        return (cls(TBPTT(4, 4)),)

    def next_steps(self, carry: Any) -> int:
        return self.inner.next_steps(carry)

    def init(self, model: nn.Module, lanes: int) -> Carry:
        return self.inner.init(model, lanes)

    def reach(self, steps: int) -> tuple[int, ...]:
        return self.inner.reach(steps)

    def estimate(self, model: nn.Module, loss: Loss, carry: Any, window: Window) -> tuple[Estimate, Carry]:
        if 0 <= self.fails_at < window.start + window.steps:
            raise RuntimeError("the fake has failed")
        estimate, carry = self.inner.estimate(model, loss, carry, window)
        draw = torch.rand((), dtype=torch.float64).item() if self.deviation else 0.5
        factor = self.mean + self.deviation * 3**0.5 * (2 * draw - 1)
        return replace(estimate, gradients={n: g * factor for n, g in estimate.gradients.items()}), carry


@pytest.fixture
def fake() -> type[Fake]:
    return Fake


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small lose by a second thread, and much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
