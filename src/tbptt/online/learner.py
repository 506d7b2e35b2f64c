"""Predict, then learn, one step at a time.

Letters: T time, B lanes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt.checkpoint import Checkpoints, refuse_other, weights_of
from tbptt.checks import CheckReport, check
from tbptt.codec import UnknownClassError
from tbptt.distributed import refuse_ranks
from tbptt.errors import AlarmWarning, CapabilityError, CheckpointError, CheckpointWarning, ShapeError
from tbptt.estimators import FullBPTT
from tbptt.estimators.base import Carry, Estimator
from tbptt.guards.base import Guard, check_guards
from tbptt.guards.nonfinite import NonFinite
from tbptt.loss import Loss, StepLoss
from tbptt.online.drift import DriftDetector, DriftWatch
from tbptt.online.pending import Pending, Step
from tbptt.online.running import Running
from tbptt.online.values import Entry, Lift, check_whole
from tbptt.randomness import random_state, set_random_state
from tbptt.tree import Tree, clone, tensors, time_slice, to
from tbptt.unroll import states_of
from tbptt.update import Updater
from tbptt.window import Window

__all__ = ["Online"]

_NO_ROLL_BACK = "the steps in between are gone, and predictions made from them have been given out"


class Online:
    """Learns from a stream that is live: predicts a step, sees what came, learns, and forgets the step.

    The steps are learned from in the estimator's windows: when `next_steps` of them are there, one estimate is made,
    the guards look at it, and the optimizer makes one step; with k1 = 1 that is after each. Predictions are made from
    all steps that were observed, learned from or not. A larger k1 costs less for each step and learns later.

    Before you start: `estimator.prepare(model, example)` where it needs something in the model, then the optimizer;
    `check` on the first steps that you have.

    Args:
        model: any `model(inputs, state) -> (outputs, state)`.
        loss: losses by step, or one of torch.nn's own. A module with parameters of its own is trained and saved, too.
        optimizer: over the model's parameters, and the loss's if it has any; not one that needs a closure (L-BFGS).
        estimator: how the gradient is made, for example `TBPTT(k1=1, k2=24)`.
        guards: in order, between estimate and optimizer. Left out: `NonFinite("raise")`. None that goes back.
        lanes: the number of sequences side by side, B. With one, values have no lane dimension.
        label_patience: how many further steps may be observed until a step's label has to be there; after that it is
            given up, which `given_up` counts. 0: before the next step.
        drift: a detector, such as river's, that sees the loss of each prediction once its label is there.

    Attributes:
        carry: of the estimator, after the last window.
        steps: how many were observed.
        updates: how many were made.
        refused: how many windows the guards kept from being learned from.
        given_up: how many steps' labels did not come in time.
        metrics: of the last window: "loss" (NaN without a label), and what the estimator and the guards have measured.
        drifts: the steps at whose labels the detector has found a change; the newest 1000.

    Raises:
        ConfigError: settings that cannot be meant.
        CapabilityError: a model that cannot be trained in windows, or an estimator that needs a stream it can rewind.

    Exactness: the same, bit for bit, as `estimator.estimate` on the windows of a recording, and a learner that was
        saved and loaded goes on as one that never stopped (tests/online/test_online.py).
    Cost: a step of prediction is one step forward, and k1 + label_patience steps at most where an update came between;
        an update what the estimator says. Memory: of k1 + label_patience steps, and the estimator's own.

    Example:
        >>> from tbptt.estimators import TBPTT
        >>> model = nn.RNN(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> online = Online(model, nn.MSELoss(), sgd, TBPTT(k1=1, k2=8))
        >>> for number in range(5):
        ...     x, y = torch.tensor([0.1 * number]), torch.tensor([0.1 * number + 0.1])
        ...     prediction = online.predict_one(x)
        ...     online.learn_one(x, y)
        >>> prediction.shape, online.steps, online.updates
        (torch.Size([1]), 5, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        estimator: Estimator,
        *,
        guards: Sequence[Guard] | None = None,
        lanes: int = 1,
        label_patience: int = 0,
        drift: DriftDetector | None = None,
    ) -> None:
        refuse_ranks("Online")
        check_whole("lanes", lanes, 1)
        check_whole("label_patience", label_patience, 0)
        self.model, self.loss, self.optimizer, self.estimator = model, StepLoss.of(loss), optimizer, estimator
        self._no_loss = StepLoss(_no_losses, module=self.loss.module)  # its weights are trained all the same
        self.lanes = lanes
        given = [NonFinite("raise")] if guards is None else guards
        self.guards = check_guards(given, estimator, no_roll_back=_NO_ROLL_BACK)
        if isinstance(estimator, FullBPTT) and estimator.k1 == "pass":
            raise CapabilityError(
                'windows of a known length were expected, but FullBPTT(k1="pass") learns from a whole pass: a live '
                "stream has no end, and cannot be read again",
                fix="TBPTT(k1=1, k2=24), or FullBPTT(k1=...)",
            )
        self.updater = Updater(model, self.loss, optimizer, estimator, lanes, guards=self.guards)
        weight = next(each for each in model.parameters())
        dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), weight.dtype)
        self.device = weight.device
        self.steps = self.updates = self.refused = 0
        self.metrics: dict[str, float] = {}
        self._entry = Entry(Lift(lanes, dtype, weight.device))
        self._running = Running(model, lanes)
        self._pending = Pending(label_patience)
        self._reset: Tensor | None = None  # the lanes whose sequence begins with the next step. Shape (B,)
        self._watch = DriftWatch(drift, self.loss)

    @property
    def carry(self) -> Carry:
        """What the estimator carries on from the last window."""
        return self.updater.carry

    @property
    def given_up(self) -> int:
        """How many steps' labels did not come in time."""
        return self._pending.given_up

    @property
    def drift(self) -> DriftDetector | None:
        """The detector, as it is now."""
        return self._watch.detector

    @property
    def drifts(self) -> list[int]:
        """The steps at whose labels the detector has found a change; the newest 1000."""
        return list(self._watch.found)

    def predict_one(self, x: Any) -> Tree:
        """Return the outputs of the next step, if `x` is what it brings; nothing is changed by it.

        In eval mode, without a graph. Asked twice, it answers the same.

        Args:
            x: a tensor, array or number, or a tree of them. Leaves (...) with one lane, else (B, ...).

        Returns:
            The model's outputs at this step, leaves (...) with one lane, else (B, ...).

        Raises:
            ShapeError: other shapes or lanes than the steps before.
            NonFiniteError: NaN or infinity in it.
        """
        outputs = self._running.outputs(self._pending, self._next(self._entry.step(x, self.steps)))
        return clone(self._entry.lift.down(outputs))  # what is given away may be written into

    def learn_one(self, x: Any, y: Any = None, *, mask: Any = None) -> None:
        """Observe a step and its label, and learn as soon as there is a window; see `observe` and `label`."""
        inputs, label = self._entry.step(x, self.steps), self._entry.label(y, mask)
        self._settle(self._observe(inputs), *label)

    def learn_many(self, xs: Any, ys: Any = None, *, mask: Any = None) -> None:
        """Observe and learn from consecutive steps: the same, bit for bit, as `learn_one` one after another.

        Args:
            xs: leaves (T, ...) with one lane, else (T, B, ...).
            ys: the labels, likewise; None for none.
            mask: the lanes and steps whose labels count. Shape (T, B), bool; None: all.
        """
        inputs = self._entry.lift.stretch("xs", xs)
        targets = None if ys is None else self._entry.lift.stretch("ys", ys)
        steps = tensors(inputs)[0].shape[0]
        for name, there in (("ys", None if targets is None else tensors(targets)[0]), ("mask", mask)):
            if there is not None and len(there) != steps:
                raise ShapeError(
                    f"{name} of {steps} steps was expected, as xs has, but it has {len(there)}: it is not known "
                    "which belongs to which",
                    fix="one row for each step; a mask for labels that are missing",
                )
        for step in range(steps):
            label = None if targets is None else _step_of(targets, step)
            found = self._entry.checked_label(label, None if mask is None else mask[step])
            self._settle(self._observe(self._entry.checked(_step_of(inputs, step), self.steps)), *found)

    def observe(self, x: Any) -> int:
        """See a step whose label comes later, or never; return its key.

        Args:
            x: as for `predict_one`.

        Raises:
            ShapeError: other shapes or lanes than the steps before.
            NonFiniteError: NaN or infinity in it; or, from a guard, in the gradients of a window that was complete.
        """
        return self._observe(self._entry.step(x, self.steps)).number

    def label(self, key: int, y: Any = None, *, mask: Any = None) -> None:
        """Give the label of a step, and learn if that was what a window has waited for.

        Args:
            key: as `observe` returned it.
            y: the label, leaves (...) with one lane, else (B, ...), as the loss wants it; None: there is none.
            mask: the lanes in which it counts. Shape (B,), bool; None: all.

        Raises:
            ConfigError: no step waits for it: unknown, labelled already, or given up.
            NonFiniteError: NaN or infinity in it; or, from a guard, in the gradients.
        """
        step = self._pending.open_step(key, self.steps)
        self._settle(step, *self._entry.label(y, mask))

    def reset(self, lanes: Any = None) -> None:
        """Let a new sequence begin with the next step: the state is reset there, and no gradient crosses.

        Args:
            lanes: in which lanes. Shape (B,), bool; None: in all.
        """
        chosen = torch.ones(self.lanes, dtype=torch.bool, device=self.device)
        chosen = chosen if lanes is None else self._entry.lift.lane_mask("lanes", lanes)
        self._reset = chosen if self._reset is None else self._reset | chosen

    def check(self, xs: Any, accept: Sequence[str] = ()) -> CheckReport:
        """Find out whether the model carries its state and how far the gradient reaches; see `tbptt.check`.

        Args:
            xs: some steps like those to come, at least 3. Leaves (T, ...) with one lane, else (T, B, ...).
            accept: items whose failure is accepted.
        """
        return check(self.model, self._entry.lift.stretch("xs", xs), self.estimator.fixed(self.carry), accept=accept)

    def save(self, path: str | Path) -> Path:
        """Write all that there is into the directory `path`, so that a kill at any moment leaves this or the last.

        Returns:
            The directory inside it, of this one: the two newest are kept.

        Warns:
            CheckpointWarning: the drift detector cannot be saved without pickle; a loaded learner begins with its own.
                Or something of the model changes that cannot be saved.

        Raises:
            CheckpointError: a state that cannot be stored, or a disk that did not take it.
        """
        if text := self.updater.unsaved():
            warnings.warn(text, CheckpointWarning, stacklevel=2)
        checkpoints = Checkpoints(path, keep=2)
        newest = checkpoints.paths()[:1]
        number = int(newest[0].name.split("-")[1].split(".")[0]) + 1 if newest else 1
        return checkpoints.save(number, self.state_dict(), self.model.state_dict())

    def load(self, path: str | Path, example: Any = None) -> None:
        """Go on from what was saved last in the directory `path`, as if it had never stopped.

        Args:
            path: as given to `save`.
            example: a step, as for `predict_one`. Only for a model whose state has objects of classes in it: the model
                is run on it, and the file may hold objects of the classes that are found.

        Raises:
            CheckpointError: there is nothing, nothing sound, or what another learner has saved.
        """
        try:
            loaded = Checkpoints(path).load_latest(
                lambda entry: self._like(entry, example), self.model.state_dict().get
            )
        except UnknownClassError as error:
            fix = f"online.load(path, example=x), with one step x like those to come; else {error.fix}"
            raise UnknownClassError(error.message, fix=fix) from None
        if loaded is None:
            raise CheckpointError(
                f"a saved learner was expected in {path}, but there is none", fix="online.save(path) writes one"
            )
        self._refuse_other(loaded.state["about"], str(loaded.path))
        self.model.load_state_dict(loaded.model_state)
        self.load_state_dict(loaded.state)

    def state_dict(self) -> dict[str, Any]:
        """Return all but the model's own state_dict, the random generators included."""
        return {
            "about": self._about(),
            "steps": self.steps,
            "updates": self.updates,
            "refused": self.refused,
            "metrics": dict(self.metrics),
            "drift": self._watch.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pending": self._pending.state_dict(),
            "running": self._running.state_dict(),
            "reset": self._reset,
            "shapes": self._entry.shapes,
            **self.updater.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the model's own comes first.

        Raises:
            CheckpointError: another learner's.
        """
        self._refuse_other(state["about"], "the state")
        self.steps, self.updates, self.refused = state["steps"], state["updates"], state["refused"]
        self.metrics = dict(state["metrics"])
        self._watch.load_state_dict(state["drift"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updater.load_state_dict(state)
        self._pending.load_state_dict(to(state["pending"], self.device))
        self._running.load_state_dict(to(state["running"], self.device))
        self._reset, self._entry.shapes = to(state["reset"], self.device), state["shapes"]
        set_random_state(state["random"])

    def _next(self, inputs: Tree) -> Window:
        """Return inputs as the step after all others."""
        if self._reset is None:
            return Window(inputs, start=self.steps)
        return Window(inputs, reset=self._reset[None], start=self.steps)

    def _observe(self, inputs: Tree) -> Step:
        self._pending.give_up(self.steps)
        self._learn()  # first: if a guard raises, the step was not observed, and nothing piles up
        step = Step(self.steps, self._next(inputs))
        if self._watch.detector is not None:
            step.outputs = clone(self._running.outputs(self._pending, step.window))
        self._pending.add(step)
        self._running.added(self._pending, step.window)
        if self._entry.shapes is None:
            self._entry.shapes = [leaf.shape for leaf in tensors(inputs)]
        self.steps, self._reset = self.steps + 1, None
        return step

    def _settle(self, step: Step, targets: Tree | None, mask: Tensor | None) -> None:
        step.targets, step.mask, step.settled = targets, mask, True
        said, step.outputs = self._watch.see(step), None
        self._learn()
        if said:  # last: it may have been made an error
            warnings.warn(said, AlarmWarning, stacklevel=3)

    def _learn(self) -> None:
        """Make the updates whose windows are complete."""
        while self._pending.ready(steps := self.estimator.next_steps(self.carry)):
            self._update(self._pending.window(steps))

    def _update(self, window: Window) -> None:
        labelled = window.targets is not None
        if labelled and self.loss.whole and window.num_targets < window.mask.numel():
            raise CapabilityError(
                f"a label for each step and lane was expected with a WindowLoss, but {window.num_targets} of "
                f"{window.mask.numel()} came in the window at step {window.start}: the loss couples steps, and nothing "
                "could stand in the place of those that are missing",
                fix="a label for each step, or a loss of single steps",
            )
        found = self.updater.update(window, None if labelled else self._no_loss)
        self.updates += found.applied
        self.refused += found.estimate is None
        self.metrics = {"loss": float(found.seen.loss)} | found.seen.metrics
        self._pending.drop(window.steps)
        if not found.carried_on and found.window.resets:  # predictions are to see these resets, too
            lanes = found.window.reset.any(0)
            if not self._pending.reset_first(lanes):
                self.reset(lanes)
        self._running.restart(self.carry.state)

    def _like(self, entry: str, example: Any) -> Any:
        """Return what an entry of a saved `state_dict` may be made of, see `tbptt.codec`; `example` as for `load`."""
        if entry == "drift":
            return self.drift
        if entry not in ("carry", "pending", "running"):
            return self.updater.state_dict().get(entry)
        step = None if example is None else Window(self._entry.lift.step("example", example))
        seen = None if step is None else states_of(self.model, step)
        return self.carry.state_dict(), self._pending.state_dict(), self._running.state_dict(), seen

    def _about(self) -> dict[str, str]:
        """Return what must be the same to go on from what was saved."""
        return {
            "estimator": repr(self.estimator),
            "optimizer": type(self.optimizer).__name__,
            "guards": ", ".join(type(guard).__name__ for guard in self.guards),
            "lanes": str(self.lanes),
            "label_patience": str(self._pending.patience),
            "weights": weights_of(self.model.state_dict()),
        }

    def _refuse_other(self, about: dict[str, str], what: str) -> None:
        refuse_other(about, self._about(), what, "learner", "build the learner as the one that was saved")


def _step_of(tree: Tree, step: int) -> Tree:
    """Return one step of a stretch, a copy: a view would keep the whole stretch in memory."""
    return clone(time_slice(tree, step, step + 1))


def _no_losses(outputs: Tree, targets: Tree) -> Tensor:
    """Return a zero for each step and lane: there is no label that a loss could look at."""
    del targets  # there are none
    leaf = tensors(outputs)[0]
    return torch.zeros(leaf.shape[:2], device=leaf.device)
