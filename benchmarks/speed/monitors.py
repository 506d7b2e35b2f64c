"""What the monitors cost that every run has: metrics.jsonl, timing.jsonl, stability.jsonl, and the alarms.

    python benchmarks/speed/monitors.py [--rounds 15] [--threads 2]

A training update of the trainer with all of them against one with none, both with the guard and the checkpoints of
every run: an LSTM of 32 lanes x 256 with k1 = k2 = 64, and one of 1 x 64 with k1 = k2 = 16. A round is 100 updates
(of the larger one 20), with as many lines as are due in it; with k1 = 8, k2 = 64 of 32 x 256 there are boundary norms
as well. Then each monitor alone, of 1 x 64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import in_turn, ratio, save

import tbptt
from tbptt.monitors import Plan

FEATURES = 8


def updates(
    hidden: int, lanes: int, estimator: tbptt.TBPTT, number: int, kinds: Sequence[str] | None
) -> Callable[[], None]:
    """Return `number` updates of a run; `kinds` are the monitors that stay, None: all."""
    torch.manual_seed(0)
    model = tbptt.SequenceModel(FEATURES, FEATURES, hidden=hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = estimator.k1 * number * lanes
    stream = tbptt.ArrayStream(torch.randn(rows, FEATURES), torch.randn(rows, FEATURES), lanes=lanes)
    saving = tbptt.Saving(every=10**9)
    trainer = tbptt.Trainer(
        model, nn.MSELoss(), optimizer, estimator, stream, directory=tempfile.mkdtemp(), saving=saving, checked=False
    )
    trainer.run(updates=1)
    if kinds is not None:
        trainer.monitors = [each for each in trainer.monitors if type(each).__name__ in kinds]
    weights = dict(model.named_parameters())
    for monitor in trainer.monitors:
        monitor.begin(Plan(1, None, lanes, weights))

    def run() -> None:
        for _ in range(number):
            window = trainer._read(None)
            assert window is not None
            trainer._update(window)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for name, hidden, lanes, k1, k2, number in (
        ("LSTM 32x256, k1=k2=64", 256, 32, 64, 64, 20),
        ("LSTM 32x256, k1=8 k2=64", 256, 32, 8, 64, 20),
        ("LSTM 1x64, k1=k2=16", 64, 1, 16, 16, 100),
    ):
        estimator = tbptt.TBPTT(k1, k2)
        sides = {
            f"{name}: all": updates(hidden, lanes, estimator, number, None),
            f"{name}: none": updates(hidden, lanes, estimator, number, ()),
        }
        if lanes == 1:
            sides |= {
                f"{name}: {kind}": updates(hidden, lanes, estimator, number, (kind,))
                for kind in ("MetricsFile", "TimingFile", "StabilityFile", "Alarms")
            }
        found = in_turn(sides, options.rounds)
        samples |= found
        for side in sides:
            if not side.endswith("none"):
                figures[f"{side} / none"] = ratio(found, side, f"{name}: none")
        figures[f"median ms an update: {name}: none"] = median(found[f"{name}: none"]) * 1e3 / number
    save("speed_monitors", figures, samples, command=" ".join(["python", *sys.argv]), rounds=options.rounds)


if __name__ == "__main__":
    main()
