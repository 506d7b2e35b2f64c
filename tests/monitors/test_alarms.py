"""Each alarm rings in a run that deserves it, and in no healthy one; what it advises helps."""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Model, lines_of, rows, stream, trainer
from torch import Tensor, nn

import tbptt
from tbptt.cli.main import _show_warning
from tbptt.errors import AlarmWarning, CheckpointWarning, ConfigError
from tbptt.estimators.base import Estimate
from tbptt.monitors.alarms import KINDS
from tbptt.monitors.base import Alarm, Plan, Update


@pytest.fixture(autouse=True)
def _alarms_are_no_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AlarmWarning)
        yield


class Linear(nn.Module):
    """h <- W h + x: its gradient grows or decays by W, its state as well."""

    def __init__(self, radius: float, size: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(size, size))[0] * radius)
        self.head = nn.Linear(size, 1)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], len(self.mix)) if state is None else state
        outputs = []
        for step in inputs:
            state = state @ self.mix.T + step
            outputs.append(state)
        return self.head(torch.stack(outputs)), state


def alarms_of(alarms: tbptt.Alarms | None = None, updates: int = 200, **changes: Any) -> list[tuple[str, int]]:
    alarms = alarms or tbptt.Alarms()
    trainer(None, changes.pop("estimator", None), monitors=[alarms], **changes).run(updates=updates)
    return [(alarm.name, alarm.update) for alarm in alarms.raised]


def names(raised: list[tuple[str, int]]) -> set[str]:
    return {name for name, _ in raised}


# What rings, and what does not, each with its opposite.


def spiked(at: int, size: float) -> tbptt.ArrayStream:
    inputs, targets = rows(4000)
    targets[at] = size
    return tbptt.ArrayStream(inputs, targets, lanes=4)


def test_a_spike_of_the_gradient_rings_and_clipping_helps() -> None:
    settings: dict[str, Any] = {"estimator": tbptt.TBPTT(4, 4), "updates": 240, "rate": 1e-3}
    (only,) = alarms_of(stream=spiked(at=807, size=3e4), **settings)
    assert only == ("explosion", 210)  # step 807 of lane 0 is in update 202; seen at the next look
    assert alarms_of(stream=spiked(at=807, size=1.0), **settings) == []
    clipped = [tbptt.NonFinite("raise"), tbptt.ClipNorm(1.0)]
    assert alarms_of(stream=spiked(at=807, size=3e4), guards=clipped, **settings) == []


def test_the_advice_against_a_spike_is_to_clip_near_the_usual_norm() -> None:
    alarms, seen = tbptt.Alarms(), Norms()
    settings: dict[str, Any] = {"stream": spiked(at=807, size=3e4), "rate": 1e-3}
    trainer(None, tbptt.TBPTT(4, 4), monitors=[alarms, seen], **settings).run(updates=240)
    (alarm,) = alarms.raised
    usual = math.exp(sum(math.log(norm) for norm in seen.norms[:200]) / 200)
    advised = eval(alarm.fix.partition("=")[2], {"tbptt": tbptt})  # it is code
    assert advised[1].max_norm == pytest.approx(2 * usual, rel=0.5)


class Norms(tbptt.Monitor):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def update(self, update: Update) -> None:
        self.norms.append(update.gradient_norm() or math.nan)


@pytest.mark.parametrize("replay", ["recompute", "retain"])
def test_a_gradient_that_grows_on_its_way_back_rings(replay: Any) -> None:
    estimator = tbptt.TBPTT(4, 32, replay=replay)
    resets = stream_with_resets(every=64)  # else the state would overflow before
    grown = alarms_of(estimator=estimator, model=Linear(1.4), stream=resets, rate=0.0, updates=100)
    assert "explosion" in names(grown)
    assert alarms_of(estimator=estimator, model=Linear(1.0001), stream=resets, rate=0.0, updates=100) == []


def stream_with_resets(every: int) -> tbptt.ArrayStream:
    inputs, targets = rows(4096)
    reset = torch.zeros(4096, dtype=torch.bool)
    reset[::every] = True
    return tbptt.ArrayStream(inputs, targets, lanes=4, reset=reset)


def test_a_loss_that_has_risen_rings_and_one_that_is_noisy_does_not() -> None:
    def run(losses: list[float]) -> list[Alarm]:
        alarms = tbptt.Alarms()
        alarms.begin(Plan(0, None, 4))
        for number, loss in enumerate(losses, 1):
            alarms.update(update_of(number, loss=loss))
        return alarms.raised

    chance = random.Random(0)
    noisy = [2 * chance.random() for _ in range(2000)]
    (only,) = run(noisy[:1000] + [8 * loss for loss in noisy[1000:]])
    assert only.name == "explosion"
    assert 1000 < only.update <= 1200
    assert "risen from" in only.message
    assert run(noisy) == []
    assert run(noisy[:1000] + [2 * loss for loss in noisy[1000:]]) == []
    assert run([-1.0] * 100 + [-0.1] * 300) == []  # there is no "times" for what is below zero
    assert run([*noisy[:1000], 1e6, *noisy[1000:]]) == []  # one number wrong is no rise


class Flat(nn.Module):
    """A line through numbers of variance 1: plain SGD on the squared error diverges above a learning rate of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.slope * inputs, inputs[-1]


def test_a_learning_rate_that_is_too_large_rings() -> None:
    settings: dict[str, Any] = {"estimator": tbptt.TBPTT(16, 16), "updates": 300, "stream": stream(8000)}
    assert alarms_of(model=Flat(), rate=1.1, **settings)[0][0] == "explosion"
    assert names(alarms_of(model=Flat(), rate=0.3, **settings)) == set()


def test_a_look_back_that_nothing_reaches_the_end_of_rings_after_its_patience() -> None:
    alarms = tbptt.Alarms(patience=100)
    settings: dict[str, Any] = {"estimator": tbptt.TBPTT(2, 16), "rate": 1e-3, "updates": 200}
    (only,) = alarms_of(alarms, model=Linear(0.1), **settings)
    assert only == ("vanishing", 150)  # the level counts from the fifth look on
    assert "k2=tbptt.Adaptive(max=16)" in alarms.raised[0].fix
    assert alarms_of(model=Linear(0.1), **settings) == []  # the usual patience is longer
    assert alarms_of(tbptt.Alarms(patience=100), model=Linear(0.8), **settings) == []


def test_what_one_boundary_or_none_cannot_say_is_not_said() -> None:
    for estimator in (tbptt.TBPTT(16, 16), tbptt.TBPTT(8, 16), tbptt.TBPTT(16, 4, losses="all")):
        assert alarms_of(tbptt.Alarms(patience=20), estimator=estimator, model=Linear(0.1), rate=1e-3) == []


class Bursts(Model):
    """What is not a number comes into its outputs, or its state, from a marked step on."""

    def __init__(self, where: str) -> None:
        super().__init__(0.0)
        self.where = where

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, (h, c) = super().forward(inputs, state)
        burst = torch.where((inputs > 50).any(), torch.inf, 0.0)
        return (outputs + burst, (h, c)) if self.where == "outputs" else (outputs, (h, c + burst))


@pytest.mark.parametrize("where", ["outputs", "state"])
def test_what_is_no_number_rings_unless_it_is_refused_and_rare(where: str) -> None:
    def marked(*steps: int) -> tbptt.ArrayStream:
        inputs, targets = rows(4000)
        inputs[list(steps)] = 100.0
        return tbptt.ArrayStream(inputs, targets, lanes=4)

    settings: dict[str, Any] = {"estimator": tbptt.TBPTT(4, 4), "updates": 60}
    unguarded = alarms_of(model=Bursts(where), stream=marked(81), guards=[], **settings)
    assert unguarded[0] == ("non_finite", 30)  # in update 21
    skip = [tbptt.NonFinite("skip")]
    if where == "outputs":
        assert alarms_of(model=Bursts(where), stream=marked(81), guards=skip, **settings) == []
        often = range(80, 200, 8)  # every second update
        assert alarms_of(model=Bursts(where), stream=marked(*often), guards=skip, **settings) == [("non_finite", 40)]
    assert alarms_of(model=Bursts(where), stream=marked(), guards=[], **settings) == []


def test_a_loss_that_cannot_fall_rings_and_one_that_falls_does_not() -> None:
    still = alarms_of(tbptt.Alarms(stalled=300), updates=400, rate=0.0)
    assert names(still) == {"stalled"}
    assert 300 <= still[0][1] <= 400
    inputs, _ = rows(4000)
    echo = tbptt.ArrayStream(inputs, torch.roll(inputs, 1, 0), lanes=4)
    settings: dict[str, Any] = {"optimizer": torch.optim.Adam, "rate": 3e-3, "updates": 600, "model": Model(0.0)}
    assert alarms_of(tbptt.Alarms(stalled=300), stream=echo, **settings) == []


@pytest.mark.parametrize(("left", "rings"), [(1e-2, True), (1e-4, False)])
def test_a_loss_that_is_solved_is_not_stalled(left: float, rings: bool) -> None:
    alarms = tbptt.Alarms(watch=("stalled",), stalled=300)
    alarms.begin(Plan(0, None, 4))
    for number in range(1, 4001):
        alarms.update(update_of(number, loss=max(left, 0.98**number)))
    assert [alarm.name for alarm in alarms.raised] == (["stalled"] if rings else [])


def test_what_lasts_is_said_once_and_so_it_is_after_a_resume() -> None:
    alarms = tbptt.Alarms(watch=("stalled",), stalled=300)
    alarms.begin(Plan(0, None, 4))
    drive(alarms, {}, 2500)
    assert [alarm.update for alarm in alarms.raised] == [350]
    resumed = tbptt.Alarms(watch=("stalled",), stalled=300)
    resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    resumed.begin(Plan(2500, None, 4))
    drive(resumed, {}, 5000, first=2501)
    assert resumed.raised == alarms.raised


@pytest.mark.parametrize(("size", "rings"), [(1.0, True), (1e-3, False)])
def test_a_small_state_may_grow(size: float, rings: bool) -> None:
    """That of a model which learns to use it does, to about 1."""

    def run(norm: Callable[[int], float]) -> list[str]:
        alarms = tbptt.Alarms(watch=("drift",))
        alarms.begin(Plan(0, None, 4))
        for number in range(1, 2001):
            alarms.update(update_of(number, state=torch.full((4, 2), size * norm(number))))
        return [alarm.name for alarm in alarms.raised]

    expected = ["drift"] if rings else []
    assert run(lambda number: number) == expected  # by 2 in each doubling: to 1.6, or to 1600
    assert run(lambda number: 1e-2 if number < 500 else 5e3) == expected  # at once: to 5, or to 5000
    assert run(lambda number: 100.0) == []


@pytest.mark.parametrize(("leak", "rings"), [(1.0, True), (0.9999, True), (0.97, False)])
def test_a_state_that_only_adds_up_rings_and_one_that_settles_does_not(leak: float, rings: bool) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            state = inputs.new_zeros(inputs.shape[1:]) if state is None else state
            outputs = []
            for step in inputs:
                state = leak * state + step
                outputs.append(state)
            return self.head(torch.tanh(torch.stack(outputs))), state

    inputs, targets = rows(40_000)
    source = tbptt.ArrayStream(inputs + 0.5, targets, lanes=4)
    raised = alarms_of(estimator=tbptt.TBPTT(4, 4), model=Adds(), stream=source, rate=1e-3, updates=1700)
    assert raised == ([("drift", 1600)] if rings else [])


def test_a_state_that_explodes_rings_before_it_overflows() -> None:
    raised = alarms_of(estimator=tbptt.TBPTT(4, 4), model=Linear(1.02), stream=stream(8000), rate=0.0, updates=200)
    assert names(raised) == {"drift", "explosion"}


# How it is said.


def update_of(number: int, **changes: Any) -> Update:
    norm, loss = changes.get("norm", 1.0), torch.tensor(changes.get("loss", 1.0))
    metrics = {"gradient_norm": norm}
    estimate = Estimate(None, loss, loss, 1, {}, 8, torch.tensor(changes.get("boundaries", [])), 1, metrics)
    return Update(number, 0, 0, 4, 4, estimate, True, 0.1, state=changes.get("state"))


def drive(alarms: tbptt.Alarms, norms: dict[int, float], last: int, first: int = 1) -> None:
    for number in range(first, last + 1):
        alarms.update(update_of(number, norm=norms.get(number, 1.0)))


def test_the_same_is_said_once_and_again_when_it_was_over_and_has_cooled_down() -> None:
    alarms = tbptt.Alarms(watch=("explosion",))
    alarms.begin(Plan(0, None, 4))
    persisting = {number: 2e3 for number in range(101, 105)}
    drive(alarms, persisting | {300: 1e9, 1099: 1e12, 1199: 1e15, 3000: 1e18}, 3100)
    assert [alarm.update for alarm in alarms.raised] == [110, 1200, 3000]


def test_a_level_that_it_has_had_is_no_alarm_when_it_comes_again() -> None:
    alarms = tbptt.Alarms(watch=("explosion",))
    fell = {number: 1e-6 for number in range(200, 900)}  # it learned; then the data changed
    drive(alarms, fell, 1000)
    assert alarms.raised == []


def test_a_warning_says_what_was_expected_what_came_why_and_what_to_do() -> None:
    alarms = tbptt.Alarms(watch=("explosion",))
    with pytest.warns(AlarmWarning) as caught:
        drive(alarms, {205: 5000.0}, 220)
    (text,) = [str(each.message) for each in caught]
    assert text == str(alarms.raised[0])
    assert text.startswith(
        "explosion at update 210: a gradient norm near the highest level that it has had, 1, was exp"
    )
    assert "one of 5e+03 came" in text
    assert "undo" in text
    assert text.endswith('\nhint: guards=[tbptt.NonFinite("raise"), tbptt.ClipNorm(2)]')


def test_the_command_line_shows_it_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    alarm = Alarm("stalled", 70, "a loss that falls was expected, but it has not: why", "tbptt.TBPTT(k1=4, k2=8)")
    _show_warning(str(alarm), AlarmWarning, "x.py", 3)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: stalled at update 70: a loss that falls was expected, but it has not: why"
    assert second == "hint: tbptt.TBPTT(k1=4, k2=8)"
    _show_warning("text", CheckpointWarning, "x.py", 3)
    assert capsys.readouterr().err == "warning: text\n"
    _show_warning("text", UserWarning, "x.py", 3)
    assert "x.py:3" in capsys.readouterr().err


def test_the_trainers_own_alarms_reach_its_file_and_its_other_monitors(tmp_path: Path) -> None:
    heard: list[Alarm] = []

    class Hears(tbptt.Monitor):
        def alarm(self, alarm: Alarm) -> None:
            heard.append(alarm)

    settings: dict[str, Any] = {"stream": spiked(at=807, size=3e4), "rate": 1e-3}
    with pytest.warns(AlarmWarning, match="explosion at update 210"):
        trainer(tmp_path, tbptt.TBPTT(4, 4), monitors=[Hears()], **settings).run(updates=240)
    (line,) = lines_of(tmp_path / "stability.jsonl", "alarm")
    (alarm,) = heard
    assert line == {"kind": "alarm", "update": 210, "name": "explosion", "message": alarm.message, "fix": alarm.fix}
    all_lines = lines_of(tmp_path / "stability.jsonl")
    place = all_lines.index(line)
    assert (all_lines[place - 1]["kind"], all_lines[place - 1]["update"]) == ("stability", 210)
    silent = trainer(None, tbptt.TBPTT(4, 4), monitors=[tbptt.Alarms(watch=())], **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent.run(updates=240)
    assert sum(isinstance(monitor, tbptt.Alarms) for monitor in silent.monitors) == 1


@pytest.mark.parametrize("stops", [[205], [153, 203, 209, 231], [17, 190, 222]], ids=str)
def test_a_resumed_run_raises_the_same_alarms(tmp_path: Path, stops: list[int]) -> None:
    def run(name: str, updates: int) -> tbptt.Alarms:
        alarms = tbptt.Alarms(patience=100, stalled=40)
        source = spiked(at=407, size=1e5)
        made = trainer(
            tmp_path / name, tbptt.TBPTT(2, 16), model=Linear(0.1), monitors=[alarms], stream=source, rate=1e-4
        )
        made.run(updates=updates)
        return alarms

    whole = run("one", 260)
    assert names([(alarm.name, alarm.update) for alarm in whole.raised]) == {"explosion", "vanishing", "stalled"}
    for updates in stops:
        run("pieces", updates)
        if updates % 4:  # as after a kill: the newest checkpoint was never written
            shutil.rmtree(sorted((tmp_path / "pieces" / "checkpoints").iterdir())[-1])
    pieces = run("pieces", 260)
    assert pieces.raised == whole.raised
    assert json.dumps(pieces.state_dict()) == json.dumps(whole.state_dict())
    files = [(tmp_path / name / "stability.jsonl").read_bytes() for name in ("one", "pieces")]
    assert files[0] == files[1]
    assert len(lines_of(tmp_path / "one" / "stability.jsonl", "alarm")) == len(whole.raised)


def test_made_an_error_it_stops_the_run_with_a_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    def made(name: str) -> tbptt.Trainer:
        return trainer(tmp_path / name, tbptt.TBPTT(4, 4), stream=spiked(at=807, size=3e4), rate=1e-3)

    made("undisturbed").run(updates=240)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AlarmWarning)
        with pytest.raises(AlarmWarning, match="explosion at update 210"):
            made("stopped").run(updates=240)
    assert sorted((tmp_path / "stopped" / "checkpoints").iterdir())[-1].name == "update-0000000210"
    made("stopped").run(updates=240)
    for file in ("metrics.jsonl", "stability.jsonl"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes()


def test_a_new_run_forgets_an_earlier_one() -> None:
    alarms = tbptt.Alarms(watch=("explosion",))
    alarms.begin(Plan(0, None, 4))
    drive(alarms, {205: 5000.0}, 220)
    assert len(alarms.raised) == 1
    alarms.begin(Plan(0, None, 4))
    assert alarms.raised == []
    drive(alarms, {205: 5000.0}, 220)
    assert len(alarms.raised) == 1


def test_the_alarms_of_a_healthy_run_are_silent(tmp_path: Path) -> None:
    alarms = tbptt.Alarms()
    source = tbptt.streams.DelayedRecall(3, 8, symbols=4, steps=2000)
    model = tbptt.SequenceModel(4, 4, hidden=24, embedding=8)
    settings: dict[str, Any] = {"stream": source, "model": model, "loss": nn.CrossEntropyLoss(), "rate": 1e-2}
    estimator = tbptt.TBPTT(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(tmp_path, estimator, monitors=[alarms], optimizer=torch.optim.Adam, **settings)
        run.run(updates=800)
    assert alarms.raised == []
    last = lines_of(tmp_path / "metrics.jsonl", "update")[-1]
    assert last["loss"] < 0.2  # it was a run worth the name


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"watch": ("explosions",)}, "'explosions' came"),
        ({"watch": "drift"}, "kinds among"),
        ({"every": 0}, "every"),
        ({"explosion": 1.0}, "explosion .*above 1"),
        ({"explosion": math.nan}, "explosion"),
        ({"growth": 0}, "growth"),
        ({"vanishing": 1.0}, "vanishing .*above 0 and below 1"),
        ({"patience": 0}, "patience"),
        ({"stalled": True}, "stalled"),
        ({"drift": "1.3"}, "drift"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(setting: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tbptt.Alarms(**setting)


def test_each_kind_can_be_watched_for_alone() -> None:
    for kind in KINDS:
        assert [watch.name for watch in tbptt.Alarms(watch=(kind,)).watches] == [kind]
