"""The training loop: stream, estimate, guards, optimizer, monitors, checkpoint."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tbptt.checkpoint import Checkpoints, Loaded, refuse_other, weights_of
from tbptt.checks import check_on_stream, known_items
from tbptt.distributed import refuse_ranks
from tbptt.errors import AlarmWarning, CheckpointError, CheckpointWarning, ConfigError, EndOfStream, StreamError
from tbptt.estimators.base import Carry, Estimate, Estimator
from tbptt.evaluate import evaluate
from tbptt.guards.base import Guard, RollBack, check_guards
from tbptt.guards.nonfinite import NonFinite
from tbptt.interrupts import Interrupts
from tbptt.loss import Loss, StepLoss
from tbptt.metrics import Metric
from tbptt.model import trainable_parameters
from tbptt.monitors.alarms import Alarms
from tbptt.monitors.base import Alarm, Monitor, Plan, Update, Validation
from tbptt.monitors.metrics import MetricsFile
from tbptt.monitors.stability import StabilityFile
from tbptt.monitors.timing import TimingFile
from tbptt.randomness import random_state, seed_everything, set_random_state
from tbptt.streams.base import Stream
from tbptt.update import Updated, Updater
from tbptt.window import Window

__all__ = ["HeldOut", "Saving", "Summary", "Trainer"]

_LONGER = "a scheduler that goes on to the last update"
_SAVED = "keep tensors and numbers instead, in buffers and attributes"
_STABILITY = 10
"""Lines of metrics.jsonl to one of stability.jsonl."""


@dataclass(frozen=True)
class HeldOut:
    """A stream to validate on, with a state of its own.

    Args:
        stream: the stream; never the one that is trained on.
        every: updates between two validations; there is one at the end of a run as well.
        metrics: what to measure besides the loss, by name.
    """

    stream: Stream
    every: int = 1000
    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])

    def __post_init__(self) -> None:
        _check_every("HeldOut", self.every)


@dataclass(frozen=True)
class Saving:
    """When to write checkpoints, and how much else.

    Args:
        every: updates between two checkpoints; there is one at the end of a run as well.
        keep: how many are kept.
        log_every: updates to a line of metrics.jsonl, which has the loss over all of them; a line of stability.jsonl
            is there at every tenth of these, with more in it.
    """

    every: int = 1000
    keep: int = 3
    log_every: int = 10

    def __post_init__(self) -> None:
        _check_every("Saving", self.every)


def _check_every(owner: str, every: int) -> None:
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"{owner}.every was expected to be a whole number of updates, at least 1, but is {every!r}",
            fix=f"{owner}(..., every=1000)",
        )


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Args:
        updates: made in all, those before a resume included.
        passes: over the stream, completed.
        stopped_by: the signal that ended it early, "SIGINT" or "SIGTERM"; empty for none.
        validation: the last metrics on the held-out stream; empty for none.
    """

    updates: int
    passes: int
    stopped_by: str
    validation: dict[str, float]


class Trainer:
    """Trains a model on a stream, and goes on where it stopped.

    It holds no mathematics: the estimator makes the gradient, the guards may change or refuse it, the
    optimizer uses it, the monitors watch. A resumed run is, bit for bit, one that never stopped; what stands in the way
    is told: see the alarm "resume" in docs/monitors.md.

    Args:
        model: any `model(inputs, state) -> (outputs, state)`; `tbptt.check` must let it pass. One that comes in eval
            mode is put in train mode, which is said once.
        loss: losses by step, or one of torch.nn's own. A module with parameters of its own is trained, saved and
            resumed with the model.
        optimizer: over the model's parameters, and the loss's if it has any; not one that needs a closure (L-BFGS).
        estimator: how the gradient is made, for example `TBPTT(k1=64, k2=64)`.
        stream: where the windows come from.
        guards: in order, between estimate and optimizer. Left out: `NonFinite("raise")`. One that changes the mean of
            an unbiased estimator is refused, unless it has `allow_bias=True`.
        monitors: besides the files that are written whenever there is a directory, and the alarms, which warn of
            what goes wrong; `Alarms(...)` among them takes the place of the usual one.
        directory: where checkpoints, metrics.jsonl, timing.jsonl and stability.jsonl go; left out: nothing is
            written.
        seed: of all random generators, when the run begins.
        scheduler: of torch; steps once an update (ReduceLROnPlateau: once a validation).
        held_out: what to validate on.
        saving: when to write checkpoints.
        checked: whether to check the model first. Leave it on.
        accept: items of the check whose failure does not stop the training, such as "lane independence".

    Example:
        >>> from tbptt.estimators import TBPTT
        >>> from tbptt.streams import ArrayStream
        >>> model = nn.RNN(1, 1)
        >>> stream = ArrayStream(torch.randn(80, 1), torch.randn(80, 1), lanes=2)
        >>> adam = torch.optim.Adam(model.parameters())
        >>> Trainer(model, nn.MSELoss(), adam, TBPTT(k1=8, k2=8), stream).run(passes=2).updates
        10
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        estimator: Estimator,
        stream: Stream,
        *,
        guards: Sequence[Guard] | None = None,
        monitors: Sequence[Monitor] = (),
        directory: str | Path | None = None,
        seed: int = 0,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        held_out: HeldOut | None = None,
        saving: Saving | None = None,
        checked: bool = True,
        accept: Sequence[str] = (),
    ) -> None:
        refuse_ranks("Trainer")
        self.model, self.loss, self.optimizer = model, StepLoss.of(loss), optimizer
        self.estimator, self.stream, self.seed, self.checked = estimator, stream, seed, checked
        self.accept = known_items(accept, checked=checked)
        self.guards = check_guards([NonFinite("raise")] if guards is None else guards, estimator)
        self.scheduler, self.held_out, self.saving = scheduler, held_out, saving or Saving()
        if isinstance(scheduler, ReduceLROnPlateau) and held_out is None:
            raise ConfigError(
                "ReduceLROnPlateau needs a validation loss to watch, but there is no held-out stream",
                fix="Trainer(..., held_out=HeldOut(stream, every=1000))",
            )
        self.checkpoints: Checkpoints | None = None
        alarms = [each for each in monitors if isinstance(each, Alarms)] or [Alarms()]
        others = [each for each in monitors if not isinstance(each, Alarms)]
        if directory is not None:
            run = Path(directory)
            self.checkpoints = Checkpoints(run / "checkpoints", keep=self.saving.keep)
            metrics = MetricsFile(run / "metrics.jsonl", every=self.saving.log_every)
            stability = StabilityFile(run / "stability.jsonl", every=_STABILITY * self.saving.log_every)
            others += [metrics, TimingFile(run / "timing.jsonl"), stability]
        for each in alarms:
            each.hearers = others
        self.monitors = [*others, *alarms]  # an alarm may be made an error: by then all others have seen the update
        self.updater = Updater(
            model, self.loss, optimizer, estimator, stream.lanes, guards=self.guards, scheduler=scheduler
        )
        self.device = self.updater.device
        self.passes = 0
        self.validated: tuple[int, dict[str, float]] = (-1, {})
        self._place = stream.state_dict()  # where a resumed run would go on reading
        self._begun = False
        self._saved: object = None

    @property
    def updates(self) -> int:
        """How many updates were made, those that were refused included."""
        return self.updater.updates

    @property
    def carry(self) -> Carry:
        """What the estimator carries on from the last update."""
        return self.updater.carry

    def run(self, updates: int | None = None, passes: int | None = None) -> Summary:
        """Train until so many updates, or passes over the stream, have been made in all.

        Resumes by itself when the directory holds a checkpoint. Whatever ends the run - the end, a signal,
        an error - the last complete update is in a checkpoint afterwards.

        Args:
            updates: the number of updates after which to stop, earlier runs included.
            passes: the number of passes over the stream after which to stop, likewise.

        Raises:
            ConfigError: neither is given.
            CheckError: the model does not carry its state.
            CheckpointError: the directory holds another run, or no sound checkpoint.
            DivergedError: `SpikeRollback` has gone back too often.
        """
        if updates is None and passes is None:
            raise ConfigError("it is not said when to stop", fix="trainer.run(updates=10_000)")
        self._begin(Plan(self.updates, updates, self.stream.lanes))
        with Interrupts() as interrupts:
            try:
                while not interrupts.name and (updates is None or self.updates < updates):
                    window = self._read(passes)
                    if window is None:
                        break
                    self._update(window)
                    if self.held_out is not None and self.updates % self.held_out.every == 0:
                        self._validate(self.held_out)
                    if self.updates % self.saving.every == 0:
                        self._save()
                if self.held_out is not None and not interrupts.name and self.validated[0] != self.updates:
                    self._validate(self.held_out)
            finally:
                self._save()
                for monitor in self.monitors:
                    monitor.end()
        return Summary(self.updates, self.passes, interrupts.name, self.validated[1])

    def _begin(self, plan: Plan) -> None:
        """Check the model, and resume or start; a second `run` just goes on."""
        limits: list[str] = []
        if not self._begun:
            like = self.updater.like(self._state, self.stream)
            found = self.checkpoints
            loaded = None if found is None else found.load_latest(like, self.model.state_dict().get)
            if loaded is None:
                seed_everything(self.seed)
                self.updater.snapshots.take(0, self.carry)
            else:
                self._restore(loaded)
            if self.checked:
                estimator = self.estimator.fixed(self.carry)
                steps = estimator.next_steps(self.carry)
                report = check_on_stream(self.model, self.stream, estimator, steps, self.accept)
                report.raise_if_failed()
                limits = [item.detail for item in report.items if item.name == "exactness"]
            self._begun = True
        for monitor in self.monitors:
            monitor.begin(replace(plan, update=self.updates, weights=trainable_parameters(self.model)))
        left = plan.updates is None or self.updates < plan.updates
        if self.updates and left and not any(group["lr"] for group in self.optimizer.param_groups):
            self._tell("learning rate", "it is 0 in all groups, as a schedule leaves it that has ended", _LONGER)
        for each in limits if self.updates == 0 else ():
            self._tell("exactness", f"{self.estimator}: {each}", "RTRL(k1), or TBPTT(k1, k2)")
        if self.updates == 0:
            self._save()  # so that there is something to resume from, and what cannot be saved is found at once

    def _tell(self, name: str, text: str, fix: str) -> None:
        """Say, if there is a text, what of a promise is not kept for this model; also in the run's files."""
        if not text:
            return
        alarm = Alarm(name, self.updates, text, fix)
        for monitor in self.monitors:
            monitor.alarm(alarm)
        warnings.warn(str(alarm), AlarmWarning, stacklevel=4)

    def _read(self, passes: int | None) -> Window | None:
        """Return the next window, of this pass or of the next; None when the passes are over."""
        for rewound in (False, True):
            if passes is not None and self.passes >= passes:
                return None
            try:
                return self.estimator.read(self.stream, self.carry)
            except EndOfStream as end:
                if rewound:
                    raise StreamError("the stream has no steps, not even after rewind()") from end
                self.stream.rewind()
                self.passes += 1
                self._place = self.stream.state_dict()
        raise AssertionError("unreachable")

    def _update(self, window: Window) -> None:
        found = self.updater.update(window.to(self.device))
        seen = found.seen if found.roll_back is None else self._told_roll_back(found.roll_back, found)
        self._place = self.stream.state_dict()
        update = Update(
            number=self.updates,
            passes=self.passes,
            position=window.start + window.steps,
            steps=window.steps,
            lanes=window.lanes,
            estimate=seen,
            applied=found.applied,
            learning_rate=found.learning_rate,
            state=self.carry.state,
            weights=trainable_parameters(self.model),
        )
        for monitor in self.monitors:
            monitor.update(update)
        if self.updates == 1 and self.checkpoints is not None:
            self._tell("resume", self.updater.unsaved(), _SAVED)  # and at each checkpoint

    def _told_roll_back(self, verdict: RollBack, found: Updated) -> Estimate:
        """Tell the monitors; return the estimate that made the run go back, with how far as a metric."""
        text = f"update {self.updates} went back: {verdict.reason}; {found.undone} updates before it are undone"
        for monitor in self.monitors:
            monitor.message(text)
        return found.raw.with_gradients(found.raw.all_gradients, rolled_back=float(found.undone))

    def _validate(self, held_out: HeldOut) -> None:
        steps = self.estimator.next_steps(self.carry) if self.loss.whole else None
        metrics = evaluate(self.model, self.loss, held_out.stream, held_out.metrics, steps=steps)
        self.validated = (self.updates, metrics)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics["loss"])
        for monitor in self.monitors:
            monitor.validation(Validation(self.updates, metrics))

    def _save(self) -> None:
        """Write a checkpoint; a disk that does not take it is warned of, and training goes on."""
        now = (self.updates, self.passes, self.validated[0])
        if self.checkpoints is None or not self._begun or self._saved == now:
            return
        try:
            self._tell("resume", self.updater.unsaved(), _SAVED)
            self.checkpoints.save(self.updates, self._state(), self.model.state_dict())
        except CheckpointError as error:
            if not isinstance(error.__cause__, (OSError, SafetensorError)):
                raise
            warnings.warn(f"NO CHECKPOINT at update {self.updates}: {error}", CheckpointWarning, stacklevel=3)
        else:
            self._saved = now

    def _state(self) -> dict[str, Any]:
        return {
            "about": self._about(),
            "updates": self.updates,
            "passes": self.passes,
            "validated": self.validated,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "stream": self._place,
            "random": random_state(),
            **self.updater.state_dict(),
            "monitors": {name: monitor.state_dict() for name, monitor in self._named_monitors()},
        }

    def _about(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        return {
            "estimator": repr(self.estimator),
            "optimizer": type(self.optimizer).__name__,
            "scheduler": type(self.scheduler).__name__,
            "guards": ", ".join(type(guard).__name__ for guard in self.guards),
            "weights": weights_of(self.model.state_dict()),
        }

    def _restore(self, loaded: Loaded) -> None:
        state = loaded.state
        fix = "give the trainer another directory, or what the run was started with"
        refuse_other(state["about"], self._about(), str(loaded.path), "run", fix)
        self.model.load_state_dict(loaded.model_state)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.updater.load_state_dict(state)
        self._place = state["stream"]
        self.stream.load_state_dict(self._place)
        self.updater.updates, self.passes, self.validated = state["updates"], state["passes"], state["validated"]
        for name, monitor in self._named_monitors():
            if name in state["monitors"]:
                monitor.load_state_dict(state["monitors"][name])
        set_random_state(state["random"])
        self._saved = (self.updates, self.passes, self.validated[0])

    def _named_monitors(self) -> list[tuple[str, Monitor]]:
        """Return the monitors by names that do not change when another one is added."""
        seen: Counter[str] = Counter()
        named: list[tuple[str, Monitor]] = []
        for monitor in self.monitors:
            kind = type(monitor).__name__
            seen[kind] += 1
            named.append((f"{kind} {seen[kind]}", monitor))
        return named
