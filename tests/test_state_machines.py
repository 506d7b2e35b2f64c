"""Trainer and Online in any order of reading, updating, refusing, resetting, stopping, resuming and changing lengths.

What must happen is computed in plain lists (`estimators/counting.py`); the weights are whole numbers over counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import Counting, Step, counted_loss
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from plans import Drive, Plan, plans, refused

from tbptt import NonFinite, Online, Trainer

pytestmark = pytest.mark.filterwarnings("ignore::tbptt.errors.AlarmWarning")  # of losses that are NaN, as drawn
FEW = settings(
    max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
MANY = settings(FEW, max_examples=400, stateful_step_count=30)


def same(model: Counting, drive: Drive) -> None:
    found, wanted = model.delta.detach().numpy(), -drive.plain.total
    assert np.allclose(found, wanted, rtol=0, atol=1e-9), f"{drive.plan}: {found} instead of {wanted}"


class TrainerMachine(RuleBasedStateMachine):
    """Any number of updates in any number of runs, each in a process of its own as far as it can tell."""

    @initialize(plan=plans())
    def begin(self, plan: Plan) -> None:
        self.plan, self.drive = plan, Drive(plan)
        self.directory = tempfile.TemporaryDirectory()
        self.updates = 0
        self.resume()

    @rule()
    def resume(self) -> None:
        """Stop where it is, and go on with everything built anew."""
        self.model = Counting(self.plan.numbers)
        self.trainer = Trainer(
            self.model,
            counted_loss,
            torch.optim.SGD(self.model.parameters(), lr=1.0),
            self.plan.estimator(),
            self.plan.stream(),
            guards=[NonFinite("skip", limit=10**6)],
            directory=Path(self.directory.name) / "run",
            checked=False,
        )
        if self.updates:
            self.trainer.run(updates=self.updates)  # makes none: it takes up where the last one stopped

    @rule(more=st.integers(1, 5))
    def update(self, more: int) -> None:
        for _ in range(more):
            self.drive.advance()
        self.updates += more
        assert self.trainer.run(updates=self.updates).updates == self.updates

    @invariant()
    def the_weights_are_as_they_must_be(self) -> None:
        if hasattr(self, "drive"):
            same(self.model, self.drive)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


class OnlineMachine(RuleBasedStateMachine):
    """Steps observed one by one; lanes reset, windows refused, the learner saved and loaded in between."""

    @initialize(plan=plans())
    def begin(self, plan: Plan) -> None:
        self.plan, self.drive = plan, Drive(plan)
        self.directory = tempfile.TemporaryDirectory()
        self.window: list[Step] = []
        self.at = 0
        self.begun = [False] * plan.lanes
        self.build()

    def build(self) -> None:
        self.model = Counting(self.plan.numbers)
        self.online = Online(
            self.model,
            counted_loss,
            torch.optim.SGD(self.model.parameters(), lr=1.0),
            self.plan.estimator(),
            guards=[NonFinite("skip", limit=10**6)],
            lanes=self.plan.lanes,
        )

    @rule()
    def save_and_load(self) -> None:
        self.online.save(self.directory.name)
        self.build()
        self.online.load(self.directory.name)

    @rule(lanes=st.lists(st.booleans(), min_size=2, max_size=2))
    def reset(self, lanes: list[bool]) -> None:
        chosen = lanes[: self.plan.lanes]
        self.begun = [a or b for a, b in zip(self.begun, chosen, strict=True)]
        self.online.reset(
            torch.tensor(chosen) if self.plan.lanes > 1 else (None if chosen[0] else torch.tensor([False]))
        )

    @rule(predict=st.booleans())
    def learn(self, predict: bool) -> None:
        step = self.plan.steps[self.at % len(self.plan.steps)]
        self.at += 1
        step = Step(step.numbers, step.weights, step.spoiled, tuple(self.begun))
        self.begun = [False] * self.plan.lanes
        inputs = torch.tensor([[n, float(bad)] for n, bad in zip(step.numbers, step.spoiled, strict=True)]).double()
        target = torch.tensor(step.weights, dtype=torch.float64)
        x, y = (inputs, target) if self.plan.lanes > 1 else (inputs[0], target[0])
        if predict:
            self.online.predict_one(x)  # changes nothing
        self.online.learn_one(x, y)
        self.window.append(step)
        while len(self.window) >= (lengths := self.drive.lengths())[0]:
            self.drive.learn(self.window[: lengths[0]], *lengths)
            self.window = self.window[lengths[0] :]

    @precondition(lambda self: hasattr(self, "drive"))
    @invariant()
    def the_weights_are_as_they_must_be(self) -> None:
        same(self.model, self.drive)

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()


@pytest.mark.parametrize("fault", ["", "the resets owed are forgotten", "a broken state is carried on", "lengths stay"])
def test_the_account_sees_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    plan = refused()
    if fault == "the resets owed are forgotten":
        monkeypatch.setattr("tbptt.snapshots.Snapshots.with_resets", lambda self, window: window)
    elif fault == "a broken state is carried on":
        monkeypatch.setattr("tbptt.estimators.carry.ChainCarry.finite", True)
    elif fault:
        plan = Plan(plan.lanes, plan.steps, 2, (2, 6, 4), plan.losses, plan.replay)
        monkeypatch.setattr("tbptt.length.Ramp.now", lambda self, state: self.first)
    machine = TrainerMachine()
    machine.begin(plan)
    machine.update(5)
    machine.resume()
    if fault:
        with pytest.raises(AssertionError):
            machine.the_weights_are_as_they_must_be()
    else:
        machine.the_weights_are_as_they_must_be()
    machine.teardown()


def case(machine: Any, how: settings) -> Any:
    made = type(f"{machine.__name__}Case", (machine.TestCase,), {"settings": how})
    return made


TestTrainer = case(TrainerMachine, FEW)
TestOnline = case(OnlineMachine, settings(FEW, stateful_step_count=30))
TestTrainerLong = pytest.mark.slow(case(TrainerMachine, MANY))
TestOnlineLong = pytest.mark.slow(case(OnlineMachine, settings(MANY, stateful_step_count=60)))
