"""What the trainer costs, against loops written by hand and against what the arithmetic must cost.

    python benchmarks/speed/loop.py [--rounds 15] [--threads 2]

1. k1 = k2 = 64, LSTM 32 lanes x 256, and k1 = k2 = 16, LSTM 1 lane x 64: Trainer against a 15-line loop.
2. k1 = 256, k2 = 64, "tail": against 256 F + 64 B; also with F of the first 192 steps taken without a graph.
3. k1 = 8, k2 = 64: against k1 F + k2 B ("retain") and k2 F + k2 B ("recompute"), with F and B of 8-step calls
   for "retain", which has to make such, and of 64-step calls for "recompute"; and against the recipe of the
   forums, with single steps and a list of retained graphs: as it is usually written, with a backward() for each
   loss and each state, and with one call for each of the last k2 steps.

F is forward and loss, B is backward, per step; each model gets one optimizer step U for an update on top.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from side_by_side import in_turn, ratio, save

import tbptt

FEATURES = 8


def build(hidden: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(FEATURES, FEATURES, hidden=hidden)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def data(steps: int, lanes: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(steps * lanes, FEATURES), torch.randn(steps * lanes, FEATURES)


def by_hand(hidden: int, lanes: int, k: int, updates: int) -> Callable[[], None]:
    """The 15-line loop."""
    model, optimizer = build(hidden)
    inputs, targets = (each.view(lanes, -1, FEATURES).transpose(0, 1) for each in data(k * updates, lanes))

    losses: list[float] = []

    def loop() -> None:
        state = None
        for begin in range(0, k * updates, k):
            outputs, state = model(inputs[begin : begin + k], state)
            loss = F.mse_loss(outputs, targets[begin : begin + k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            state = tuple(each.detach() for each in state)

    return loop


def by_trainer(hidden: int, lanes: int, estimator: tbptt.TBPTT, updates: int) -> Callable[[], None]:
    """The trainer as a user has it: guard, metrics file, checkpoints; only the check was made before."""
    model, optimizer = build(hidden)
    stream = tbptt.ArrayStream(*data(estimator.k1 * updates, lanes), lanes=lanes)
    directory = tempfile.mkdtemp()
    saving = tbptt.Saving(every=10**9)
    trainer = tbptt.Trainer(
        model, nn.MSELoss(), optimizer, estimator, stream, directory=directory, saving=saving, checked=False
    )

    def loop() -> None:
        while True:  # the loop that `run` makes, without its beginning and end (signals, check, last checkpoint)
            window = trainer._read(trainer.passes + 1)
            if window is None:
                stream.rewind()
                return
            trainer._update(window)

    trainer.run(updates=1)
    for monitor in trainer.monitors:
        monitor.begin(tbptt.monitors.Plan(1, None, lanes))
    return loop


def forward_only(hidden: int, lanes: int, k: int, updates: int, *, graph: bool) -> Callable[[], None]:
    model, _ = build(hidden)
    inputs, targets = (each.view(lanes, -1, FEATURES).transpose(0, 1) for each in data(k * updates, lanes))

    def loop() -> None:
        state = None
        with torch.set_grad_enabled(graph):
            for begin in range(0, k * updates, k):
                outputs, state = model(inputs[begin : begin + k], state)
                F.mse_loss(outputs, targets[begin : begin + k])
                state = tuple(each.detach() for each in state)

    return loop


def optimizer_only(hidden: int, updates: int) -> Callable[[], None]:
    model, optimizer = build(hidden)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def loop() -> None:
        for _ in range(updates):
            optimizer.step()

    return loop


Link = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, dict[str, Tensor]]
"""A step of the recipe: its start state, its end state, its loss, and the weights it was run with."""
Walk = Callable[[list[Link], int], dict[str, Tensor]]
"""The links of a look-back, newest last, and k1 -> the gradients of the last k1 losses."""


def by_recipe(walk: Walk, hidden: int, lanes: int, k1: int, k2: int, updates: int) -> Callable[[], None]:
    """The forum's recipe for k2 > k1: single steps, their graphs kept in a list.

    Weights are replaced instead of changed in place, or its backward would fail.
    """
    model, _ = build(hidden)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    inputs, targets = (each.view(lanes, -1, FEATURES).transpose(0, 1) for each in data(k1 * updates, lanes))

    def loop() -> None:
        nonlocal weights
        state = tuple(torch.zeros(1, lanes, hidden) for _ in range(2))
        links: list[Link] = []
        for step in range(k1 * updates):
            start = tuple(each.detach().requires_grad_() for each in state)
            output, state = functional_call(model, weights, (inputs[step : step + 1], start))
            links.append((start, state, F.mse_loss(output, targets[step : step + 1]), weights))
            links = links[-k2:]
            if (step + 1) % k1 == 0:
                total = walk(links, k1)
                weights = {
                    name: (value - 1e-3 * total[name]).detach().requires_grad_() for name, value in weights.items()
                }

    return loop


def usual_walk(links: list[Link], k1: int) -> dict[str, Tensor]:
    """Go back as it is usually written: through `.grad`, a backward() for each loss and for each state.

    Mended in two places: states are fresh leaves at each walk, and all tensors of a state go back together.
    """
    for begin, _, _, used in links:
        for leaf in (*begin, *used.values()):
            leaf.grad = None
    for back in range(1, len(links) + 1):
        begin, _, loss, weights = links[-back]
        if back <= k1:
            (loss / k1).backward(retain_graph=True)
        if back < len(links):
            torch.autograd.backward(links[-back - 1][1], [leaf.grad for leaf in begin], retain_graph=True)
    distinct = {id(used): used for _, _, _, used in links}.values()
    return {name: sum(used[name].grad for used in distinct if used[name].grad is not None) for name in weights}


def best_walk(links: list[Link], k1: int) -> dict[str, Tensor]:
    """Go back with one call of autograd for each step of the look-back."""
    total: dict[str, Tensor] = {}
    above: tuple[Tensor, ...] = ()
    for back, (begin, end, loss, used) in enumerate(reversed(links)):
        roots, seeds = ([loss / k1], [torch.ones(())]) if back < k1 else ([], [])
        if above:
            roots, seeds = [*roots, *end], [*seeds, *above]
        found = torch.autograd.grad(roots, [*used.values(), *begin], seeds, retain_graph=True, allow_unused=True)
        for name, gradient in zip(used, found, strict=False):
            if gradient is not None:
                total[name] = total[name] + gradient if name in total else gradient
        above = found[-2:]
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides: dict[str, Callable[[], object]] = {}
    for name, hidden, lanes, k, updates in (("32x256", 256, 32, 64, 8), ("1x64", 64, 1, 16, 150)):
        sides[f"hand {name}"] = by_hand(hidden, lanes, k, updates)
        sides[f"trainer {name}"] = by_trainer(hidden, lanes, tbptt.TBPTT(k, k), updates)
    # 512 steps on each of the following sides
    sides["tail"] = by_trainer(256, 32, tbptt.TBPTT(256, 64), 2)
    sides["forward 64"] = forward_only(256, 32, 64, 8, graph=True)
    sides["forward 64 no graph"] = forward_only(256, 32, 64, 8, graph=False)
    sides["hand 8"] = by_hand(256, 32, 8, 64)
    sides["forward 8"] = forward_only(256, 32, 8, 64, graph=True)
    for replay in ("retain", "recompute"):
        sides[replay] = by_trainer(256, 32, tbptt.TBPTT(8, 64, replay=replay), 64)
    sides["usual recipe"] = by_recipe(usual_walk, 256, 32, 8, 64, 64)
    sides["recipe at its best"] = by_recipe(best_walk, 256, 32, 8, 64, 64)
    sides["retain 1x64"] = by_trainer(64, 1, tbptt.TBPTT(8, 64, replay="retain"), 16)
    sides["usual recipe 1x64"] = by_recipe(usual_walk, 64, 1, 8, 64, 16)
    sides["recipe at its best 1x64"] = by_recipe(best_walk, 64, 1, 8, 64, 16)
    sides["optimizer"] = optimizer_only(256, 64)
    samples = in_turn(sides, options.rounds)

    u = [each / 64 for each in samples["optimizer"]]
    f, f0, f8 = ([each / 512 for each in samples[name]] for name in ("forward 64", "forward 64 no graph", "forward 8"))
    b = [whole / 512 - x - y / 64 for whole, x, y in zip(samples["hand 32x256"], f, u, strict=True)]
    b8 = [whole / 512 - x - y / 8 for whole, x, y in zip(samples["hand 8"], f8, u, strict=True)]

    def model(updates: int, *terms: tuple[int, list[float]]) -> list[float]:
        return [
            updates * (step + sum(n * v for (n, _), v in zip(terms, row, strict=True)))
            for step, *row in zip(u, *(values for _, values in terms), strict=True)
        ]

    models = {
        "256 F + 64 B": model(2, (256, f), (64, b)),
        "192 F0 + 64 F + 64 B": model(2, (192, f0), (64, f), (64, b)),
        "8 F + 64 B, 8-step calls": model(64, (8, f8), (64, b8)),
        "64 F + 64 B": model(64, (64, f), (64, b)),
        "8 F + 64 B, 64-step calls": model(64, (8, f), (64, b)),
    }
    cheaper = min(models["8 F + 64 B, 8-step calls"], models["64 F + 64 B"], key=median)
    every = samples | models | {"cheaper": cheaper}
    figures = {
        "trainer / hand, k1=k2=64, LSTM 32x256 (<= 1.03)": ratio(every, "trainer 32x256", "hand 32x256"),
        "trainer / hand, k1=k2=16, LSTM 1x64 (<= 1.25)": ratio(every, "trainer 1x64", "hand 1x64"),
        "tail k1=256 k2=64 / (256 F + 64 B) (<= 1.08)": ratio(every, "tail", "256 F + 64 B"),
        "tail / (192 F0 + 64 F + 64 B), F0 without a graph": ratio(every, "tail", "192 F0 + 64 F + 64 B"),
    }
    for recipe in ("usual recipe", "recipe at its best"):
        figures[f"{recipe} / retain, LSTM 1x64 (>= 3)"] = ratio(every, f"{recipe} 1x64", "retain 1x64")
    for side in ("retain", "recompute"):
        figures[f"{side} k1=8 k2=64 / cheaper cost model (<= 1.15)"] = ratio(every, side, "cheaper")
        for name in list(models)[2:]:
            figures[f"{side} / ({name})"] = ratio(every, side, name)
        for recipe in ("usual recipe", "recipe at its best"):
            figures[f"{recipe} / {side} (>= 3)"] = ratio(every, recipe, side)
    medians = {f"median ms: {name}": median(values) * 1e3 for name, values in every.items()}
    save("speed_loop", figures | medians, samples, rounds=options.rounds)


if __name__ == "__main__":
    main()
