"""Does a predicted gradient teach what a short window cannot? Copying over 20 steps with windows of 10.

Three tasks, all with a lag of 20 steps, a GRU of 32 units, and Adam; gradients clipped at norm 1:

letter  `CopyTask` of one letter of four; only the letters count, so that the net need not know when. Rate 5e-3.
whole   `CopyTask` of four letters of two; all targets count, and most of it is to know when. Rate 2e-3.
recall  `DelayedRecall`, where twenty symbols have to be held at once. Rate 5e-3.

The predictor's rate is 3e-2. A net begins with 1 added to the bias of its update gate, so that its state keeps
something for ten steps; "forgetful" without. Sides: truncation after 10 and after 30 steps, and synthetic gradients
without traces (lambda = 0), with them (lambda = 1), and with 32 hidden units. Guessing has a loss of ln 4 = 1.386 in
the first and the last; in the second one that knows all but the letters has 0.111. Measured are the training loss
and, every 500 updates, the cosine of what is predicted to the true gradient of the next 40 steps' losses, over
eleven windows.

    python benchmarks/quality/synthetic.py [--seeds 3] [--processes 2]
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
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from side_by_side import save
from torch import Tensor, nn

import tbptt
from tbptt.streams import CopyTask, DelayedRecall

LANES, HIDDEN, K1, EVERY, AHEAD, MEASURED = 32, 32, 10, 500, 4, 11
LEARNED = 0.02
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Task:
    stream: Any
    rate: float
    letters: int | None = None  # what counts, if not everything does


TASKS = {
    "letter": Task(lambda seed: CopyTask(LANES, 2, delay=18, letters=4, steps=10**7, seed=seed), 5e-3, 4),
    "whole": Task(lambda seed: CopyTask(LANES, 5, delay=15, letters=2, steps=10**7, seed=seed), 2e-3),
    "recall": Task(lambda seed: DelayedRecall(20, LANES, symbols=4, steps=10**7, seed=seed), 5e-3),
}
SHORT, LONG, WITHOUT = tbptt.TBPTT(K1, K1), tbptt.TBPTT(K1, 3 * K1), tbptt.SyntheticGradients(K1)
SIDES: list[tuple[str, str, tbptt.Estimator, int]] = [
    ("letter", "TBPTT(10, 10)", SHORT, 10_000),
    ("letter", "TBPTT(10, 30)", LONG, 10_000),
    ("letter", "lambda = 0", WITHOUT, 10_000),
    ("letter", "lambda = 1", tbptt.SyntheticGradients(K1, lambda_=1.0), 10_000),
    ("letter", "lambda = 0, 32 units", tbptt.SyntheticGradients(K1, 32), 10_000),
    ("letter", "lambda = 0, forgetful", WITHOUT, 10_000),
    ("whole", "TBPTT(10, 10)", SHORT, 6000),
    ("whole", "TBPTT(10, 30)", LONG, 6000),
    ("whole", "lambda = 0", WITHOUT, 6000),
    ("whole", "lambda = 0, gamma = 0.95", tbptt.SyntheticGradients(K1, gamma=0.95), 6000),
    ("recall", "TBPTT(10, 30)", LONG, 4000),
    ("recall", "lambda = 0", WITHOUT, 4000),
]


def read(stream: Any, task: Task) -> tbptt.Window:
    window = stream.read(K1)
    return window if task.letters is None else replace(window, mask=window.targets < task.letters)


def cosine(model: tbptt.SequenceModel, state: Tensor, stream: Any, task: Task) -> float:
    """Of the predictions at the ends of the next windows with the gradient of the losses after them, by autograd."""
    windows = [read(stream, task) for _ in range(MEASURED + AHEAD)]
    predictor = model.get_submodule("synthetic_gradients")
    found: list[Tensor] = []
    true: list[Tensor] = []
    for index in range(MEASURED):
        start = state.detach().requires_grad_()
        now, total = start, torch.zeros(())
        for window in windows[index : index + AHEAD]:
            outputs, now = model(window.inputs, now)
            losses = nn.functional.cross_entropy(outputs.transpose(1, 2), window.targets, reduction="none")
            total = total + losses[window.mask].sum()
        true.append(torch.autograd.grad(total, start)[0][0])
        with torch.no_grad():
            found.append(predictor(start[0]))
            state = model(windows[index].inputs, start)[1]
    a, b = torch.cat(found).flatten(), torch.cat(true).flatten()
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def train(name: str, side: str, estimator: tbptt.Estimator, updates: int, seed: int) -> dict[str, Any]:
    """Train once; stop early at a mean loss of `LEARNED` over `EVERY` updates."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    task = TASKS[name]
    stream = task.stream(seed)
    symbols = stream.num_symbols
    model = tbptt.SequenceModel(symbols, symbols, hidden=HIDDEN, embedding=symbols, core="gru")
    if "forgetful" not in side:
        with torch.no_grad():
            model.get_parameter("core.bias_hh_l0")[HIDDEN : 2 * HIDDEN] += 1.0
    synthetic = isinstance(estimator, tbptt.SyntheticGradients)
    if synthetic:
        estimator.attach(model, task.stream(seed).read(1).inputs)
        groups = estimator.parameter_groups(model, lr=task.rate, predictor_lr=3e-2)
    else:
        groups = [{"params": list(model.parameters()), "lr": task.rate}]
    optimizer, clip = torch.optim.Adam(groups), tbptt.ClipNorm(1.0)
    carry, losses, cosines = estimator.init(model, LANES), [], []
    total, count, begin = 0.0, 0, time.process_time()
    for update in range(1, updates + 1):
        estimate, carry = estimator.estimate(model, LOSS, carry, read(stream, task))
        clip(estimate).apply(model)
        optimizer.step()
        if estimate.num_terms:
            total, count = total + float(estimate.loss_sum), count + estimate.num_terms
        if update % EVERY == 0:
            losses.append(total / count)
            total, count = 0.0, 0
            if synthetic:
                ahead = task.stream(seed)
                ahead.load_state_dict(stream.state_dict())
                cosines.append(cosine(model, carry.state, ahead, task))
            if losses[-1] <= LEARNED:
                break
    return {
        "task": name,
        "side": side,
        "seed": seed,
        "losses": losses,
        "cosines": cosines,
        "cpu_seconds": time.process_time() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [pool.submit(train, *side, seed) for seed in range(options.seeds) for side in SIDES]
        runs = [job.result() for job in jobs]
    figures: dict[str, Any] = {}
    for run in runs:
        label = f"{run['task']}, {run['side']}, seed {run['seed']}"
        figures[f"{label}: lowest loss"] = min(run["losses"])
        figures[f"{label}: last loss"] = run["losses"][-1]
        figures[f"{label}: updates"] = EVERY * len(run["losses"])
        if run["cosines"]:
            figures[f"{label}: mean cosine"] = fmean(run["cosines"])
    save("quality_synthetic", figures, {"runs": runs})


if __name__ == "__main__":
    main()
