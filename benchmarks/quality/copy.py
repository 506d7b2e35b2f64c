"""Aicher, Foti & Fox's fixed copy task (2019, section 5.2; m = 10): which look-back learns it, and does Adaptive?

Their setting: a two-layer LSTM of 50 units, embedding 6, 64 lanes, epochs of 4000 steps, SGD with learning rate
sqrt(K) on the mean loss, weight decay 1e-5, gradients clipped at norm 1 / K, windows of K steps with a look-back of
2 K. Adaptive starts from 15, is bounded by 2 and 100, with tolerance 0.1, and is not told the lag, 10. Measured is the
perplexity of fresh test data after each epoch. Knowing all but the letters gives 1.866.

    python benchmarks/quality/copy.py [--seeds 3] [--processes 2]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: this file would be taken for its own module of the same name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from side_by_side import save
from torch import nn

import tbptt
from tbptt.streams import CopyTask

LANES, EPOCH, LENGTH = 64, 4000, 10
LEARNED = 1.06


def train(name: str, seed: int, epochs: int, until: float) -> dict[str, Any]:
    """Train once; stop early at a test perplexity of `until`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = tbptt.SequenceModel(6, 6, hidden=50, embedding=6, layers=2)
    loss = nn.CrossEntropyLoss()
    train_stream = CopyTask(LANES, LENGTH, steps=EPOCH, seed=seed)
    test_stream = CopyTask(LANES, LENGTH, steps=1000, seed=1000 + seed)
    if name == "adaptive":
        length = tbptt.Adaptive(tolerance=0.1, min=2, max=100, first=15, scale_rate="sqrt")
        estimator, rate = tbptt.TBPTT(length, length), math.sqrt(15)
    else:
        estimator, rate = tbptt.TBPTT(int(name), 2 * int(name)), math.sqrt(int(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=1e-5)
    carry = estimator.init(model, LANES)
    perplexities: list[float] = []
    lengths: list[tuple[int, int, float]] = []
    begin = time.perf_counter()
    for epoch in range(epochs):
        while True:
            try:
                window = train_stream.read(estimator.next_steps(carry))
            except tbptt.errors.EndOfStream:
                train_stream.rewind()
                break
            k1 = estimator.next_steps(carry)
            estimate, carry = estimator.estimate(model, loss, carry, window)
            estimate = tbptt.ClipNorm(1.0 / k1)(estimate)
            estimate.apply(model)
            with tbptt.scaled_rate(optimizer, estimate.rate_factor):
                optimizer.step()
            if "needed_lookback" in estimate.metrics:
                lengths.append((epoch, k1, estimate.metrics["needed_lookback"]))
        perplexities.append(math.exp(tbptt.evaluate(model, loss, test_stream)["loss"]))
        if perplexities[-1] <= until:
            break
    return {
        "side": name,
        "seed": seed,
        "perplexities": perplexities,
        "lengths": lengths,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    sides = [("10", 60, LEARNED), ("adaptive", 120, LEARNED), ("5", 60, 1.0)]
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(train, name, seed, epochs, until)
            for seed in range(options.seeds)
            for name, epochs, until in sides
        ]
        runs = [job.result() for job in jobs]
    figures: dict[str, Any] = {}
    for run in runs:
        label = run["side"] if run["side"] == "adaptive" else f"K = {run['side']}"
        figures[f"{label}, seed {run['seed']}: lowest test perplexity"] = min(run["perplexities"])
        figures[f"{label}, seed {run['seed']}: epochs run"] = len(run["perplexities"])
    save("quality_copy", figures, {"runs": runs})


if __name__ == "__main__":
    main()
