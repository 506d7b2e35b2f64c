"""Does a curriculum over the number of segments pay, as it is done by hand?

The task is that of `segment_recall.py`, with S = 16 segments. Trained on it from the start, `TBPTT(192, 192)`; or on
sequences of 1, 2, 4, 8 and at last 16 segments, each until its loss is below 0.1 (guessing has 1.39), with
`Curriculum([1, 2, 4, 8, 16], enough=0.1, segment=12)` for k1 and k2 both: a window is a whole sequence, as long as the
estimator asks for. The last side draws among the stages so far (`mixed=True`). All else is as there.

Counted are updates and CPU seconds of one thread until the accuracy over 2048 fresh sequences of 16 segments, looked at
every 50 updates, is 0.95; the looking is not counted. It ends there, or when the CPU seconds are over.

    python benchmarks/quality/curriculum.py [--seeds 3] [--seconds 400] [--processes 2]
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
from typing import Any

import torch
from recall import STEPS, accuracy, made, sequences
from side_by_side import save
from torch import nn

import tbptt

SEGMENTS, LANES, EVERY, ENOUGH = 16, 256, 50, 0.95
SIDES: dict[str, tbptt.Curriculum] = {
    "from the start": tbptt.Curriculum([SEGMENTS], segment=STEPS),
    "curriculum": tbptt.Curriculum([1, 2, 4, 8, SEGMENTS], enough=0.1, segment=STEPS),
    "curriculum, mixed": tbptt.Curriculum([1, 2, 4, 8, SEGMENTS], enough=0.1, segment=STEPS, mixed=True),
}


def train(side: str, seed: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, estimator = made(), tbptt.TBPTT(k1=SIDES[side], k2=SIDES[side])
    optimizer, clip = torch.optim.Adam(model.parameters(), lr=1e-3), tbptt.ClipNorm(1.0)
    carry, generator = estimator.init(model, LANES), torch.Generator().manual_seed(seed)
    found: list[float] = []
    stages: list[int] = []
    spent = 0.0
    while spent < seconds and (not found or found[-1] < ENOUGH):
        begin = time.process_time()
        for _ in range(EVERY):
            steps = estimator.next_steps(carry)
            stages.append(steps // STEPS)
            estimate, carry = estimator.estimate(
                model, nn.CrossEntropyLoss(), carry, sequences(steps // STEPS, LANES, generator)
            )
            clip(estimate).apply(model)
            optimizer.step()
        spent += time.process_time() - begin
        found.append(accuracy(model, SEGMENTS, seed))
    reached = found[-1] >= ENOUGH
    return {
        "side": side,
        "seed": seed,
        "reached": reached,
        "updates": len(stages),
        "cpu_seconds": spent,
        "accuracies": found,
        "updates_by_segments": {str(each): stages.count(each) for each in sorted(set(stages))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=400.0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(train, side, seed, options.seconds) for seed in range(options.seeds) for side in SIDES]
        runs = [job.result() for job in jobs]
    figures: dict[str, Any] = {}
    for run in runs:
        label = f"{run['side']}, seed {run['seed']}"
        figures[f"{label}: reached {ENOUGH}"] = run["reached"]
        figures[f"{label}: updates"] = run["updates"]
        figures[f"{label}: CPU seconds"] = run["cpu_seconds"]
        figures[f"{label}: last accuracy"] = run["accuracies"][-1]
    save("quality_curriculum", figures, {"runs": runs}, seconds=options.seconds)


if __name__ == "__main__":
    main()
