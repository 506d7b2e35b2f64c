"""What moving weights do to influence that is carried along: the largest learning rate at which RTRL still converges.

    python benchmarks/quality/stale.py

Influence balancing, plain gradient descent with `RTRL(k1)`, the gradient being the mean over the k1 steps of a window.
With weights that stay J is exact; while they move it is a mixture of the influences of all weights there have been, and
the more of them there are in the time that J lasts, the smaller the rate must be. Gradient descent with the exact
gradient of settled states has the limit 2 / 36. Found by bisection; a rate converges if theta is within 1e-3 of -1/6 in
the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import math
from typing import Any

import torch
from side_by_side import save
from torch import Tensor

import tbptt
from tbptt.models import InfluenceBalancingModel

HALVINGS = 9


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


def converges(estimator: tbptt.Estimator, k1: int, rate: float) -> bool:
    """Whether so many updates bring theta to its optimum: five times as many as a quarter of the rate would need."""
    model = InfluenceBalancingModel().double()
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    carry: Any = estimator.init(model, 1)
    window = tbptt.Window(torch.zeros(k1, 1, 1).double(), torch.ones(k1, 1).double())
    for _ in range(min(6000, max(400 // k1 + 50, math.ceil(5 * 4 / (36 * rate))))):
        estimate, carry = estimator.estimate(model, half_square, carry, window)
        estimate.apply(model)
        sgd.step()
        if not abs(float(model.theta.detach())) < 1e3:
            return False
    return abs(float(model.theta.detach()) + 1 / 6) < 1e-3


def largest(estimator: tbptt.Estimator, k1: int) -> float:
    low, high = 1e-5, 0.2
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if converges(estimator, k1, middle) else (low, middle)
    return low


def main() -> None:
    torch.set_num_threads(1)
    found = {k1: largest(tbptt.RTRL(k1), k1) for k1 in (1, 10, 50, 200)}
    figures = {f"largest rate, RTRL(k1={k1})": f"{rate:.2e}" for k1, rate in found.items()}
    figures["limit of gradient descent at weights that stay"] = f"{2 / 36:.2e}"
    save("quality_stale", figures, {"rates": {str(k1): rate for k1, rate in found.items()}}, halvings=HALVINGS)


if __name__ == "__main__":
    main()
