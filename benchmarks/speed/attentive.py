"""What a step costs against the length T of the window: sparse attentive backtracking, and TBPTT on the same network.

    python benchmarks/speed/attentive.py [--rounds 7] [--threads 1]

An `Attentive` LSTM of 64 units, 32 lanes, k_att = 2, a memory of T / 2 slots, so that nothing of a window is forgotten.
Each side makes an estimate of T steps in turn; TBPTT(5, 5) makes T / 5 of them. The carry goes on, so that the memory
is full. A plain `nn.LSTM`, run as one, is there to show what running step by step costs by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from side_by_side import in_turn, ratio, save

import tbptt
from tbptt.models import Attentive

INPUTS, HIDDEN, LANES = 8, 64, 32


def mean_square(outputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return outputs.square().mean(-1)


def side(estimator: Any, model: nn.Module, steps: int) -> Callable[[], object]:
    torch.manual_seed(0)
    inputs = torch.randn(steps, LANES, INPUTS)
    held = {"carry": estimator.init(model, LANES)}

    def one() -> None:
        for at in range(0, steps, estimator.k1):
            window = tbptt.Window(inputs[at : at + estimator.k1])
            _, held["carry"] = estimator.estimate(model, mean_square, held["carry"], window)

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for steps in (25, 50, 100, 200):
        torch.manual_seed(0)
        model = Attentive(nn.LSTM(INPUTS, HIDDEN), k_att=2, k_top=5, memory=steps // 2)
        sides = {
            "SAB": side(tbptt.SparseAttentiveBacktracking(steps, 5), model, steps),
            "TBPTT(T, T)": side(tbptt.TBPTT(steps, steps), model, steps),
            "TBPTT(5, 5)": side(tbptt.TBPTT(5, 5), model, steps),
            "nn.LSTM, TBPTT(T, T)": side(tbptt.TBPTT(steps, steps), nn.LSTM(INPUTS, HIDDEN), steps),
        }
        found = in_turn(sides, options.rounds)
        samples[f"T = {steps}"] = found
        for name, seconds in found.items():
            figures[f"T = {steps}, {name}: ms a step"] = 1000 * median(seconds) / steps
        figures[f"T = {steps}: SAB / TBPTT(T, T)"] = ratio(found, "SAB", "TBPTT(T, T)")
    save("speed_attentive", figures, samples, lanes=LANES, hidden=HIDDEN)


if __name__ == "__main__":
    main()
