"""What adapting costs: training with `Adaptive` at its defaults against the same lengths, held fixed.

    python benchmarks/speed/adaptive.py [--seconds 20] [--rounds 3] [--threads 1]

Both sides train with the same k1 and k2 in every update: those that Adaptive chooses are handed on to an estimator that
makes no probes and remembers no more than it needs. The updates of both sides alternate.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

import tbptt
from tbptt.streams import ecg


def pairs() -> dict[str, tuple[nn.Module, nn.Module, list[tbptt.Stream]]]:
    torch.manual_seed(0)
    path = Path(tbptt.__file__).parent / "data" / "shakespeare.txt"
    texts = [tbptt.TextStream(path, lanes=32) for _ in range(2)]
    symbols = texts[0].num_symbols
    return {
        "ecg, LSTM 32, 16 lanes": (
            tbptt.SequenceModel(2, 1, hidden=32),
            nn.BCEWithLogitsLoss(),
            [ecg(lanes=16), ecg(lanes=16)],
        ),
        "shakespeare, LSTM 128, 32 lanes": (
            tbptt.SequenceModel(symbols, symbols, hidden=128, embedding=32),
            nn.CrossEntropyLoss(),
            [*texts],
        ),
    }


def step(estimator: tbptt.TBPTT, side: dict[str, Any], window: tbptt.Window) -> tuple[float, dict[str, float]]:
    begin = time.perf_counter()
    estimate, side["carry"] = estimator.estimate(side["model"], side["loss"], side["carry"], window)
    tbptt.ClipNorm(1.0)(estimate).apply(side["model"])
    side["optimizer"].step()
    return time.perf_counter() - begin, estimate.metrics


def read(stream: tbptt.Stream, steps: int) -> tbptt.Window:
    try:
        return stream.read(steps)
    except tbptt.errors.EndOfStream:
        stream.rewind()
        return stream.read(steps)


def run(name: str, windows: str, seconds: float) -> tuple[float, int, int]:
    """Return adapting / fixed in time, the probes made, and the last k2."""
    model, loss, streams = pairs()[name]
    adaptive = tbptt.Adaptive(windows=windows)
    estimator = tbptt.TBPTT(adaptive, adaptive)
    sides = []
    for stream in streams:
        mine = copy.deepcopy(model)
        sides.append({"model": mine, "loss": loss, "stream": stream, "optimizer": torch.optim.Adam(mine.parameters())})
        sides[-1]["carry"] = estimator.init(mine, stream.lanes)
    taken, probes, k2 = [0.0, 0.0], 0, 0
    while taken[0] < seconds:
        fixed = estimator.fixed(sides[0]["carry"])
        window = [read(side["stream"], fixed.k1) for side in sides]
        spent, measured = step(estimator, sides[0], window[0])
        taken[0] += spent
        probes += "needed_lookback" in measured
        taken[1] += step(tbptt.TBPTT(fixed.k1, fixed.k2), sides[1], window[1])[0]
        k2 = fixed.k2
    return taken[0] / taken[1], probes, k2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    samples: dict[str, list[float]] = {}
    for name in pairs():
        for windows in ("plain", "overlapping"):
            runs = [run(name, windows, options.seconds) for _ in range(options.rounds)]
            label = f"{name}, {windows}"
            samples[label] = [ratio for ratio, _, _ in runs]
            figures[f"{label}: adapting / fixed"] = median(samples[label])
            figures[f"{label}: probes in {options.seconds:g} s"] = runs[-1][1]
            figures[f"{label}: last k2"] = runs[-1][2]
    save("speed_adaptive", figures, samples, seconds=options.seconds)


if __name__ == "__main__":
    main()
