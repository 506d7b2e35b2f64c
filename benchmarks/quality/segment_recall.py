"""How many segments back must the gradient go for a memory token to learn what is asked for?

The task, in `benchmarks/recall.py`: a symbol is marked in the first of S segments, and asked for at the last step of
the last; only there is a loss. Guessing has 1/4. The model is `SegmentTransformer`, one layer of width 32, 2 heads,
2 memory tokens; Adam with rate 1e-3, gradients clipped at norm 1, 256 lanes.

A window is a whole sequence, and `TBPTT(k1=12 * S, k2=12 * k)` sends its one loss k
segments back; with k1=12 the gradient is the same, as no loss comes before the last segment, and what is run again
costs more. Accuracy is over 2048 fresh sequences; guessing has 1/4. Training ends early where 0.99 is reached.

    python benchmarks/quality/segment_recall.py [--seeds 3] [--processes 2]
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
from recall import STEPS, accuracy, made, sequences
from side_by_side import save
from torch import nn

import tbptt

LANES, EVERY, ENOUGH = 256, 50, 0.99
SIDES = [(4, 4), (4, 3), (4, 1), (8, 8), (8, 7), (8, 4)]
"""Segments of a sequence, and how many of them the gradient goes back."""


def train(segments: int, lookback: int, seed: int, updates: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = made()
    optimizer, clip = torch.optim.Adam(model.parameters(), lr=1e-3), tbptt.ClipNorm(1.0)
    estimator = tbptt.TBPTT(k1=STEPS * segments, k2=STEPS * lookback)
    carry, generator = estimator.init(model, LANES), torch.Generator().manual_seed(seed)
    found, begin = [], time.process_time()
    for update in range(1, updates + 1):
        window = sequences(segments, LANES, generator)
        estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
        clip(estimate).apply(model)
        optimizer.step()
        if update % EVERY == 0:
            found.append(accuracy(model, segments, seed))
            if found[-1] >= ENOUGH:
                break
    seconds = time.process_time() - begin
    return {"segments": segments, "lookback": lookback, "seed": seed, "accuracies": found, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--updates", type=int, default=500)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(train, *side, seed, options.updates) for seed in range(options.seeds) for side in SIDES]
        runs = [job.result() for job in jobs]
    figures: dict[str, Any] = {}
    for segments, lookback in SIDES:
        mine = [run for run in runs if (run["segments"], run["lookback"]) == (segments, lookback)]
        label = f"S = {segments}, k2 = {lookback} segments"
        figures |= {f"{label}, seed {run['seed']}: last accuracy": run["accuracies"][-1] for run in mine}
        figures[f"{label}: highest accuracy, all seeds"] = max(max(run["accuracies"]) for run in mine)
        figures[f"{label}: updates, median"] = median(EVERY * len(run["accuracies"]) for run in mine)
        figures[f"{label}: CPU seconds, median"] = median(run["cpu_seconds"] for run in mine)
    save("quality_segment_recall", figures, {"runs": runs}, updates=options.updates)


if __name__ == "__main__":
    main()
