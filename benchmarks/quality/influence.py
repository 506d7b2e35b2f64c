"""Where every short truncation runs away, random truncation arrives: influence balancing, trained by `Trainer`.

    python benchmarks/quality/influence.py [--seeds 6] [--picture docs/influence.png]
    python benchmarks/quality/influence.py --from benchmarks/results/quality_influence.json --picture docs/influence.png

Plain gradient descent over 30 000 steps of the stream, in float64. `ARTBP` with a mean length of 16, alpha = 4 and 6
and seeds 0 to 5, with a rate of 1e-5 for the gradient of a segment's *sum*: the library divides that by 16, so the
optimizer has 16e-5. `TBPTT(1, 10)` with 1e-5, and `TBPTT(16, 16)` with 16e-5, whose gradient is a mean over 16 steps.
Measured is the loss at the end of the stream; the picture is drawn by plotly and taken by chromium; with `--from`, of
runs that were saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import warnings
from typing import Any

import torch
from picture import lines, parsed, saved_runs, take
from side_by_side import save
from torch import Tensor

import tbptt
from tbptt.models import InfluenceBalancingModel
from tbptt.monitors import Update
from tbptt.streams import InfluenceBalancing

STEPS, RATE, MEAN = 30_000, 1e-5, 16
SOLVED = 1e-6
SIDES = {
    "ARTBP, alpha = 4": (lambda seed: tbptt.ARTBP(MEAN, alpha=4.0, seed=seed), RATE * MEAN),
    "ARTBP, alpha = 6": (lambda seed: tbptt.ARTBP(MEAN, alpha=6.0, seed=seed), RATE * MEAN),
    "TBPTT(1, 10)": (lambda seed: tbptt.TBPTT(1, 10), RATE),
    "TBPTT(16, 16)": (lambda seed: tbptt.TBPTT(MEAN, MEAN), RATE * MEAN),
}


class Losses(tbptt.Monitor):
    """Remembers the loss of each window, and the step of the stream that it ends at."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def update(self, update: Update) -> None:
        self.steps.append(update.position)
        self.losses.append(float(update.estimate.loss))


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


def train(side: str, seed: int) -> dict[str, Any]:
    """Make one pass of 30 000 steps."""
    estimator, rate = SIDES[side]
    model = InfluenceBalancingModel().double()
    stream = InfluenceBalancing(steps=STEPS, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    seen = Losses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the alarms, which say of truncation what the figures here say
        tbptt.Trainer(model, half_square, optimizer, estimator(seed), stream, monitors=[seen]).run(passes=1)
    kept = max(1, len(seen.steps) // 300)
    return {
        "side": side,
        "seed": seed,
        "theta": float(model.theta.detach()),
        "last": seen.losses[-1],
        "steps": seen.steps[kept - 1 :: kept],
        "losses": seen.losses[kept - 1 :: kept],
    }


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw each run's loss; needs chromium."""
    sides = {side: [(run["steps"], run["losses"]) for run in runs if run["side"] == side] for side in SIDES}
    figure = lines(sides)
    figure.update_yaxes(type="log", exponentformat="power", dtick=4, title="loss")
    figure.update_xaxes(title="steps of the stream")
    take(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    options = parsed(parser)
    if options.saved is not None:
        picture(saved_runs(options.saved), options.picture)
        return
    torch.set_num_threads(1)
    runs = [
        train(side, seed) for side in SIDES for seed in range(options.seeds if side.startswith("ARTBP") else 1)
    ]  # nothing is random in the others
    figures: dict[str, Any] = {}
    for side in SIDES:
        its_own = [run for run in runs if run["side"] == side]
        solved = sum(run["last"] < SOLVED for run in its_own)
        figures[f"{side}: seeds with a last loss below 1e-6"] = f"{solved} of {len(its_own)}"
        worst = max(run["last"] for run in its_own)
        figures[f"{side}: largest last loss"] = f"{worst:.1e}" if math.isfinite(worst) else str(worst)
        figures[f"{side}: theta at the end (-0.1667 is right)"] = ", ".join(f"{run['theta']:.4g}" for run in its_own)
    if options.picture is not None:
        picture(runs, options.picture)
    save("quality_influence", figures, {"runs": runs}, steps=STEPS)


if __name__ == "__main__":
    main()
