"""Training with each estimator: from the same weights, on the same data, against updates, steps and its own clock."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt.comparison.failures import Failures
from tbptt.comparison.result import Curve
from tbptt.comparison.settings import prepared
from tbptt.errors import EndOfStream
from tbptt.estimators.base import Estimate, Estimator
from tbptt.evaluate import evaluate
from tbptt.guards.base import Guard, check_guards
from tbptt.loss import StepLoss
from tbptt.metrics import Metric
from tbptt.randomness import random_state, seed_everything, set_random_state
from tbptt.streams.base import Stream
from tbptt.tree import Tree
from tbptt.update import Updater
from tbptt.window import Window

__all__ = ["BuildOptimizer", "Race", "race"]

BuildOptimizer: TypeAlias = Callable[[Iterable[Tensor]], Optimizer]

_SLICE_S = 0.5
_RECORDS = 200
"""Points of a training curve, each the loss over all updates since the last."""
_VALIDATIONS = 10


@dataclass(frozen=True)
class Race:
    """How to train.

    Args:
        optimizer: makes one of a model's parameters, and of the loss's own.
        seconds: of its own clock that each estimator has; None: as many as its updates take.
        updates: that each makes at most; None: as many as there is time for.
        guards: between estimate and optimizer; each estimator has fresh copies.
        held_out: what to validate on, off the clock; None for nothing.
        metrics: what to measure there besides the loss.
    """

    optimizer: BuildOptimizer
    seconds: float | None
    updates: int | None
    guards: Sequence[Guard] = ()
    held_out: Stream | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])

    def done(self, updates: int, seconds: float) -> float:
        """Return the share of the race that is over, 1 at the end."""
        shares = [updates / self.updates] if self.updates is not None else []
        return max([*shares, seconds / self.seconds] if self.seconds is not None else shares)


class Runner:
    """One estimator's training, in slices; between two of them nothing of it is in global places."""

    def __init__(
        self, model: nn.Module, estimator: Estimator, loss: StepLoss, stream: Stream, setting: Race, inputs: Tree
    ) -> None:
        self.model, self.loss = prepared(model, loss, estimator, inputs)
        self.estimator, self.stream, self.setting = estimator, stream, setting
        optimizer = setting.optimizer([*self.model.parameters(), *self.loss.own_parameters(self.model).values()])
        guards = [copy.deepcopy(guard) for guard in check_guards(setting.guards, estimator)]
        self.updater = Updater(self.model, self.loss, optimizer, estimator, stream.lanes, guards=guards)
        self.updater.snapshots.take(0, self.updater.carry)
        self.curve = Curve()
        self.steps = 0
        self.clock = 0.0
        self.fault = ""
        self._sum, self._weight = 0.0, 0.0  # of the losses since the last record
        self._recorded = self._validated = 0
        self._place, self._random = stream.state_dict(), random_state()

    @property
    def updates(self) -> int:
        """How many there were, those that were refused included."""
        return self.updater.updates

    @property
    def over(self) -> bool:
        """Whether there is nothing more to do."""
        return bool(self.fault) or self.setting.done(self.updates, self.clock) >= 1

    def turn(self, seconds: float) -> None:
        """Train for so many seconds of the clock, or to the end."""
        self.stream.load_state_dict(self._place)
        set_random_state(self._random)
        until = self.clock + seconds
        while not self.over and self.clock < until:
            begin = time.perf_counter()
            estimate = self._update()
            self.clock += time.perf_counter() - begin  # what follows is off the clock
            self._note(estimate)
        self._place, self._random = self.stream.state_dict(), random_state()

    def close(self) -> None:
        """End the curve where it is: losses since the last record make one more point."""
        if self._weight and not self.fault:
            self._record()

    def _update(self) -> Estimate | None:
        """Make one update; return what was estimated, None where that was no number and the guards left it out."""
        window = self._read().to(self.updater.device)
        found = self.updater.update(window)
        self.steps += window.steps
        if self.updater.device.type == "cuda":
            torch.cuda.synchronize(self.updater.device)
        left_out = found.estimate is None and not math.isfinite(float(found.raw.loss_sum))
        return None if left_out else found.raw

    def _read(self) -> Window:
        try:
            return self.estimator.read(self.stream, self.updater.carry)
        except EndOfStream:
            self.stream.rewind()
            return self.estimator.read(self.stream, self.updater.carry)

    def _note(self, estimate: Estimate | None) -> None:
        loss = 0.0 if estimate is None else float(estimate.loss_sum)
        if not math.isfinite(loss):
            self.fault = f"diverged: its loss was {loss} at update {self.updates}"
            return
        self._sum += loss
        self._weight += 0.0 if estimate is None else estimate.loss_weight
        done = self.setting.done(self.updates, self.clock)
        if self._weight and (done >= 1 or int(done * _RECORDS) > self._recorded):
            self._recorded = int(done * _RECORDS)
            self._record()
        if self.setting.held_out is not None and (done >= 1 or int(done * _VALIDATIONS) > self._validated):
            self._validated = int(done * _VALIDATIONS)
            self._validate(self.setting.held_out)

    def _record(self) -> None:
        self.curve.updates.append(self.updates)
        self.curve.steps.append(self.steps)
        self.curve.seconds.append(self.clock)
        self.curve.train_loss.append(self._sum / self._weight)
        self._sum, self._weight = 0.0, 0.0

    def _validate(self, held_out: Stream) -> None:
        steps = self.estimator.next_steps(self.updater.carry) if self.loss.whole else None
        found = evaluate(self.model, self.loss, held_out, self.setting.metrics, steps=steps)
        if not math.isfinite(found["loss"]):
            self.fault = f"diverged: its loss on held-out data was {found['loss']} at update {self.updates}"
            return
        self.curve.validation_updates.append(self.updates)
        self.curve.validation_steps.append(self.steps)
        self.curve.validation_seconds.append(self.clock)
        self.curve.validation_loss.append(found["loss"])
        for name in self.setting.metrics:
            self.curve.validation_metrics.setdefault(name, []).append(found[name])


def race(
    model: nn.Module,
    estimators: Mapping[str, Estimator],
    loss: StepLoss,
    stream: Stream,
    setting: Race,
    inputs: Tree,
    seed: int,
    failures: Failures,
) -> dict[str, Curve]:
    """Train a copy of the model with each estimator, by turns of about half a second.

    All begin with the weights of the model, the random generators seeded with `seed` and the stream where it is; a pass
    that ends is followed by the next. One that fails ends there, and is said so in `failures`.

    Args:
        inputs: an example, leaves (T, B, ...).

    Returns:
        The curves; empty for one that could not begin.
    """
    place = stream.state_dict()
    runners: dict[str, Runner] = {}
    for name, estimator in estimators.items():
        with failures.kept(name):
            stream.load_state_dict(place)
            seed_everything(seed)
            runners[name] = Runner(model, estimator, loss, stream, setting, inputs)
    waiting = list(runners)
    slice_s = _SLICE_S if setting.seconds is None else min(_SLICE_S, setting.seconds / 8)
    while waiting:
        for name in waiting:
            with failures.kept(name):
                runners[name].turn(slice_s)
            if runners[name].fault:
                failures.add(name, runners[name].fault)
        waiting = [name for name in reversed(waiting) if name in failures.sound(runners) and not runners[name].over]
    for runner in runners.values():
        runner.close()
    return {name: runners[name].curve if name in runners else Curve() for name in estimators}
