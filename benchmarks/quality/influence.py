"""Where every short truncation runs away, random truncation arrives: influence balancing, trained by `Trainer`.

    python benchmarks/quality/influence.py [--seeds 6] [--picture docs/influence.png]

Plain gradient descent over 30 000 steps of the stream, in float64. `ARTBP` with a mean length of 16, alpha = 4 and 6
and seeds 0 to 5, with a rate of 1e-5 for the gradient of a segment's *sum*: the library divides that by 16, so the
optimizer has 16e-5. `TBPTT(1, 10)` with 1e-5, and `TBPTT(16, 16)` with 16e-5, whose gradient is a mean over 16 steps.
Measured is the loss at the end of the stream; the picture is drawn by plotly and taken by chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import shutil
import subprocess
import tempfile
import warnings
from typing import Any

import plotly.graph_objects as go
import torch
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
    colours = dict(zip(SIDES, ("#0072B2", "#009E73", "#D55E00", "#AA4499"), strict=True))
    dashes = dict(zip(SIDES, ("solid", "dot", "dash", "longdash"), strict=True))
    figure, shown = go.Figure(), set[str]()
    for run in runs:
        side = run["side"]
        style = {"color": colours[side], "dash": dashes[side], "width": 1.5}
        lines = {"x": run["steps"], "y": run["losses"], "mode": "lines", "line": style}
        figure.add_scatter(name=side, legendgroup=side, showlegend=side not in shown, **lines)
        shown.add(side)
    figure.update_yaxes(type="log", exponentformat="power", dtick=4, title="loss")
    figure.update_xaxes(title="steps of the stream")
    figure.update_layout(template="plotly_white", width=900, height=460, margin={"l": 70, "r": 20, "t": 20, "b": 60})
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("--picture needs chromium")
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        style = "<style>body{margin:0}</style>"
        page.write_text(style + figure.to_html(config={"displayModeBar": False}, full_html=False), encoding="utf-8")
        words = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        size = ["--window-size=900,460", "--force-device-scale-factor=2", f"--screenshot={path.resolve()}"]
        subprocess.run([program, *words, *size, page.as_uri()], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
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
