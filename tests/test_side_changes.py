"""What a training step changes besides weights and state: a resumed run finds it as it was left, or is told.

The oracle is a run that was never stopped; the control is a run whose checkpoint lost what was saved of it.
"""

from __future__ import annotations

import collections
import json
import random
import warnings
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.checkpoint import Checkpoints
from tbptt.errors import AlarmWarning, CheckpointWarning
from tbptt.side_changes import SideChanges

X = torch.randn(400, 2, generator=torch.Generator().manual_seed(1))


class Phase(Enum):
    EARLY = 1
    LATE = 2


class Scaled(nn.Module):
    """An LSTM whose inputs are scaled by something that changes as it trains; `setting` never does."""

    def __init__(self, setting: float = 1.0) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(2, 5), nn.Linear(5, 2)
        self.setting = setting

    def scale(self, inputs: Tensor) -> Any:
        return 1.0

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        scale = self.scale(inputs) if self.training and torch.is_grad_enabled() else 1.0
        outputs, state = self.core(inputs * scale * self.setting, state)
        return self.head(outputs), state


class Counting(Scaled):
    count = 0  # of the class at first, and then an attribute that has come since

    def scale(self, inputs: Tensor) -> Any:
        self.count += 1
        return 1 / self.count


class Buffered(Scaled):
    def __init__(self, setting: float = 1.0) -> None:
        super().__init__(setting)
        self.register_buffer("decay", torch.ones(()), persistent=False)

    def scale(self, inputs: Tensor) -> Any:
        self.decay.mul_(0.98)
        return self.decay.clone()


class Drawing(Scaled):
    def __init__(self, setting: float = 1.0) -> None:
        super().__init__(setting)
        self.own = torch.Generator().manual_seed(0)
        self.numpys, self.pythons = np.random.default_rng(3), random.Random(4)

    def scale(self, inputs: Tensor) -> Any:
        return torch.rand(inputs.shape, generator=self.own) * self.numpys.random() * (1 + self.pythons.random())


class Remembering(Scaled):
    """Containers of all kinds, one of which is there at first and then is no more."""

    def __init__(self, setting: float = 1.0) -> None:
        super().__init__(setting)
        self.recent: collections.deque[float] = collections.deque(maxlen=3)
        self.seen, self.names, self.log = {"a": [torch.zeros(2)]}, {"start"}, np.zeros(2)
        self.first: Any = (1.0, None)

    def scale(self, inputs: Tensor) -> Any:
        self.recent.append(float(inputs.detach().abs().mean()))
        self.seen["a"][0] += 0.1
        self.seen[f"at {len(self.seen) % 5}"] = [self.seen["a"][0].clone()]
        self.names.add(f"{len(self.names) % 7}")
        self.log = self.log + 0.1
        first = 0.0 if not hasattr(self, "first") else self.__dict__.pop("first")[0]
        tail = self.log.sum() + len(self.names) + sum(float(each[0].sum()) for each in self.seen.values())
        return (sum(self.recent) + first + tail / 10) / 5


class Weighing(nn.Module):
    """A loss with buffers in and outside its state_dict, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("other", torch.ones(()), persistent=False)
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        errors = (outputs - targets).square().mean(-1)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * errors.detach().mean())
            self.other.mul_(0.99)
        return errors / self.mean * self.other / (1 + 0.01 * self.calls)


CASES: dict[str, tuple[Callable[..., Scaled], Callable[[], nn.Module]]] = {
    **{each.__name__: (each, nn.MSELoss) for each in (Scaled, Counting, Buffered, Drawing, Remembering)},
    "Weighing": (Scaled, Weighing),
}
NAMES = list(CASES)


def trainer(directory: Path, name: str, **settings: Any) -> tbptt.Trainer:
    kind, loss = CASES[name]
    torch.manual_seed(0)
    model = kind(**settings)
    stream = tbptt.ArrayStream(X, X, lanes=2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    return tbptt.Trainer(
        model, loss(), sgd, tbptt.TBPTT(8, 8), stream, directory=directory, checked=False, saving=tbptt.Saving(every=7)
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "one", name)
    whole.run(updates=40)
    for stop in (9, 20):
        trainer(tmp_path / "two", name).run(updates=stop)
    resumed = trainer(tmp_path / "two", name)
    resumed.run(updates=40)
    assert same_weights(whole.model, resumed.model)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_without_it_is_read_and_makes_the_difference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, and the checkpoints of an earlier version; where nothing changes nothing is saved."""
    taken: dict[str, Any] = {}
    load = Checkpoints.load_latest

    def of_an_earlier_version(self: Checkpoints, *like: Any) -> Any:
        loaded = load(self, *like)
        taken.update({} if loaded is None else loaded.state.pop("side"))
        return loaded

    trainer(tmp_path, name).run(updates=20)
    monkeypatch.setattr(Checkpoints, "load_latest", of_an_earlier_version)
    resumed, whole = trainer(tmp_path, name), trainer(tmp_path / "one", name)
    resumed.run(updates=40)
    whole.run(updates=40)
    assert same_weights(whole.model, resumed.model) == (name == "Scaled")
    assert (taken == {"values": {}, "gone": {}}) == (name == "Scaled")


@pytest.mark.parametrize("name", NAMES)
def test_online_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def learner() -> tbptt.Online:
        kind, loss = CASES[name]
        torch.manual_seed(0)
        model = kind()
        return tbptt.Online(model, loss(), torch.optim.SGD(model.parameters(), 0.1), tbptt.TBPTT(2, 4))

    whole, resumed = learner(), learner()
    whole.learn_many(X[:31], X[:31])
    whole.save(tmp_path)
    resumed.load(tmp_path)
    for each in (whole, resumed):
        each.learn_many(X[31:80], X[31:80])
    assert same_weights(whole.model, resumed.model)


def test_a_setting_may_be_another_when_a_run_is_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, "Buffered", setting=1.0).run(updates=10)
    resumed = trainer(tmp_path, "Buffered", setting=0.5)
    resumed.run(updates=12)
    assert resumed.model.setting == 0.5
    assert float(resumed.model.decay) == pytest.approx(0.98**12, rel=1e-5)


def test_what_changed_once_is_saved_for_good(tmp_path: Path) -> None:
    """A value that comes back to where it began, and one that changed before the last resume."""

    def built(count: int) -> tuple[Counting, SideChanges]:
        model = Counting()
        model.count = count
        return model, SideChanges(model)

    model, changes = built(5)
    model.count = 6
    changes.state_dict()
    model.count = 5
    later, again = built(0)
    again.load_state_dict(changes.state_dict())
    assert later.count == 5
    last, third = built(0)
    third.load_state_dict(again.state_dict())  # nothing has changed since, but what was saved still is
    assert last.count == 5


class Stats:
    """What a model may keep that no checkpoint holds."""

    def __init__(self) -> None:
        self.total, self.more = 0.0, [torch.zeros(1)]


class Keeping(Scaled):
    def __init__(self, setting: float = 1.0) -> None:
        super().__init__(setting)
        self.stats, self.config, self.phase, self.chosen = Stats(), Stats(), Phase.EARLY, Scaled.scale
        self.deep, self.rows, self.loose = [{"x": Stats()}], {(0, 1): 0}, torch.zeros(1, requires_grad=True)
        self.same = [self.head.weight, self.head]  # its own weights, which are saved

    def scale(self, inputs: Tensor) -> Any:
        self.stats.total += 1
        self.deep[0]["x"].more[0].add_(1)
        self.phase, self.chosen = Phase.LATE, Scaled.forward
        self.rows[0, 1] += 1
        self.late = Stats()
        with torch.no_grad():
            self.loose += 1
        return 1.0


CASES["Keeping"] = (Keeping, nn.MSELoss)
CHANGED = ("chosen", "deep", "late", "loose", "phase", "rows", "stats")


def test_what_cannot_be_saved_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(AlarmWarning, match="no checkpoint holds") as caught:
        trainer(tmp_path, "Keeping").run(updates=20)
    (said,) = [str(each.message) for each in caught]
    assert said.startswith(f"resume at update 1: {', '.join(f'model.{name}' for name in CHANGED)} of Keeping changes")
    alarms = [json.loads(each) for each in (tmp_path / "stability.jsonl").read_text().splitlines()]
    assert [each["update"] for each in alarms if each["kind"] == "alarm"] == [1]


def test_a_run_without_checkpoints_is_told_nothing() -> None:
    torch.manual_seed(0)
    model = Keeping()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlarmWarning)
        stream = tbptt.ArrayStream(X, X, lanes=2)
        tbptt.Trainer(model, nn.MSELoss(), sgd, tbptt.TBPTT(8, 8), stream, checked=False).run(updates=3)


def test_online_names_it_when_it_saves(tmp_path: Path) -> None:
    model = Keeping()
    online = tbptt.Online(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), 0.1), tbptt.TBPTT(2, 2))
    online.save(tmp_path)
    online.learn_many(X[:4], X[:4])
    with pytest.warns(CheckpointWarning, match="model.stats"):
        online.save(tmp_path)
    online.learn_many(X[4:8], X[4:8])
    online.save(tmp_path)


def test_a_run_that_goes_on_at_rate_zero_is_told(tmp_path: Path) -> None:
    def run(updates: int, factor: Callable[[int], float]) -> None:
        built = trainer(tmp_path, "Scaled")
        built.scheduler = built.updater.scheduler = torch.optim.lr_scheduler.LambdaLR(built.optimizer, factor)
        built.run(updates=updates)

    run(8, lambda update: float(update < 8))
    with pytest.warns(AlarmWarning, match="learning rate at update 8: it is 0 in all groups"):
        run(10, lambda update: float(update < 8))
