"""What fine-tuning past the window does to Mamba2: `examples/mamba2_long_document.py`, beside its control.

    python benchmarks/quality/long_document.py

Three seeds. "carried" is the example as it is; "reset" the same fine-tuning from the same pretrained model, each
window from a state of zeros; "usual decay" is a pretrained model alone, with the time steps that transformers begins
with. The figures are means over the seeds, in nats a token, by position in windows of 32 tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "examples")]

import shutil
import tempfile
from statistics import mean
from typing import Any

import mamba2_long_document as example
import torch
from side_by_side import save

WINDOW, SEEDS = 32, (0, 1, 2)
BANDS = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
# With resets a gradient ends at its own window: k2 = 32 is the same as the example's 64, and cheaper.
SIDES = {"carried": [], "reset": ["--reset", "--k2", "32"], "usual decay": ["--time-steps", "1e-3", "1e-1"]}


def run(directory: Path, words: list[str]) -> dict[str, Any]:
    figures = example.main([*words, "--directory", str(directory)])
    assert figures is not None
    return figures


def by_band(losses: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    return {
        kind: {f"{a} to {b}": float(each[a * WINDOW : b * WINDOW].mean()) for a, b in BANDS}
        for kind, each in losses.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            for side, words in SIDES.items():
                directory = Path(folder) / side
                if side == "reset":
                    shutil.copytree(Path(folder) / "carried" / "pretrained", directory / "pretrained")
                more = ["--updates", "1"] if side == "usual decay" else []
                found = run(directory, [*words, *more, "--seed", str(seed)])
                samples[side].append(
                    {when: by_band(found[when]) for when in ("before", "after")}
                    | {name: found[name] for name in ("held_bytes", "whole_bytes")}
                )
    figures: dict[str, float] = {}
    for side, when in (("carried", "before"), ("carried", "after"), ("reset", "after"), ("usual decay", "before")):
        for kind in ("carried", "dropped"):
            for band in samples[side][0][when][kind]:
                losses = [each[when][kind][band] for each in samples[side]]
                figures[f"{side}: {when}, {kind}, windows {band}"] = mean(losses)
    figures["MB held for an update"] = samples["carried"][0]["held_bytes"] / 1e6
    figures["GB that the whole document would need, in proportion"] = samples["carried"][0]["whole_bytes"] / 1e9
    save("quality_long_document", figures, samples, seeds=SEEDS)


if __name__ == "__main__":
    main()
