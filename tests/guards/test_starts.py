"""SpikeRollback in the trainer: what an unusual state does to the loss is no reason to go back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tbptt
from tbptt.errors import DivergedError
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard
from tbptt.snapshots import Snapshots


class Poison(Guard):
    """Makes one gradient a million times too large."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def __call__(self, estimate: Estimate) -> Estimate:
        self.seen += 1
        if self.seen != self.at:
            return estimate
        return estimate.with_gradients({name: 1e6 * value for name, value in estimate.gradients.items()})


class CountsOn(Poison):
    """Poison that a run which went back does not meet again, though guards go back with it."""

    def went_back(self, state: dict[str, Any]) -> None:
        del state

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Notes(tbptt.Monitor):
    def __init__(self) -> None:
        self.back: list[int] = []

    def update(self, update: Any) -> None:
        if "rolled_back" in update.estimate.metrics:
            self.back.append(update.number)


def sine(rows: int) -> tbptt.ArrayStream:
    """A signal without noise: the loss falls to 1e-5, and is 1e-1 from a state that does not know where it is."""
    signal = torch.sin(torch.arange(rows) / 9).unsqueeze(1)
    return tbptt.ArrayStream(signal[:-1], signal[1:, 0], lanes=4)


def trained(stream: tbptt.Stream, guards: list[Guard], updates: int, lr: float = 3e-3) -> tuple[list[int], float]:
    """Return the updates that went back, and the loss at the end."""
    torch.manual_seed(0)
    model = tbptt.SequenceModel(1, 1, hidden=16)
    notes, adam = Notes(), torch.optim.Adam(model.parameters(), lr=lr)
    estimator = tbptt.TBPTT(8, 24)
    settings: dict[str, Any] = {"guards": guards, "monitors": [notes], "checked": False}
    trainer = tbptt.Trainer(model, nn.MSELoss(), adam, estimator, stream, **settings)
    trainer.run(updates=updates)
    return notes.back, tbptt.evaluate(model, nn.MSELoss(), sine(2001))["loss"]


def shifted(count: int = 4000) -> tbptt.ArrayStream:
    """A mean of 10, which is learned within a few dozen updates: the loss falls from 100 to 0.3."""
    generator = torch.Generator().manual_seed(0)
    targets = 10 + 0.5 * torch.randn(count, generator=generator)
    return tbptt.ArrayStream(torch.randn(count, 1, generator=generator), targets, lanes=4)


def deaf(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    for method in methods:
        monkeypatch.setattr(tbptt.SpikeRollback, method, lambda self, _: None)


CASES: dict[str, tuple[Callable[[], tuple[list[int], float]], list[int], tuple[str, ...]]] = {
    # passes begin at updates 251 and 501, from an empty state
    "a new pass": (lambda: trained(sine(8001), [tbptt.SpikeRollback()], 560), [], ("unsettle",)),
    # going back is right, and the state that is carried on from there is of 100 updates ago
    "data left out": (
        lambda: trained(sine(80001), [CountsOn(400), tbptt.SpikeRollback()], 600),
        [400],
        ("unsettle",),
    ),
    # so are the weights, of a time when the loss was a hundred times what it was lately
    "a loss that falls fast": (
        lambda: trained(shifted(), [CountsOn(118), tbptt.SpikeRollback(every=60)], 124, lr=0.3),
        [118],
        ("unsettle", "went_back"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_goes_back_for_a_spike_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, expected, needed = CASES[name]
    back, loss = run()
    assert back == expected
    if name == "data left out":
        assert loss < 1e-2
    # The control: a guard that hears nothing of it takes what is high for a spike.
    deaf(monkeypatch, *needed)
    try:
        assert run()[0] != expected
    except DivergedError:  # again and again
        pass


def marked(*steps: tuple[int, int], lanes: int = 2, length: int = 10) -> tbptt.Window:
    reset = torch.zeros(length, lanes, dtype=torch.bool)
    for step, lane in steps:
        reset[step, lane] = True
    return tbptt.Window(torch.zeros(length, lanes, 1), reset=reset)


def test_what_state_a_window_is_run_from() -> None:
    model = nn.GRU(1, 1)
    snapshots = Snapshots([tbptt.SpikeRollback()], model, torch.optim.SGD(model.parameters(), lr=0.1))
    carry = tbptt.TBPTT(10, 10).init(model, 2)
    snapshots.take(0, carry)

    def started(window: tbptt.Window, *, carried_on: bool = True) -> str:
        found = snapshots.start(snapshots.with_resets(window))
        snapshots.note(window, carried_on=carried_on)
        return found

    assert started(marked()) == "usual"
    assert started(marked((0, 0), (0, 1))) == "sequence"
    assert started(marked()) == "usual"  # it has been read for a whole window
    assert started(marked((0, 0))) == "usual"  # one lane alone
    assert started(marked((7, 0), (7, 1))) == "sequence"
    assert started(marked()) == "sequence"  # three steps are no whole window
    assert started(marked()) == "usual"
    assert started(marked((7, 0), (7, 1)), carried_on=False) == "sequence"
    assert started(marked()) == "gap"  # the state is older than the steps that were left out
    assert started(marked()) == "usual"
    started(marked((7, 0), (7, 1)))
    other = Snapshots([tbptt.SpikeRollback()], model, torch.optim.SGD(model.parameters(), lr=0.1))
    other.load_state_dict(snapshots.state_dict())
    assert other.start(marked()) == "sequence"  # also after a stop
    snapshots.restore(12, carry)
    assert started(marked()) == "gap"


@pytest.mark.parametrize("stops", [[260, 400, 401], [251, 402, 420]], ids=str)
def test_a_run_in_pieces_is_a_run_in_one(tmp_path: Path, stops: list[int]) -> None:
    """Over the start of a pass, which is reset, and over going back, to weights and to what was usual then."""

    def run(directory: Path, updates: int) -> None:
        torch.manual_seed(0)
        model = tbptt.SequenceModel(1, 1, hidden=8)
        adam = torch.optim.Adam(model.parameters(), lr=3e-3)
        guards: list[Guard] = [CountsOn(400), tbptt.SpikeRollback(every=20)]
        settings: dict[str, Any] = {"guards": guards, "directory": directory, "checked": False}
        saving = tbptt.Saving(every=1000, log_every=1)
        stream, estimator = sine(8001), tbptt.TBPTT(8, 12)
        tbptt.Trainer(model, nn.MSELoss(), adam, estimator, stream, saving=saving, **settings).run(updates=updates)

    run(tmp_path / "one", 440)
    for updates in [*stops, 440]:
        torch.manual_seed(updates)
        run(tmp_path / "pieces", updates)
    last = "checkpoints/update-0000000440"
    for name in ("model", "state"):
        a, b = (load_file(tmp_path / each / last / f"{name}.safetensors") for each in ("one", "pieces"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    one, pieces = (
        json.loads((tmp_path / each / last / "state.json").read_text())["state"]["guards"] for each in ("one", "pieces")
    )
    assert one == pieces
    assert one[1]["in_row"] == 1  # it went back
    assert one[1]["norms"]["left"] == 100 - 39  # and the fortieth window since is the last
