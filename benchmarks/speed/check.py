"""What `tbptt.check` costs, in updates of the training that it stands before.

    python benchmarks/speed/check.py [--rounds 5]

CPU time on one thread: the check on three windows, as the trainer reads them, against an update of TBPTT(64, 64) with
Adam, of an LSTM of 32 lanes x 1024. At most ten updates are allowed for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

import tbptt

LANES, HIDDEN, FEATURES, STEPS = 32, 1024, 64, 64


def cpu_seconds(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tbptt.SequenceModel(FEATURES, FEATURES, hidden=HIDDEN)
    estimator = tbptt.TBPTT(STEPS, STEPS)
    adam = torch.optim.Adam(model.parameters())
    inputs = torch.randn(3 * STEPS, LANES, FEATURES)
    window = tbptt.Window(inputs, inputs)

    def update() -> None:
        estimate, _ = estimator.estimate(model, nn.MSELoss(), estimator.init(model, LANES), window[:STEPS])
        estimate.apply(model)
        adam.step()

    samples: dict[str, list[float]] = {"update": [], "check": []}
    for each in range(options.rounds + 1):  # the first to warm up
        found = {"update": cpu_seconds(update), "check": cpu_seconds(lambda: tbptt.check(model, window, estimator))}
        for name, seconds in found.items() if each else ():
            samples[name].append(seconds)
    figures = {f"{name}_cpu_s": median(seconds) for name, seconds in samples.items()}
    figures["updates"] = median(a / b for a, b in zip(samples["check"], samples["update"], strict=True))
    save("check", figures, samples, unit="CPU seconds", lanes=LANES, hidden=HIDDEN, steps=STEPS, threads=1)


if __name__ == "__main__":
    main()
