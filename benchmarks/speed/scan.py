"""What running all blocks of a window at once gains an LRU, against one step after another.

    python benchmarks/speed/scan.py [--rounds 7] [--threads 1]

A window forward and backward (the gradient of the sum of the outputs, by all parameters), of an LRU of 64 units with 8
inputs, for 1, 16 and 32 lanes and T = 1, 8, 64, 512 and 4096 steps. The ratio is that of the times, sequential by
parallel: above 1 the parallel one is faster. `scan="auto"` goes by this table. Shorter windows are repeated, so that
a sample has 512 steps at least.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import in_turn, ratio, save

from tbptt.models import LRU
from tbptt.models.linear_scan import Scan

FEATURES, UNITS = 8, 64
SCANS: tuple[Scan, ...] = ("sequential", "parallel", "auto")


def passes(scan: Scan, steps: int, lanes: int, number: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = LRU(FEATURES, UNITS, scan=scan)
    inputs = torch.randn(steps, lanes, FEATURES)
    _, state = model(inputs)
    before = tuple(leaf.detach() for leaf in state)

    def run() -> None:
        for _ in range(number):
            model.zero_grad()
            outputs, _ = model(inputs, before)
            outputs.sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for lanes in (1, 16, 32):
        for steps in (1, 8, 64, 512, 4096):
            name, number = f"{lanes} x {UNITS}, T={steps}", max(1, 512 // steps)
            sides = {f"{name}: {scan}": passes(scan, steps, lanes, number) for scan in SCANS}
            found = in_turn(sides, options.rounds)
            samples |= found
            slow, fast, auto = sides
            figures[f"{name}: sequential / parallel"] = ratio(found, slow, fast)
            figures[f"{name}: sequential / auto"] = ratio(found, slow, auto)
            figures[f"{name}: median ms, sequential"] = median(found[slow]) * 1e3 / number
    save("speed_scan", figures, samples, command=" ".join(["python", *sys.argv]), rounds=options.rounds)


if __name__ == "__main__":
    main()
