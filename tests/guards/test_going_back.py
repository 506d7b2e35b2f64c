"""Going back: to the very weights, optimizer and carry of then, while the stream goes on; also after a stop."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tbptt
from tbptt.estimators.base import Estimate
from tbptt.guards.base import Guard, RollBack, SnapshotPlan

STEPS, LANES = 5, 2
MARK = 12345.0


class BackAt(Guard):
    """Goes back at the updates that it is told."""

    def __init__(self, *updates: int, every: int = 4, keep: int = 2) -> None:
        self.updates, self.seen = updates, 0
        self.snapshots = SnapshotPlan(every, keep)

    def __call__(self, estimate: Estimate) -> Estimate | RollBack:
        self.seen += 1
        return RollBack("it is told") if self.seen in self.updates else estimate

    def went_back(self, state: dict[str, Any]) -> None:
        del state  # else it would go back at the same update for ever

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Counts(Guard):
    """Remembers how many estimates it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, estimate: Estimate) -> Estimate:
        self.seen += 1
        return estimate

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Notes(tbptt.Monitor):
    def __init__(self) -> None:
        self.updates: list[tbptt.monitors.base.Update] = []
        self.messages: list[str] = []

    def update(self, update: Any) -> None:
        self.updates.append(update.to_keep())

    def message(self, text: str) -> None:
        self.messages.append(text)


def rows(count: int = 800) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, generator=generator), torch.randn(count, 3, generator=generator)


def model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.GRU(1, 3, num_layers=2, dropout=dropout)


def trainer(guards: list[Guard], net: nn.Module, directory: Path | None = None, **settings: Any) -> tbptt.Trainer:
    optimizer = settings.pop("optimizer", None) or torch.optim.Adam(net.parameters(), lr=0.03)
    return tbptt.Trainer(
        net,
        nn.MSELoss(),
        optimizer,
        settings.pop("estimator", tbptt.TBPTT(STEPS, STEPS)),
        settings.pop("stream", None) or tbptt.ArrayStream(*rows(), lanes=LANES),
        guards=guards,
        directory=directory,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9),
        saving=tbptt.Saving(every=3, keep=2, log_every=1),
        checked=False,
        **settings,
    )


def by_hand(updates: int, back_at: tuple[int, ...], every: int = 4, keep: int = 2) -> list[Tensor]:
    """A loop that keeps whole copies of everything, and knows when it will be told to go back."""
    inputs, targets = (each.view(LANES, -1, each.shape[-1]).transpose(0, 1) for each in rows())
    net = model()
    adam = torch.optim.Adam(net.parameters(), lr=0.03)
    state, made, since = None, 0, 0
    kept = [copy.deepcopy((net, adam, state, made))]  # together, so that they stay bound to each other
    for update in range(updates):
        piece = slice(update * STEPS, (update + 1) * STEPS)
        outputs, after = net(inputs[piece], state)
        adam.zero_grad()
        nn.functional.mse_loss(outputs, targets[piece]).backward()
        since += 1
        if update + 1 in back_at:
            kept = kept[:1]
            net, adam, state, made = copy.deepcopy(kept[0])
            since = 0
            continue
        adam.param_groups[0]["lr"] = 0.03 * 0.9 ** (made // 3)  # what StepLR(3, 0.9) does
        adam.step()
        state, made = after.detach(), made + 1
        if since >= every:
            net.zero_grad()
            kept = [*kept, copy.deepcopy((net, adam, state, made))][-keep:]
            since = 0
    return [each.detach() for each in net.parameters()]


def largest_difference(net: nn.Module, expected: list[Tensor]) -> float:
    return max(float((a.detach() - b).abs().max()) for a, b in zip(net.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    "back_at",
    [
        (2,),
        (10,),
        (10, 12),
        (10, 16),
        (9, 10),
        (6, 7, 8, 30),
        (20, 40),
        (13, 14, 26, 27),
    ],  # also twice to the same snapshot
    ids=str,
)
def test_it_does_what_a_loop_by_hand_does(back_at: tuple[int, ...]) -> None:
    net = model()
    trainer([BackAt(*back_at)], net).run(updates=45)
    assert largest_difference(net, by_hand(45, back_at)) < 1e-6
    for other in ((), (*back_at[:-1], back_at[-1] + 1)):
        assert largest_difference(net, by_hand(45, other)) > 1e-4
    assert largest_difference(net, by_hand(45, back_at, keep=3)) > 1e-4 or max(back_at) <= 8


@pytest.mark.parametrize("stops", [[1], [4, 8, 10], [11, 12, 13], [25, 26]], ids=str)
@pytest.mark.parametrize("estimator", [tbptt.TBPTT(5, 13), tbptt.TBPTT(5, 13, replay="retain")], ids=str)
def test_a_run_in_pieces_is_a_run_in_one(tmp_path: Path, estimator: tbptt.Estimator, stops: list[int]) -> None:
    def run(directory: Path, updates: int) -> tbptt.Trainer:
        guards = [Counts(), BackAt(11, 13, 26), tbptt.ZClip(warm_up=3)]
        made = trainer(guards, model(dropout=0.3), directory, estimator=estimator)
        made.run(updates=updates)
        return made

    one = run(tmp_path / "one", 40)
    for updates in [*stops, 40]:
        torch.manual_seed(updates)  # whatever was drawn meanwhile must not matter
        pieces = run(tmp_path / "pieces", updates)
    assert largest_difference(pieces.model, [each.detach() for each in one.model.parameters()]) == 0.0
    assert (tmp_path / "pieces/metrics.jsonl").read_bytes() == (tmp_path / "one/metrics.jsonl").read_bytes()
    last = "checkpoints/update-0000000040/state.safetensors"
    a, b = load_file(tmp_path / "one" / last), load_file(tmp_path / "pieces" / last)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("snapshots.kept[1].optimizer") for name in a)
    refused = [json.loads(line)["refused"] for line in (tmp_path / "one/metrics.jsonl").read_text().splitlines()]
    assert [number for number, each in enumerate(refused, 1) if each] == [11, 13, 26]


def test_without_the_snapshots_in_the_checkpoint_it_would_not_be_one(tmp_path: Path, monkeypatch: Any) -> None:
    """The control of the test before."""
    run = trainer([BackAt(11)], model(), tmp_path / "one")
    run.run(updates=20)
    trainer([BackAt(11)], model(), tmp_path / "pieces").run(updates=10)
    forgetful = trainer([BackAt(11)], model(), tmp_path / "pieces")
    anew = forgetful.updater.snapshots
    monkeypatch.setattr(anew, "load_state_dict", lambda state: anew.take(10, forgetful.carry))
    forgetful.run(updates=20)
    assert largest_difference(forgetful.model, [each.detach() for each in run.model.parameters()]) > 1e-4


def test_monitors_see_it_and_the_other_guards_go_back_as_well() -> None:
    notes, counts = Notes(), Counts()
    trainer([counts, BackAt(7)], model(), monitors=[notes]).run(updates=10)
    seventh = notes.updates[6]
    assert (seventh.number, seventh.applied, seventh.refused) == (7, False, True)
    assert seventh.estimate.metrics["rolled_back"] == 6.0  # to the beginning
    assert [each.number for each in notes.updates if "rolled_back" in each.estimate.metrics] == [7]
    assert [each.number for each in notes.updates if not each.applied] == [7]
    assert notes.messages == ["update 7 went back: it is told; 6 updates before it are undone"]
    assert counts.seen == 3  # of the 10; what it saw before the seventh is undone


def test_snapshots_are_few_and_old_enough() -> None:
    made = trainer([BackAt(every=5, keep=3)], model())
    for updates in range(1, 40):
        made.run(updates=updates)
        kept = [each["update"] for each in made.updater.snapshots.state_dict()["kept"]]
        assert kept == [number for number in range(0, updates + 1, 5)][-3:]
    assert made.updates - kept[0] >= 10
    plain = trainer([tbptt.NonFinite()], model())
    plain.run(updates=12)
    assert plain.updater.snapshots.state_dict()["kept"] == []


class Sums(nn.Module):
    """Its state is the sum of a lane's inputs since it was reset; a marked input is no number to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = torch.zeros_like(inputs[0]) if state is None else state
        sums = before + torch.where(inputs == MARK, torch.nan, inputs).cumsum(0)
        return sums * self.weight, sums[-1]


@pytest.mark.parametrize(("reset_at", "expected"), [(0, 6), (12, 2), (22, 2), (29, 2)])
def test_a_sequence_that_began_in_data_left_out_begins_with_the_next_window(reset_at: int, expected: int) -> None:
    """Windows of two steps of 1; update 15 goes back to after update 2 or so, with a sum of its own."""
    reset = torch.zeros(200, dtype=torch.bool)
    reset[[0, 100]] = True
    if reset_at:
        reset[100 + reset_at] = True  # in the second lane
    stream = tbptt.ArrayStream(torch.ones(200, 1), torch.zeros(200, 1), lanes=2, reset=reset)
    made = trainer([BackAt(15, every=2, keep=7)], Sums(), stream=stream, estimator=tbptt.TBPTT(2, 2))
    made.run(updates=16)
    state = made.carry.state
    assert isinstance(state, Tensor)
    assert state[0].item() == 6.0  # two updates and the sixteenth
    assert state[1].item() == expected


def raced(guards: list[Guard], **settings: Any) -> tbptt.Comparison:
    return tbptt.compare(
        {"it": tbptt.TBPTT(STEPS, STEPS)},
        model(),
        settings.pop("stream", None) or tbptt.ArrayStream(*rows(), lanes=LANES),
        loss=settings.pop("loss", nn.MSELoss()),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        updates=30,
        guards=guards,
        held_out=tbptt.ArrayStream(*rows(60), lanes=1),
        points=1,
        burn_in=16,
        span=8,
    )


def test_a_race_goes_back_as_the_trainer_does() -> None:
    def trained(guards: list[Guard]) -> float:
        net = model()
        adam = torch.optim.Adam(net.parameters(), lr=0.03)
        stream, held_out = tbptt.ArrayStream(*rows(), lanes=LANES), tbptt.ArrayStream(*rows(60), lanes=1)
        it = tbptt.Trainer(
            net, nn.MSELoss(), adam, tbptt.TBPTT(STEPS, STEPS), stream, guards=guards, held_out=tbptt.HeldOut(held_out)
        )
        return it.run(updates=30).validation["loss"]

    guards: list[Guard] = [BackAt(7, 20), tbptt.ZClip(warm_up=3)]
    assert raced(guards).rows[0].final_validation == trained(copy.deepcopy(guards))
    assert raced(guards).rows[0].final_validation != trained([BackAt(7, 21), tbptt.ZClip(warm_up=3)])


def nan_where_marked(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).mean(-1) * torch.where(targets[..., 0] == MARK, torch.nan, 1.0)


def test_in_a_race_a_loss_that_was_undone_is_no_divergence() -> None:
    inputs, targets = rows()
    targets[60, 0] = MARK  # in window 13; the gradients are compared within the first 24 steps
    stream = tbptt.ArrayStream(inputs, targets, lanes=LANES)
    found = raced([tbptt.SpikeRollback()], stream=stream, loss=nan_where_marked).rows[0]
    assert (found.failed, found.updates) == ("", 30)
    assert raced([], stream=stream, loss=nan_where_marked).rows[0].failed.startswith("diverged: its loss was nan")


@pytest.mark.parametrize(("reset_at", "expected"), [(0, 18), (8, 10), (9, 10)])
def test_so_does_one_that_began_in_a_window_that_broke_the_state(reset_at: int, expected: int) -> None:
    """Windows of two steps of 1; the fifth, with steps 8 and 9, is NaN in the first lane and is refused."""
    inputs, reset = torch.ones(200, 1), torch.zeros(200, dtype=torch.bool)
    inputs[9] = MARK
    reset[[0, 100, 100 + reset_at]] = True
    stream = tbptt.ArrayStream(inputs, torch.zeros(200, 1), lanes=2, reset=reset)
    made = trainer([tbptt.NonFinite("skip")], Sums(), stream=stream, estimator=tbptt.TBPTT(2, 2))
    made.run(updates=10)
    state = made.carry.state
    assert isinstance(state, Tensor)
    assert state[0].item() == 18.0  # all but the fifth
    assert state[1].item() == expected  # the sixth to the tenth, where a sequence began in the fifth


@pytest.mark.parametrize("k1", [8, "pass"])
def test_estimators_whose_window_is_a_whole_pass_go_back_as_well(k1: Any) -> None:
    def trained(*back_at: int) -> list[Tensor]:
        net = model()
        stream = tbptt.ArrayStream(*(each[:80] for each in rows()), lanes=LANES)
        guards = [BackAt(*back_at, every=2), tbptt.NonFinite("skip")]
        trainer(guards, net, stream=stream, estimator=tbptt.FullBPTT(k1)).run(updates=8)
        return [each.detach() for each in net.parameters()]

    if k1 == "pass":  # every window is the same pass: going back to after the second leaves so many updates fewer
        assert all(map(torch.equal, trained(5, 6), trained(7, 8)))
    assert not any(map(torch.equal, trained(5), trained()))


@pytest.mark.parametrize("estimator", [tbptt.FullBPTT("pass"), tbptt.TBPTT(10, 10)], ids=str)
def test_a_pass_that_broke_the_state_is_left_out(estimator: tbptt.Estimator) -> None:
    inputs = torch.ones(20, 1)
    inputs[3] = MARK
    stream = tbptt.ArrayStream(inputs, torch.zeros(20, 1), lanes=2)
    net = Sums()
    made = trainer([tbptt.NonFinite("skip")], net, stream=stream, estimator=estimator)
    made.run(updates=3)
    assert made.updates == 3
    assert net.weight.item() == 1.0
