"""What exact online gradients cost: flat in what has been seen, against truncation that goes back.

    python benchmarks/speed/forward_mode.py [--rounds 15]

eLSTM and LRU, 8 inputs and 64 units, one lane, one update of SGD a step, one thread. `ElementwiseRTRL(1)` on a stream
100 steps old and on one 10^6 steps old (brought there in windows of 500), and `TBPTT(1, k2)` with k2 = 16, 64 and 256,
in blocks of 200 steps, in turn; medians over the rounds. Beside the time stand the bytes of what is carried, and how
far the gradient of 256 steps' losses, at weights that stay, is from the full one.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

import tbptt
from tbptt.models import ELSTM, LRU

BLOCK, YOUNG, OLD = 200, 100, 10**6
MODELS = {"eLSTM": lambda: ELSTM(8, 64), "LRU": lambda: LRU(8, 64, 64)}


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


class Side:
    """An estimator at work on an endless stream of noise."""

    def __init__(self, model: nn.Module, estimator: tbptt.Estimator) -> None:
        self.model, self.estimator = model, estimator
        self.sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
        self.carry: Any = estimator.init(model, 1)
        self.inputs, self.targets = torch.randn(BLOCK, 1, 8), 0.1 * torch.randn(BLOCK, 1, 64)

    def age(self, steps: int) -> None:
        """Let the stream grow old, its influence carried along all the way."""
        estimator = tbptt.ElementwiseRTRL(500)
        for _ in range(steps // 500):
            window = tbptt.Window(torch.randn(500, 1, 8), 0.1 * torch.randn(500, 1, 64))
            _, self.carry = estimator.estimate(self.model, squared, self.carry, window)

    def block(self) -> None:
        for step in range(BLOCK):
            window = tbptt.Window(self.inputs[step : step + 1], self.targets[step : step + 1])
            estimate, self.carry = self.estimator.estimate(self.model, squared, self.carry, window)
            estimate.apply(self.model)
            self.sgd.step()

    def gradient(self) -> Tensor:
        """Of the last 256 of 1024 steps' losses, at fresh weights that stay."""
        total, carry = torch.zeros(()), self.estimator.init(self.model, 1)
        generator = torch.Generator().manual_seed(1)
        inputs, targets = (torch.randn(1024, 1, size, generator=generator) for size in (8, 64))
        for at in range(1024):
            mask = torch.full((1, 1), at >= 768)
            window = tbptt.Window(inputs[at, None], targets[at, None], mask=mask)
            estimate, carry = self.estimator.estimate(self.model, squared, carry, window)
            if estimate.num_injected:
                total = total + torch.cat([each.flatten() for each in estimate.gradients.values()])
        return total


def full(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(1024, 1, size, generator=generator) for size in (8, 64))
    outputs, _ = model(inputs, None)
    found = torch.autograd.grad(squared(outputs, targets)[768:].sum(), list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


def measure(kind: str, rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    torch.manual_seed(0)
    model = MODELS[kind]()
    exact = full(model)
    estimators: dict[str, tbptt.Estimator] = {"ElementwiseRTRL(1), young": tbptt.ElementwiseRTRL()}
    estimators["ElementwiseRTRL(1), old"] = tbptt.ElementwiseRTRL()
    estimators |= {f"TBPTT(1, {k2})": tbptt.TBPTT(1, k2) for k2 in (16, 64, 256)}
    sides: dict[str, Side] = {}
    figures: dict[str, Any] = {}
    for name, estimator in estimators.items():
        side = Side(MODELS[kind](), estimator)
        side.model.load_state_dict(model.state_dict())
        if not name.endswith("old"):
            apart = float((side.gradient() - exact).norm() / exact.norm())
            figures[f"{kind}, {name}: distance from the full gradient"] = f"{apart:.1e}"
        side.age(OLD if name.endswith("old") else YOUNG) if "Elementwise" in name else None
        sides[name] = side
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(rounds + 1):  # the first is a warm-up
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            sides[name].block()
            if index:
                samples[name].append((time.perf_counter() - begin) / BLOCK)
    for name, side in sides.items():
        figures[f"{kind}, {name}: us a step"] = 1e6 * median(samples[name])
        figures[f"{kind}, {name}: KiB carried"] = tbptt.tree.num_bytes(side.carry.state_dict()) / 1024

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(samples[a], samples[b], strict=True))

    young, old = names[:2]
    figures[f"{kind}: old / young (within 1.05)"] = ratio(old, young)
    for name in names[2:]:
        figures[f"{kind}: {name} / ElementwiseRTRL(1)"] = ratio(name, young)
    return figures, {f"{kind}, {name}": values for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    samples: dict[str, list[float]] = {}
    for kind in MODELS:
        found, taken = measure(kind, rounds)
        figures |= found
        samples |= taken
    save("speed_forward_mode", figures, samples, block=BLOCK)


if __name__ == "__main__":
    main()
