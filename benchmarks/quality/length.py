"""Trained on windows of 64 characters, read for 1024: does the loss rise behind the 64?

Shakespeare, next character. One model, trained twice on the same windows from the same weights: with the state carried
from window to window, `TBPTT(64, 64)`, and with a reset at the start of each window. The gradient goes back 64 steps in
both; what differs is which states the model has ever been in.

The model is a linear recurrence that forgets slowly, as state-space models for long texts do: two layers of `LRU` with
128 units whose |λ| start between 0.99 and 0.9999. (A transformer takes longer, and one whose memory is full after 64
steps has little to show.) Adam with rate 2e-3, gradients clipped at norm 1, 32 lanes.

Read from the start of a sequence, the state carried, the last tenth of the text in 108 lanes of 1024 characters, 16
times, each time begun 64 characters later and round at its end: so that each character comes once in each of the 16
stretches of 64, and the mean losses of these are of the same text.

    python benchmarks/quality/length.py [--seeds 3] [--processes 2] [--picture docs/length.png]
    python benchmarks/quality/length.py --from benchmarks/results/quality_length.json --picture docs/length.png
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
from dataclasses import replace
from typing import Any

import torch
from picture import lines, parsed, saved_runs, take
from side_by_side import save
from torch import Tensor, nn

import tbptt
from tbptt.models import LRU
from tbptt.streams import shakespeare

STEPS, LANES, BLOCKS, SYMBOLS = 64, 32, 16, 65


class Slow(nn.Module):
    """Symbols in, a linear recurrence that forgets slowly, scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 64)
        self.core = LRU(64, 128, 64, layers=2, glu=True, r_min=0.99, r_max=0.9999)
        self.head = nn.Linear(64, SYMBOLS)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.core(self.embedding(inputs), state)
        return self.head(outputs), state


def by_place(model: nn.Module) -> list[float]:
    """Return the mean loss in each of the 16 stretches of 64 characters."""
    whole = shakespeare(lanes=1, split="test").read(10**6)
    assert isinstance(whole.targets, torch.Tensor)
    steps = STEPS * BLOCKS
    lanes = whole.steps // steps
    total = torch.zeros(BLOCKS, dtype=torch.float64)
    with torch.no_grad():
        for begin in range(0, steps, STEPS):
            inputs, targets = (
                each[: lanes * steps, 0].roll(-begin).view(lanes, steps).T for each in (whole.inputs, whole.targets)
            )
            state = None
            for block in range(BLOCKS):
                part = slice(block * STEPS, (block + 1) * STEPS)
                outputs, state = model(inputs[part], state)
                total[block] += float(nn.functional.cross_entropy(outputs.flatten(0, 1), targets[part].flatten()))
    return (total / BLOCKS).tolist()


def train(carried: bool, seed: int, updates: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, stream, estimator = Slow(), shakespeare(lanes=LANES), tbptt.TBPTT(STEPS, STEPS)
    optimizer, clip = torch.optim.Adam(model.parameters(), lr=2e-3), tbptt.ClipNorm(1.0)
    carry, begin, first = estimator.init(model, LANES), time.process_time(), torch.zeros(STEPS, LANES, dtype=torch.bool)
    first[0] = True
    for _ in range(updates):
        try:
            window = stream.read(STEPS)
        except tbptt.errors.EndOfStream:
            stream.rewind()
            window = stream.read(STEPS)
        window = window if carried else replace(window, reset=first[: window.steps])
        estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
        clip(estimate).apply(model)
        optimizer.step()
    seconds = time.process_time() - begin
    return {"carried": carried, "seed": seed, "losses": by_place(model.eval()), "cpu_seconds": seconds}


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw each run's loss by place; needs chromium."""
    middles = [STEPS * (block + 0.5) for block in range(BLOCKS)]
    sides = {
        "state carried": [(middles, run["losses"]) for run in runs if run["carried"]],
        "from zero in each window": [(middles, run["losses"]) for run in runs if not run["carried"]],
    }
    figure = lines(sides, markers=True)
    note = {"annotation_text": "end of a training window", "annotation_position": "top right"}
    figure.add_vline(STEPS, line={"color": "#888888", "width": 1}, annotation_font_color="#555555", **note)
    figure.update_yaxes(title="nats per character", tickformat=".2f")
    figure.update_xaxes(title="characters read so far", tick0=0, dtick=2 * STEPS, range=[0, STEPS * BLOCKS])
    figure.update_layout(legend_title_text="trained with")
    take(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--processes", type=int, default=2)
    options = parsed(parser)
    if options.saved is not None:
        picture(saved_runs(options.saved), options.picture)
        return
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(train, carried, seed, options.updates)
            for seed in range(options.seeds)
            for carried in (True, False)
        ]
        runs = [job.result() for job in jobs]
    figures: dict[str, Any] = {}
    for run in runs:
        losses = run["losses"]
        label = f"{'state carried' if run['carried'] else 'zero state'}, seed {run['seed']}"
        figures[f"{label}: loss in steps 0-63"] = losses[0]
        figures[f"{label}: loss in steps 64-127"] = losses[1]
        figures[f"{label}: loss in steps 960-1023"] = losses[-1]
        figures[f"{label}: highest of later ones above that of steps 0-63"] = max(losses[1:]) - losses[0]
    if options.picture is not None:
        picture(runs, options.picture)
    save("quality_length", figures, {"runs": runs}, updates=options.updates)


if __name__ == "__main__":
    main()
