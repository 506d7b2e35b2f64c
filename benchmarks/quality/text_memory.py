"""What is Transformer-XL's memory worth on Shakespeare, with the same parameters in the same time?

Next character. `SegmentTransformer`, two layers of width 96, 4 heads, segments of S = 32 characters; Adam with rate
1e-3, which falls to zero over the last two fifths of a side's time, gradients clipped at norm 1, 16 lanes. A memory has
no parameters: all sides of a seed start from the same weights, and see the same characters in the same order. Sides:

"on" remembers the 32 steps before the segment, and no gradient goes into them, which is the paper's own rule:
`memory_gradient=False` and `TBPTT(S, S)`. "on, k2 = 2 S" lets gradients into them, one segment back: `TBPTT(S, 2 * S)`,
which runs that segment again and pays for it. "off" is reset in all lanes at each segment: a transformer on windows of
32 characters. Its model has room for one remembered step, the least there may be, and never fills it, so that it
attends over 33 places instead of 64 and does not pay for a memory that it has not.

Each side trains until its own clock shows the same time. The clock counts the CPU time of this process, which has one
thread, while the side reads, learns and updates; sides take turns of a second. On an idle machine that is the wall
clock, which is recorded too. Held-out is the last tenth of the text, in 32 lanes; the first 32 characters of each lane
do not count, in no reading, so that all readings count the same ones. In the course of training a side is read as it
was trained, with its memory or from nothing in each segment. At the end each is read in four ways, to see how much is
context at the time of reading:

"memory": carried from segment to segment; for "off", whose weights fit a model with room for 32 steps, too.
"windows": from nothing in windows of 32 characters, so that a character has 0 to 31 before it.
"halves", "quarters": windows begun every 16 or 8 characters, of which the last 16 or 8 count: a character has at least
16 or 24 before it, for twice or four times the work.

    python benchmarks/quality/text_memory.py [--seconds 240] [--seeds 3] [--picture docs/text_memory.png]
    python benchmarks/quality/text_memory.py --from benchmarks/results/quality_text_memory.json --picture FILE

What there is is saved after each seed.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python looks for modules beside a script first: `copy.py` there would be taken for Python's own.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from picture import lines, parsed, saved_runs, take
from side_by_side import save
from torch import Tensor, nn

import tbptt
from tbptt.models import SegmentTransformer
from tbptt.streams import shakespeare

STEPS, LANES, SYMBOLS, WIDTH, HEADS, LAYERS, RATE = 32, 16, 65, 96, 4, 2, 1e-3
READ_LANES, TURN_S, POINTS, EVERY = 32, 1.0, 8, 2000
FALLING = 0.4
"""The share of a side's time in which the rate falls."""
LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Side:
    """One way of training: remembered steps, the look-back, and whether each segment starts from nothing.

    Gradients may go into what is remembered where the look-back is longer than a segment.
    """

    memory: int
    k2: int
    reset: bool


SIDES = {
    "on": Side(STEPS, STEPS, reset=False),
    "on, k2 = 2 S": Side(STEPS, 2 * STEPS, reset=False),
    "off": Side(1, STEPS, reset=True),
}
READINGS = {"windows": STEPS, "halves": STEPS // 2, "quarters": STEPS // 4}


def model_of(memory: int, gradient: bool) -> SegmentTransformer:
    sizes = {"heads": HEADS, "layers": LAYERS, "segment": STEPS, "embedding": WIDTH}
    return SegmentTransformer(SYMBOLS, SYMBOLS, WIDTH, memory=memory, memory_gradient=gradient, **sizes)


def windows() -> Iterator[tbptt.Window]:
    """Yield the training text, over and over; the shorter window at the end of a pass is left out."""
    stream = shakespeare(lanes=LANES)
    while True:
        stream.rewind()
        yield from (window for window in stream.windows(STEPS) if window.steps == STEPS)


class HeldOut:
    """The last tenth of the text, in lanes of whole segments."""

    def __init__(self) -> None:
        whole = shakespeare(lanes=1, split="test").read(10**6)
        assert isinstance(whole.inputs, Tensor)
        assert isinstance(whole.targets, Tensor)
        self.steps = whole.steps // READ_LANES // STEPS * STEPS
        size = READ_LANES * self.steps
        self.inputs, self.targets = (
            each[:size, 0].view(READ_LANES, self.steps).T.contiguous() for each in (whole.inputs, whole.targets)
        )

    def with_memory(self, model: SegmentTransformer) -> float:
        """Return the bits per character, the memory carried from segment to segment."""
        total, state = 0.0, None
        with torch.no_grad():
            for begin in range(0, self.steps, STEPS):
                span = slice(begin, begin + STEPS)
                outputs, state = model(self.inputs[span], state)
                total += self._bits(outputs, span) if begin else 0.0
        return total / self.num_targets

    def in_windows(self, model: SegmentTransformer, stride: int) -> float:
        """Return the bits per character of windows begun every `stride` characters, of which the last ones count."""
        total = 0.0
        with torch.no_grad():
            for begin in range(stride, self.steps - STEPS + 1, stride):
                outputs, _ = model(self.inputs[begin : begin + STEPS])
                total += self._bits(outputs[-stride:], slice(begin + STEPS - stride, begin + STEPS))
        return total / self.num_targets

    @property
    def num_targets(self) -> int:
        """The number of characters that count."""
        return self.targets[STEPS:].numel()

    def _bits(self, outputs: Tensor, span: slice) -> float:
        losses = nn.functional.cross_entropy(outputs.flatten(0, 1), self.targets[span].flatten(), reduction="sum")
        return float(losses) / math.log(2)


class Learner:
    """One model in training, with a clock of its own."""

    def __init__(self, name: str, seed: int, held_out: HeldOut, seconds: float) -> None:
        self.name, self.seed, self.side, self.held_out = name, seed, SIDES[name], held_out
        self.seconds = seconds
        torch.manual_seed(seed)
        self.model = model_of(self.side.memory, self.side.k2 > STEPS)
        self.estimator, self.clip = tbptt.TBPTT(STEPS, self.side.k2), tbptt.ClipNorm(1.0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.carry, self.windows = self.estimator.init(self.model, LANES), windows()
        self.first = torch.zeros(STEPS, LANES, dtype=torch.bool)
        self.first[0] = True
        self.cpu_s = self.wall_s = self.training = 0.0
        self.updates = 0
        self.by_time: list[dict[str, float]] = []
        self.by_updates: list[dict[str, float]] = []

    def train(self, until: float) -> None:
        """Train until the clock stands at `until`; measure where a round number of updates is reached."""
        while self.cpu_s < until:
            cpu, wall = time.process_time(), time.perf_counter()
            left = (1 - self.cpu_s / self.seconds) / FALLING
            self.optimizer.param_groups[0]["lr"] = RATE * min(1.0, max(0.0, left))
            window = next(self.windows)
            window = replace(window, reset=self.first) if self.side.reset else window
            estimate, self.carry = self.estimator.estimate(self.model, LOSS, self.carry, window)
            self.clip(estimate).apply(self.model)
            self.optimizer.step()
            self.cpu_s += time.process_time() - cpu
            self.wall_s += time.perf_counter() - wall
            self.updates += 1
            self.training += float(estimate.loss) / math.log(2)
            if self.updates % EVERY == 0:
                training, self.training = self.training / EVERY, 0.0
                self.by_updates.append({"updates": self.updates, "training_bits": training, "bits": self.bits()})

    def bits(self) -> float:
        """Return the held-out bits per character, read as trained."""
        return self.held_out.in_windows(self.model, STEPS) if self.side.reset else self.held_out.with_memory(self.model)

    def measure(self) -> None:
        """Remember how good the model is now."""
        clocks = {"cpu_seconds": self.cpu_s, "wall_seconds": self.wall_s}
        self.by_time.append(clocks | {"updates": self.updates, "bits": self.bits()})

    def run(self) -> dict[str, Any]:
        """Return what there is to say at the end."""
        roomy = model_of(STEPS, gradient=True)
        roomy.load_state_dict(self.model.state_dict())
        readings = {name: self.held_out.in_windows(roomy, stride) for name, stride in READINGS.items()}
        readings["memory"] = self.held_out.with_memory(roomy)
        course = {"by_time": self.by_time, "by_updates": self.by_updates, "readings": readings}
        return {"side": self.name, "seed": self.seed} | course


def train(seed: int, seconds: float) -> list[dict[str, Any]]:
    """Train all sides of a seed, in turn."""
    held_out = HeldOut()
    learners = [Learner(name, seed, held_out, seconds) for name in SIDES]
    for point in range(1, POINTS + 1):
        end, begin = seconds * point / POINTS, seconds * (point - 1) / POINTS
        turns = max(1, round((end - begin) / TURN_S))
        for turn in range(1, turns + 1):
            for learner in learners:
                learner.train(begin + (end - begin) * turn / turns)
        for learner in learners:
            learner.measure()
            last = learner.by_time[-1]
            words = f"{last['cpu_seconds']:6.1f} s  {last['updates']:5} updates  {last['bits']:.4f} bits"
            print(f"seed {seed}  {learner.name:<14} {words}", flush=True)
    return [learner.run() for learner in learners]


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def all_seeds(label: str, values: list[float]) -> None:
        figures[f"{label}: median"] = median(values)
        figures[f"{label}: seeds"] = ", ".join(f"{value:.3f}" for value in values)

    for name in SIDES:
        mine = [run for run in runs if run["side"] == name]
        for point in range(POINTS):
            seconds = mine[0]["by_time"][point]["cpu_seconds"]
            all_seeds(f"{name}, bits after {seconds:.0f} s", [run["by_time"][point]["bits"] for run in mine])
        for point in range(min(len(run["by_updates"]) for run in mine)):
            updates = mine[0]["by_updates"][point]["updates"]
            all_seeds(f"{name}, bits after {updates} updates", [run["by_updates"][point]["bits"] for run in mine])
        for reading in mine[0]["readings"]:
            all_seeds(f"{name}, last bits, read by {reading}", [run["readings"][reading] for run in mine])
        for what in ("updates", "cpu_seconds", "wall_seconds"):
            figures[f"{name}, {what}: seeds"] = ", ".join(f"{run['by_time'][-1][what]:.0f}" for run in mine)
    return figures


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the bits against the CPU time, a line for each seed; needs chromium."""

    def course(run: dict[str, Any]) -> tuple[list[float], list[float]]:
        return [point["cpu_seconds"] for point in run["by_time"]], [point["bits"] for point in run["by_time"]]

    sides = {f"memory {side}": [course(run) for run in runs if run["side"] == side] for side in SIDES}
    figure = lines(sides, markers=True)
    figure.update_yaxes(title="bits per held-out character", tickformat=".1f")
    figure.update_xaxes(title="CPU seconds of training, one thread", rangemode="tozero", dtick=25)
    take(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parsed(parser)
    if options.saved is not None:
        picture(saved_runs(options.saved), options.picture)
        return
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    parameters = sum(each.numel() for each in model_of(STEPS, gradient=True).parameters())
    for seed in range(options.seeds):
        runs += train(seed, options.seconds)
        about = {"seconds": options.seconds, "parameters": parameters}
        save("quality_text_memory", figures_of(runs), {"runs": runs}, **about)
    if options.picture is not None:
        picture(runs, options.picture)


if __name__ == "__main__":
    main()
