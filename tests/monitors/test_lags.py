"""The curve by lag is the gradient's own, and measuring it leaves no trace in the training."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Model, lines_of, stream, trainer
from torch import Tensor, nn

import tbptt
from tbptt.errors import AlarmWarning, ConfigError
from tbptt.monitors.base import Plan, Update
from tbptt.randomness import random_state


class Leaky(nn.Module):
    """h <- a h + x, and h is the output: the gradient of a loss at lag k is that at lag 1 times a^(k - 1)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1:]) if state is None else state
        outputs = []
        for step in inputs:
            state = self.factor * state + step
            outputs.append(state)
        return torch.stack(outputs), state


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().sum(-1)


def numbers(steps: int, lanes: int = 3, **changes: Any) -> tbptt.ArrayStream:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(steps * lanes, 1, generator=generator, dtype=torch.float64)
    return tbptt.ArrayStream(inputs, torch.zeros_like(inputs), lanes=lanes, **changes)


def update(number: int) -> Update:
    return Update(number, 0, 0, 8, 3, None, True, 0.1)


def curve(tmp_path: Path, model: nn.Module, max_lag: int = 16, **changes: Any) -> dict[str, Any]:
    source = changes.pop("stream", None) or numbers(200)
    monitor = tbptt.LagCurves(model, absolute, source, tmp_path / "lags.jsonl", every=2, max_lag=max_lag, **changes)
    monitor.begin(Plan(0, None, 3))
    for number in range(1, 4):
        monitor.update(update(number))
    monitor.end()
    (line,) = lines_of(monitor.path)
    assert (line["kind"], line["update"]) == ("lags", 2)
    return line


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, -0.7])
def test_the_norms_are_those_of_the_closed_form(tmp_path: Path, factor: float) -> None:
    line = curve(tmp_path, Leaky(factor))
    assert line["lags"] == list(range(1, 17))
    # |d|h - y| / d h_{t-k}| = |a|^k; "so many steps before" counts the loss's own step as lag 1
    assert line["norms"] == pytest.approx([abs(factor) ** lag for lag in range(1, 17)], rel=1e-12)


def test_they_are_those_of_autograd_over_the_whole_sequence(tmp_path: Path) -> None:
    """A gated model: each lane's gradient by a graph over all steps, cut nowhere; one lane has no target there."""
    torch.manual_seed(3)
    model, max_lag = nn.GRU(1, 4).double(), 12
    mask = torch.zeros(3 * 100, dtype=torch.bool)
    steps = 2 * max_lag + 16
    last = steps - 4  # the only step with targets near the end: nothing is left to chance
    for lane, step in ((0, last), (2, last), (1, 5)):
        mask[lane * 100 + step] = True
    source = numbers(100, mask=mask)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(-1)

    monitor = tbptt.LagCurves(model, loss, source, tmp_path / "l.jsonl", every=1, max_lag=max_lag)
    monitor.begin(Plan(0, None, 3))
    monitor.update(update(1))
    monitor.end()
    (line,) = lines_of(monitor.path)

    window = numbers(100).read(steps)
    expected = torch.zeros(max_lag, dtype=torch.float64)
    for lane in (0, 2):
        states = [torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)]
        for step in range(last + 1):
            outputs, state = model(window.inputs[step : step + 1, lane : lane + 1], states[-1])
            states.append(state)
        gradients = torch.autograd.grad(outputs.square().sum(), states[-max_lag - 1 : -1])
        expected += torch.stack([gradient.norm() for gradient in reversed(gradients)]) / 2
    assert line["norms"] == pytest.approx(expected.tolist(), rel=1e-9)


def test_of_a_model_of_segments_all_lags_are_whole_segments(tmp_path: Path) -> None:
    """Remembered steps alone, as many as a segment has: two layers see back two segments, exactly."""
    torch.manual_seed(0)
    segment = 8
    model = tbptt.models.SegmentTransformer(1, 2, 8, heads=2, layers=2, memory=segment, segment=segment).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(-1)

    monitor = tbptt.LagCurves(model, loss, numbers(300), tmp_path / "l.jsonl", every=1, max_lag=40)
    assert monitor.steps == 2 * 40 + 16
    monitor.begin(Plan(0, None, 3))
    monitor.update(update(1))
    monitor.end()
    (line,) = lines_of(monitor.path)
    assert line["lags"] == [8, 16, 24, 32, 40]
    assert [norm > 0 for norm in line["norms"]] == [True, True, False, False, False]
    with pytest.raises(ConfigError, match=r"^max_lag in multiples of the segments of 8 steps") as refused:
        tbptt.LagCurves(model, loss, numbers(300), tmp_path / "l.jsonl", max_lag=20)
    assert refused.value.fix == "max_lag=24"


def test_the_needed_lookback_is_told_or_left_open(tmp_path: Path) -> None:
    def needed(factor: float, max_lag: int) -> int | None:
        return curve(tmp_path, Leaky(factor), max_lag)["needed_lookback"]

    # phi_k = a^k asks for ln 0.1 / ln a steps: 4, and 22; lag 0, which cannot be seen, is taken to be lag 1: one more
    assert needed(0.5, 16) in (4, 5)
    assert needed(0.9, 64) in (22, 23)
    assert needed(0.9, 16) is None  # not among the lags measured
    assert needed(1.0, 16) is None
    assert needed(0.0, 16) is None  # nothing arrives at all


def test_a_piece_without_targets_has_no_norms(tmp_path: Path) -> None:
    line = curve(tmp_path, Leaky(0.5), stream=numbers(200, mask=torch.zeros(600, dtype=torch.bool)))
    assert (line["norms"], line["needed_lookback"]) == (None, None)


class Counting(Model):
    """A model with everything that could be changed: dropout, a buffer that counts, batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        self.calls += 1
        return super().forward(self.norm(inputs.transpose(1, 2)).transpose(1, 2), state)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(tmp_path: Path, training: bool) -> None:
    def run(monitors: list[tbptt.Monitor], model: nn.Module) -> tbptt.Trainer:
        made = trainer(None, monitors=monitors, model=model.train(training))
        with nullcontext() if training else pytest.warns(AlarmWarning, match="eval mode"):
            made.run(updates=12)
        return made

    plain, measured = Counting(), Counting()
    run([], plain)
    after = random_state()
    monitor = tbptt.LagCurves(measured, nn.MSELoss(), stream(seed=2), tmp_path / "l.jsonl", every=1, max_lag=8)
    run([monitor], measured)
    assert all(torch.equal(a, b) for a, b in zip(after["torch"], random_state()["torch"], strict=True))
    assert str(after) == str(random_state())
    assert len(lines_of(monitor.path)) == 12
    for (name, one), other in zip(plain.state_dict().items(), measured.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert measured.calls > 0
    assert {each.training for each in measured.modules()} == {True}  # as the trainer put it
    assert all(parameter.grad is not None for parameter in measured.parameters())  # the training's own are there still


def test_the_comparison_sees_a_measure_that_draws(tmp_path: Path) -> None:
    """The negative control of the above."""

    class Draws(tbptt.Monitor):
        def update(self, update: Update) -> None:
            torch.rand(1)

    plain, other = Counting(), Counting()
    trainer(None, model=plain).run(updates=12)
    trainer(None, model=other, monitors=[Draws()]).run(updates=12)
    assert not torch.equal(plain.head.weight, other.head.weight)


@pytest.mark.parametrize("stops", [[1, 9], [3, 14, 15], [26]], ids=str)
def test_a_run_in_pieces_has_the_file_of_a_run_in_one(tmp_path: Path, stops: list[int]) -> None:
    def run(name: str, updates: int) -> None:
        model = Model()
        path = tmp_path / f"{name}.jsonl"
        lags = tbptt.LagCurves(model, nn.MSELoss(), stream(seed=2), path, every=3, max_lag=8)
        trainer(tmp_path / name, model=model, monitors=[lags]).run(updates=updates)

    run("one", 40)
    for updates in stops:
        run("pieces", updates)
        if updates > 4 and updates % 4:  # as after a kill: the newest checkpoint was never written
            shutil.rmtree(sorted((tmp_path / "pieces" / "checkpoints").iterdir())[-1])
    run("pieces", 40)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "pieces.jsonl").read_bytes()
    lines = lines_of(tmp_path / "one.jsonl")
    assert [line["update"] for line in lines] == list(range(3, 41, 3))
    # 101 steps a pass are three pieces of 32: the fourth line begins anew, and sees other weights
    assert len({tuple(line["norms"]) for line in lines}) == len(lines)


def test_each_line_reads_on_and_begins_anew_at_the_end_of_a_pass(tmp_path: Path) -> None:
    read: list[int] = []

    class Tells(tbptt.Stream):
        lanes = 3

        def __init__(self) -> None:
            self.inner = numbers(100)

        def read(self, steps: int) -> tbptt.Window:
            window = self.inner.read(steps)
            read.append(window.start)
            return window

        def rewind(self) -> None:
            self.inner.rewind()

        def state_dict(self) -> dict[str, Any]:
            return self.inner.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.inner.load_state_dict(state)

    monitor = tbptt.LagCurves(Leaky(0.5), absolute, Tells(), tmp_path / "l.jsonl", every=1, max_lag=8)
    monitor.begin(Plan(0, None, 3))
    read.clear()
    for number in range(1, 6):
        monitor.update(update(number))
    monitor.end()
    assert read == [0, 32, 64, 96, 0, 32]  # at 96 there were too few


def test_a_stream_that_is_too_short_is_refused_at_once(tmp_path: Path) -> None:
    monitor = tbptt.LagCurves(Leaky(0.5), absolute, numbers(50), tmp_path / "l.jsonl", max_lag=18)
    with pytest.raises(ConfigError, match=r"at least 52 steps.*has 50[\s\S]*max_lag=17"):
        monitor.begin(Plan(0, None, 3))
    fits = tbptt.LagCurves(Leaky(0.5), absolute, numbers(50), tmp_path / "l.jsonl", max_lag=17)
    fits.begin(Plan(0, None, 3))
    fits.end()


@pytest.mark.parametrize("setting", [{"every": 0}, {"every": True}, {"max_lag": 0}, {"max_lag": 2.5}])
def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        tbptt.LagCurves(Leaky(0.5), absolute, numbers(50), tmp_path / "l.jsonl", **setting)
