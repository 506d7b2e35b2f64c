"""What a step of learning while predicting costs, and how well it predicts, on the embedded ECG.

    python benchmarks/speed/online.py [--rows 18000] [--rounds 30] [--seeds 2] [--rate 3e-3]

Every side sees the same rows, one at a time: predict, then learn; LSTM 64, or eLSTM and LRU of 64 units where they are
named, one lane, Adam, no clipping, one thread. The sides take turns, a thirtieth of the rows at a time, so that
whatever else the machine does meets all. Rolling window is the approach of deep-river's RollingEstimator, written
fresh: the newest 24 rows are run from the zero state for each prediction, and again, with one backward pass from the
newest row's loss and one optimizer step, for each label. The others are `tbptt.Online`. "prequential": of predictions
made before the row's label was learned from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import save

import tbptt
from tbptt.streams import ecg_rows

WINDOW = 24
RATE = 3e-3
Step = Callable[[Tensor, Tensor], float]
"""A row and its label -> the prediction that was made before the label was seen."""


def parts(seed: int, core: str = "lstm") -> tuple[tbptt.SequenceModel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = tbptt.SequenceModel(2, 1, hidden=64, core=core)
    return model, torch.optim.Adam(model.parameters(), lr=RATE)


def rolling_window(seed: int) -> tuple[Step, Callable[[], int]]:
    model, adam = parts(seed)
    rows: deque[Tensor] = deque(maxlen=WINDOW)
    updates = 0

    def step(x: Tensor, y: Tensor) -> float:
        nonlocal updates
        rows.append(x)
        window = torch.stack(tuple(rows)).unsqueeze(1)
        model.eval()
        with torch.no_grad():
            prediction = float(model(window)[0][-1, 0])
        model.train()
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(model(window)[0][-1, 0], y).backward()
        adam.step()
        updates += 1
        return prediction

    return step, lambda: updates


def online(seed: int, estimator: tbptt.Estimator, core: str = "lstm") -> tuple[Step, Callable[[], int]]:
    model, adam = parts(seed, core)
    learner = tbptt.Online(model, nn.BCEWithLogitsLoss(), adam, estimator)

    def step(x: Tensor, y: Tensor) -> float:
        prediction = float(learner.predict_one(x))
        learner.learn_one(x, y)
        return prediction

    return step, lambda: learner.updates


SIDES: dict[str, Callable[[int], tuple[Step, Callable[[], int]]]] = {
    "rolling window 24": rolling_window,
    "TBPTT(1, 24)": lambda seed: online(seed, tbptt.TBPTT(1, 24)),
    "TBPTT(1, 24) retain": lambda seed: online(seed, tbptt.TBPTT(1, 24, replay="retain")),
    "TBPTT(4, 24)": lambda seed: online(seed, tbptt.TBPTT(4, 24)),
    "TBPTT(8, 24)": lambda seed: online(seed, tbptt.TBPTT(8, 24)),
    "TBPTT(8, 24) retain": lambda seed: online(seed, tbptt.TBPTT(8, 24, replay="retain")),
    "TBPTT(16, 24)": lambda seed: online(seed, tbptt.TBPTT(16, 24)),
    "TBPTT(24, 24)": lambda seed: online(seed, tbptt.TBPTT(24, 24)),
    "TBPTT(1, 1)": lambda seed: online(seed, tbptt.TBPTT(1, 1)),
    "eLSTM, ElementwiseRTRL(1)": lambda seed: online(seed, tbptt.ElementwiseRTRL(1), "elstm"),
    "LRU, ElementwiseRTRL(1)": lambda seed: online(seed, tbptt.ElementwiseRTRL(1), "lru"),
    "LRU, ElementwiseRTRL(8)": lambda seed: online(seed, tbptt.ElementwiseRTRL(8), "lru"),
}


def auc(scores: Tensor, labels: Tensor) -> float:
    order = scores.argsort()
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    positive = labels > 0.5
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def main() -> None:
    global RATE
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=18_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    RATE = options.rate
    torch.set_num_threads(1)
    inputs, targets, mask = (torch.from_numpy(each[: options.rows]) for each in ecg_rows("all"))
    xs, ys = list(inputs), list(targets)
    cuts = torch.linspace(0, len(xs), options.rounds + 1).long().tolist()
    rounds: dict[str, list[float]] = {name: [] for name in SIDES}
    latencies: dict[str, list[float]] = {name: [] for name in SIDES}
    figures: dict[str, float] = {}
    scores: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    updates: dict[str, int] = {}
    for seed in range(options.seeds):
        made = {name: build(seed) for name, build in SIDES.items()}
        said: dict[str, list[float]] = {name: [] for name in SIDES}
        names = list(SIDES)
        for turn, (begin, end) in enumerate(pairwise(cuts)):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                step, total = made[name][0], 0.0
                for row in range(begin, end):
                    before = time.perf_counter()
                    said[name].append(step(xs[row], ys[row]))
                    took = time.perf_counter() - before
                    total += took
                    if turn:  # the first round warms up
                        latencies[name].append(took)
                if turn:
                    rounds[name].append(total / (end - begin))
        updates = {name: made[name][1]() for name in SIDES}
        for name in SIDES:
            scores[name].append(said[name])
    base = "rolling window 24"
    for name in SIDES:
        ordered = sorted(latencies[name])
        per_row = median(rounds[name])
        outputs = [torch.tensor(each) for each in scores[name]]
        losses = [float(F.binary_cross_entropy_with_logits(each[mask], targets[mask])) for each in outputs]
        figures |= {
            f"{name}: rows a second": 1 / per_row,
            f"{name}: updates a second": updates[name] / len(xs) / per_row,
            f"{name}: times faster a row than the rolling window": median(
                a / b for a, b in zip(rounds[base], rounds[name], strict=True)
            ),
            f"{name}: median latency ms": 1e3 * median(ordered),
            f"{name}: 99th percentile latency ms": 1e3 * ordered[int(0.99 * len(ordered))],
            f"{name}: prequential loss, mean over seeds": sum(losses) / len(losses),
            f"{name}: prequential AUC, mean over seeds": sum(auc(each[mask], targets[mask]) for each in outputs)
            / len(outputs),
            f"{name}: prequential AUC of the last half, mean over seeds": sum(
                auc(each[len(xs) // 2 :][mask[len(xs) // 2 :]], targets[len(xs) // 2 :][mask[len(xs) // 2 :]])
                for each in outputs
            )
            / len(outputs),
        }
    name = "speed_online" if options.rate == 3e-3 else f"speed_online_rate_{options.rate:g}"
    save(name, figures, rounds, rows=len(xs), seeds=options.seeds, rounds=options.rounds, rate=options.rate)


if __name__ == "__main__":
    main()
