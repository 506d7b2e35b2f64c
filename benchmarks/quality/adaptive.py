"""Does an adaptive look-back do as well as the best fixed one, found by trying them all, in the same time?

Each side trains its own copy of the same model on the same data for the same time on its own clock, in slices that
take turns, so that a busy machine is busy for all. The learning rate falls along a cosine over that time. Fixed sides
are the plain windows k1 = k2 = K for K of 8..256, the cheapest there are for each step of the stream (in a first run
those with k2 = 2 k1 all came out worse in the same time). Adaptive ones are at their defaults (bounds 4 and 256) but
for what their names say. Measured is the loss on held-out data at the end.

    python benchmarks/quality/adaptive.py shakespeare [--seconds 60] [--seeds 2]
    python benchmarks/quality/adaptive.py ecg [--seconds 20] [--seeds 3]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first, and copy.py there is not its own module of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from side_by_side import save
from torch import nn

import tbptt
from tbptt.streams import ecg

GRID = (8, 16, 32, 64, 128, 256)
SLICE_S = 0.5


class Side:
    """One model in training, with a clock of its own."""

    def __init__(
        self,
        estimator: tbptt.Estimator,
        model: nn.Module,
        loss: nn.Module,
        stream: tbptt.Stream,
        lr: float,
        clip: float,
    ) -> None:
        self.estimator, self.model, self.loss, self.stream = estimator, copy.deepcopy(model), loss, stream
        self.lr, self.clip = lr, clip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.carry: Any = estimator.init(self.model, stream.lanes)
        self.seconds, self.updates, self.steps, self.probes, self.probe_s = 0.0, 0, 0, 0, 0.0
        self.k2: list[int] = []
        self.random = torch.get_rng_state()

    def train(self, seconds: float, budget: float) -> None:
        """Train for some time of its own clock."""
        torch.set_rng_state(self.random)
        end = self.seconds + seconds
        while self.seconds < end:
            begin = time.perf_counter()
            try:
                window = self.stream.read(self.estimator.next_steps(self.carry))
            except tbptt.errors.EndOfStream:
                self.stream.rewind()
                continue
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.seconds / budget))))
            estimate, self.carry = self.estimator.estimate(self.model, self.loss, self.carry, window)
            tbptt.ClipNorm(self.clip)(estimate).apply(self.model)
            with tbptt.scaled_rate(self.optimizer, estimate.rate_factor):
                self.optimizer.step()
            self.seconds += time.perf_counter() - begin
            self.updates += 1
            self.steps += window.steps
            self.k2.append(estimate.lookback)
            self.probes += "needed_lookback" in estimate.metrics
        self.random = torch.get_rng_state()


def shakespeare(seed: int) -> tuple[nn.Module, nn.Module, Callable[[], tbptt.Stream], tbptt.Stream, float]:
    torch.manual_seed(seed)
    path = Path(tbptt.__file__).parent / "data" / "shakespeare.txt"
    first = tbptt.TextStream(path, lanes=32, end=0.9)
    held_out = tbptt.TextStream(path, lanes=32, vocabulary=first.vocabulary, begin=0.9)
    model = tbptt.SequenceModel(first.num_symbols, first.num_symbols, hidden=128, embedding=32)
    return model, nn.CrossEntropyLoss(), lambda: tbptt.TextStream(path, lanes=32, end=0.9), held_out, 4e-3


def heart(seed: int) -> tuple[nn.Module, nn.Module, Callable[[], tbptt.Stream], tbptt.Stream, float]:
    torch.manual_seed(seed)
    model = tbptt.SequenceModel(2, 1, hidden=32, dropout=0.2)
    return model, nn.BCEWithLogitsLoss(), lambda: ecg(lanes=16), ecg(lanes=1, split="test"), 3e-3


def estimators() -> dict[str, tbptt.TBPTT]:
    fixed = {f"k1 = k2 = {k}": tbptt.TBPTT(k, k) for k in GRID}
    adaptive = {
        f"adaptive, plain, {tolerance}": tbptt.Adaptive(tolerance=tolerance, windows="plain")
        for tolerance in (0.1, 0.25, 0.5)
    } | {"adaptive, overlapping, 0.1": tbptt.Adaptive(tolerance=0.1)}
    return fixed | {name: tbptt.TBPTT(length, length) for name, length in adaptive.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["shakespeare", "ecg"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of sides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        model, loss, stream, held_out, lr = (shakespeare if options.data == "shakespeare" else heart)(seed)
        sides = {
            name: Side(estimator, model, loss, stream(), lr, 1.0)
            for name, estimator in estimators().items()
            if not options.only or name in options.only
        }
        for _ in range(round(options.seconds / SLICE_S)):
            for side in sides.values():
                side.train(SLICE_S, options.seconds)
        for name, side in sides.items():
            found = tbptt.evaluate(side.model, loss, held_out)["loss"]
            runs.append(
                {
                    "side": name,
                    "seed": seed,
                    "loss": found,
                    "updates": side.updates,
                    "steps": side.steps,
                    "probes": side.probes,
                    "lookback_at_eighths": side.k2[:: max(1, len(side.k2) // 8)],
                }
            )
            print(
                f"seed {seed}  {name:<24} {found:.5f}  {side.updates} updates, {side.steps} steps, k2 at last "
                f"{side.k2[-1]}, {side.probes} probes",
                flush=True,
            )
    figures: dict[str, Any] = {}
    for name in estimators():
        losses = [run["loss"] for run in runs if run["side"] == name]
        if losses:
            figures[f"{name}: mean loss"] = sum(losses) / len(losses)
    best = min(value for name, value in figures.items() if "adaptive" not in name)
    for name in [each for each in figures if "adaptive" in each]:
        figures[f"{name.removesuffix(': mean loss')}: against the best fixed"] = figures[name] / best
    save(f"quality_adaptive_{options.data}", figures, {"runs": runs}, seconds=options.seconds)


if __name__ == "__main__":
    main()
