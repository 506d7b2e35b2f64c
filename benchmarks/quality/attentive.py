"""Ke et al.'s copy task (2018): symbols, T = 50 steps later a cue, then the symbols again. Which gradient learns it?

All sides train the same network from the same weights on the same sequences: an `Attentive` LSTM with an embedding and
a read-out. Symbols are drawn evenly from 8; only the steps in which they are to be repeated count, so that knowing
nothing is ln 8 = 2.079 nats. Unlike `tbptt.streams.CopyTask` it has a cue, as theirs: without one a network has to
count the blanks, which is another task. Each sequence begins with a reset. Measured is the loss on fresh sequences.

    python benchmarks/quality/attentive.py [--seeds 3] [--sequences 900]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: a neighbour of this file would be taken for Python's own `copy`.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from statistics import median
from typing import Any

import torch
from side_by_side import save
from torch import Tensor, nn

import tbptt
from tbptt.models import Attentive

LETTERS, LENGTH, LAG, LANES, HIDDEN = 8, 3, 50, 32, 32
STEPS = LAG + LENGTH
SIDES = {
    "SparseAttentiveBacktracking(53, k_trunc=5)": tbptt.SparseAttentiveBacktracking(STEPS, k_trunc=5),
    "TBPTT(5, 5)": tbptt.TBPTT(5, 5),
    "TBPTT(53, 53)": tbptt.TBPTT(STEPS, STEPS),
}


class Copier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS + 2, 8)
        self.layer = Attentive(nn.LSTM(8, HIDDEN), k_att=1, k_top=5, memory=STEPS)
        self.head = nn.Linear(2 * HIDDEN, LETTERS)

    def memories(self) -> tuple[int, ...]:
        return self.layer.memories()

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.layer(self.embedding(inputs), state)
        return self.head(outputs), state


def sequence(generator: torch.Generator) -> tbptt.Window:
    """Return one sequence of every lane: symbols, blanks, a cue with which the repeating begins."""
    inputs = torch.full((STEPS, LANES), LETTERS)
    inputs[:LENGTH] = torch.randint(LETTERS, (LENGTH, LANES), generator=generator)
    inputs[LAG] = LETTERS + 1
    targets = torch.zeros_like(inputs)
    mask, reset = torch.zeros(2, STEPS, LANES, dtype=torch.bool).unbind()
    targets[LAG:] = inputs[:LENGTH]
    mask[LAG:] = True
    reset[0] = True
    return tbptt.Window(inputs, targets, mask, reset)


def tested(model: nn.Module, seed: int) -> tuple[float, float]:
    """Return the loss and the accuracy on 320 fresh sequences."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    losses: list[float] = []
    right: list[float] = []
    with torch.no_grad():
        for _ in range(10):
            window = sequence(generator)
            scores, targets = model(window.inputs)[0][LAG:], window.targets[LAG:]
            losses.append(float(nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())))
            right.append(float((scores.argmax(2) == targets).double().mean()))
    return sum(losses) / 10, sum(right) / 10


def train(estimator: Any, seed: int, sequences: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Copier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    carry = estimator.init(model, LANES)
    curve: list[tuple[int, float, float]] = []
    begin = time.perf_counter()
    for number in range(1, sequences + 1):
        whole = sequence(generator)
        for at in range(0, STEPS, estimator.k1):
            estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, whole[at : at + estimator.k1])
            if estimate.num_injected:
                tbptt.ClipNorm(1.0)(estimate).apply(model)
                optimizer.step()
        if number % (sequences // 10) == 0:
            curve.append((number, *tested(model, seed)))
    return {"curve": curve, "seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=900, help="of each lane")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {name: [] for name in SIDES}
    for seed in range(options.seeds):
        for name, estimator in SIDES.items():
            samples[name].append(train(estimator, seed, options.sequences))
            print(seed, name, samples[name][-1]["curve"][-1], f"{samples[name][-1]['seconds']:.0f} s", flush=True)
    for name, runs in samples.items():
        ends = [run["curve"][-1] for run in runs]
        figures[f"{name}: test losses"] = ", ".join(f"{loss:.3f}" for _, loss, _ in ends)
        figures[f"{name}: median test loss"] = median(loss for _, loss, _ in ends)
        figures[f"{name}: median accuracy"] = median(right for _, _, right in ends)
        figures[f"{name}: median seconds"] = median(run["seconds"] for run in runs)
    save("quality_attentive", figures, samples, sequences=options.sequences, lanes=LANES)


if __name__ == "__main__":
    main()
