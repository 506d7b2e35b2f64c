"""The stability file: each number recomputed by a plain loop, and the file of a resumed run the undisturbed one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Model, lines_of, stream, trainer
from torch import Tensor, nn

import tbptt
from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate
from tbptt.monitors.base import Alarm, Plan, Update
from tbptt.monitors.readings import movement, read_state, state_norm


class Watches(tbptt.Monitor):
    """Keeps copies of all that the numbers are made of."""

    def __init__(self) -> None:
        self.weights: list[dict[str, list[float]]] = []
        self.states: list[list[list[float]]] = []
        self.gradients: list[dict[str, list[float]]] = []
        self.scales: list[float] = []
        self.boundaries: list[list[float]] = []

    def begin(self, plan: Plan) -> None:
        self.weights.append(flat(plan.weights))

    def update(self, update: Update) -> None:
        self.weights.append(flat(update.weights))
        self.states.append([leaf.flatten().tolist() for leaf in update.state])
        self.gradients.append(flat(update.estimate.gradients))
        self.scales.append(update.estimate.metrics.get("clip_scale", 1.0))
        self.boundaries.append(update.estimate.boundary_norms.tolist())


def flat(named: Any) -> dict[str, list[float]]:
    return {name: value.detach().flatten().tolist() for name, value in named.items()}


def norm(numbers: list[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number * number
    return math.sqrt(total)


def whole(named: dict[str, list[float]]) -> list[float]:
    return [number for values in named.values() for number in values]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("clip", [[], [tbptt.ClipNorm(0.05)]], ids=["unclipped", "clipped"])
def test_every_number_is_that_of_a_plain_loop(tmp_path: Path, every: int, clip: list[tbptt.Guard]) -> None:
    seen, rate = Watches(), 0.3
    file = tbptt.StabilityFile(tmp_path / "s.jsonl", every)
    estimator = tbptt.TBPTT(4, 12, replay="retain")
    trainer(None, estimator, monitors=[seen, file], guards=clip, rate=rate, model=Model(0.0), stream=stream(400)).run(
        updates=30
    )
    lines = lines_of(file.path)
    assert [line["update"] for line in lines] == list(range(every, 31, every))
    mean, norms = None, []
    for count, line in enumerate(lines):
        index = line["update"] - 1
        state = [number for leaf in seen.states[index] for number in leaf]
        state_norm_ = norm(state) / math.sqrt(len(state))
        assert line["state_norm"] == pytest.approx(state_norm_, rel=1e-12)
        drift = line["state_drift"]
        assert drift is None if mean is None else drift == pytest.approx(state_norm_ / mean - 1, abs=1e-12)
        norms.append(state_norm_)
        mean = sum(norms) / len(norms) if count < 10 else 0.9 * mean + 0.1 * state_norm_
        bounded = [leaf for leaf in seen.states[index] if all(-1 <= number <= 1 for number in leaf)]
        values = [number for leaf in bounded for number in leaf]
        assert line["saturated"] == sum(abs(number) > 0.97 for number in values) / len(values)
        # Plain SGD moves the weights by rate times gradient, which is known without looking at them.
        gradients, before = seen.gradients[index], seen.weights[index]
        moved = rate * norm(whole(gradients))
        assert line["update_ratio"] == pytest.approx(moved / norm(whole(before)), rel=1e-4)
        ratios = {name: rate * norm(gradients[name]) / norm(before[name]) for name in before}
        assert line["largest_update"] == max(ratios, key=lambda name: ratios[name])
        assert line["largest_update_ratio"] == pytest.approx(max(ratios.values()), rel=1e-4)
        assert line["gradient_norm"] == pytest.approx(norm(whole(gradients)) / seen.scales[index], rel=1e-4)
        assert line["boundary_norms"] == seen.boundaries[index]
        assert (line["steps"], line["rate_factor"]) == (4, 1.0)
        in_pass = (line["update"] - 1) % 25 + 1  # a pass has 25 windows, and begins anew in all lanes
        assert line["lookback"] == min(12, 4 * in_pass)
        assert len(line["boundary_norms"]) == min(2, in_pass - 1)
    assert min(seen.scales) < 1 if clip else min(seen.scales) == 1


def test_the_loop_would_see_a_copy_that_is_an_update_too_old() -> None:
    """The negative control of the above: weights of two updates before give another ratio."""
    seen = Watches()
    trainer(None, monitors=[seen], rate=0.3, model=Model(0.0)).run(updates=6)
    tensors = [{name: torch.tensor(value) for name, value in each.items()} for each in seen.weights]
    right = movement(tensors[4], tensors[5]).ratio
    wrong = movement(tensors[3], tensors[5]).ratio
    assert right is not None
    assert wrong is not None
    assert abs(wrong / right - 1) > 0.1


def test_saturation_counts_only_what_is_bounded() -> None:
    state = {
        "h": torch.tensor([[0.98, -0.99, 0.5], [0.969, 1.0, -0.2]]),  # 3 of 6
        "c": torch.tensor([3.0, 0.99, 0.98]),  # not bounded
        "one": torch.tensor([-1.0, 0.0], dtype=torch.float64),  # 1 of 2
        "count": torch.tensor([1, 1, 1]),  # no values
        "none": None,
        "empty": torch.zeros(0),
    }
    reading = read_state(state)
    assert reading.saturated == 4 / 8
    values = [*state["h"].flatten().tolist(), 3.0, 0.99, 0.98, -1.0, 0.0]
    assert reading.norm == pytest.approx(norm(values) / math.sqrt(len(values)), rel=1e-7)
    assert state_norm(state) == pytest.approx(reading.norm, rel=1e-12)
    assert read_state({"c": torch.tensor([3.0])}).saturated is None
    for nothing in (None, (), torch.zeros(0), torch.tensor([1, 2])):
        assert (read_state(nothing).norm, read_state(nothing).saturated, state_norm(nothing)) == (None, None, None)


def test_a_norm_beyond_float32_is_measured_and_what_is_no_number_is_said(tmp_path: Path) -> None:
    huge = torch.full((3, 2), 3e30)
    assert state_norm(huge) == pytest.approx(3e30, rel=1e-6)
    assert state_norm(torch.tensor([3 + 4j])) == pytest.approx(5.0)
    file = tbptt.StabilityFile(tmp_path / "s.jsonl", 1)
    file.begin(Plan(0, None, 2, {"w": torch.zeros(2), "b": torch.ones(2)}))
    file.update(update_of(1, torch.ones(2, 2)))
    file.update(update_of(2, torch.tensor([math.nan, 1.0]), weights={"w": torch.tensor([math.inf, 0.0])}))
    file.update(update_of(3, torch.ones(2, 2) * 3))
    file.end()
    first, second, third = lines_of(file.path)
    assert (first["update_ratio"], first["largest_update"]) == (0.0, "b")  # w has no norm to be relative to
    assert (second["state_norm"], second["state_drift"], second["saturated"]) == ("nan", "nan", None)
    assert (second["update_ratio"], second["largest_update_ratio"]) == (None, None)  # of norm 0 before
    assert third["state_drift"] == pytest.approx(2.0)  # what was no number is not in the mean


def update_of(number: int, state: Any, **changes: Any) -> Update:
    gradients = {"w": torch.tensor([3.0, 4.0])}
    zero = torch.tensor(0.0)
    estimate = Estimate(None, zero, zero, 1, gradients, 8, torch.zeros(0), 1, changes.get("metrics", {}))
    weights: dict[str, Tensor] = changes.get("weights", {"w": torch.zeros(2), "b": torch.ones(2)})
    return Update(number, 0, 8 * number, 8, 4, estimate, True, 0.1, state=state, weights=weights)


def test_the_parameter_that_moved_most_is_named() -> None:
    before = {
        "still": torch.ones(4),
        "most": torch.tensor([0.3, 0.4]),
        "much": torch.tensor([[5.0]]),
        "new": torch.zeros(1),
    }
    after = {"most": before["most"] * 1.5, "much": torch.tensor([[7.0]]), "still": torch.ones(4), "new": torch.ones(1)}
    found = movement(before, after)
    assert (found.largest, found.parameter) == (pytest.approx(0.5), "most")
    assert found.ratio == pytest.approx(norm([0.15, 0.2, 2.0, 1.0]) / norm([1.0, 1.0, 1.0, 1.0, 0.3, 0.4, 5.0]))


def test_a_refused_update_moves_nothing(tmp_path: Path) -> None:
    class Refuses(tbptt.Guard):
        def __call__(self, estimate: Estimate) -> None:
            del estimate  # whatever it is

    file = tbptt.StabilityFile(tmp_path / "s.jsonl", 1)
    trainer(None, guards=[Refuses()], monitors=[file]).run(updates=3)
    assert [line["update_ratio"] for line in lines_of(file.path)] == [0.0, 0.0, 0.0]


ADAPTIVE = tbptt.TBPTT(k1=4, k2=tbptt.Adaptive(max=16, every=5))
RAMP = tbptt.TBPTT(k1=tbptt.Ramp(2, 8, over=20), k2=tbptt.RandomLength(8, scale_rate="linear"))


def test_lengths_that_change_are_told_where_they_do(tmp_path: Path) -> None:
    seen: list[tuple[int, dict[str, float]]] = []

    class Keeps(tbptt.Monitor):
        def update(self, update: Update) -> None:
            seen.append((update.number, update.estimate.metrics))

    file = tbptt.StabilityFile(tmp_path / "s.jsonl", 2)
    trainer(None, ADAPTIVE, monitors=[file, Keeps()]).run(updates=40)
    probes = [(number, metrics) for number, metrics in seen if "needed_lookback" in metrics]
    lengths = lines_of(file.path, "length")
    assert len(lengths) == len(probes) > 4
    for line, (number, metrics) in zip(lengths, probes, strict=True):
        assert line == {
            "kind": "length",
            "update": number,
            "k1": metrics["k1"],
            "k2": metrics["k2"],
            "needed_lookback": metrics["needed_lookback"],
            "decay_rate": metrics["decay_rate"],
        }
    stability = lines_of(file.path, "stability")
    by_number = dict(seen)
    assert [(line["k1"], line["k2"]) for line in stability] == [
        (by_number[line["update"]]["k1"], by_number[line["update"]]["k2"]) for line in stability
    ]
    assert len({line["k2"] for line in stability}) > 1
    factors = tbptt.StabilityFile(tmp_path / "r.jsonl", 1)
    trainer(None, RAMP, monitors=[factors]).run(updates=20)
    assert len({line["rate_factor"] for line in lines_of(factors.path)}) > 1
    assert lines_of(factors.path, "length") == []


@pytest.mark.parametrize(
    "estimator",
    [tbptt.TBPTT(8, 13), tbptt.TBPTT(4, 12, replay="retain"), ADAPTIVE, RAMP],
    ids=["8-13", "4-12", "A", "R"],
)
@pytest.mark.parametrize("stops", [[1, 9], [2, 3, 19, 20], [14, 26, 29, 30]], ids=str)
def test_a_run_in_pieces_has_the_file_of_a_run_in_one(tmp_path: Path, estimator: tbptt.TBPTT, stops: list[int]) -> None:
    def run(name: str, updates: int) -> None:
        often = tbptt.StabilityFile(tmp_path / f"{name}.jsonl", every=3)
        trainer(tmp_path / name, estimator, monitors=[often]).run(updates=updates)

    run("one", 44)
    for updates in stops:
        torch.manual_seed(updates)  # whatever was drawn meanwhile must not matter
        run("pieces", updates)
        if updates > 4 and updates % 4:  # as after a kill: the newest checkpoint was never written
            shutil.rmtree(sorted((tmp_path / "pieces" / "checkpoints").iterdir())[-1])
    run("pieces", 44)
    for one, pieces in (("one.jsonl", "pieces.jsonl"), ("one/stability.jsonl", "pieces/stability.jsonl")):
        assert (tmp_path / one).read_bytes() == (tmp_path / pieces).read_bytes()
    assert [line["update"] for line in lines_of(tmp_path / "one" / "stability.jsonl", "stability")] == [10, 20, 30, 40]


def test_without_what_it_remembers_the_file_would_be_another(tmp_path: Path) -> None:
    file = tbptt.StabilityFile(tmp_path / "s.jsonl", every=1)
    run = trainer(None, monitors=[file])
    run.run(updates=6)
    state = json.loads(json.dumps(file.state_dict()))
    assert state["count"] == 6
    file.load_state_dict(state | {"mean": 0.0, "count": 0})
    run.run(updates=7)
    assert lines_of(file.path)[-1]["state_drift"] is None


def test_every_update_has_a_ratio_with_which_it_begins_and_no_copy_outlives_it(tmp_path: Path) -> None:
    file = tbptt.StabilityFile(tmp_path / "s.jsonl", every=1)
    trainer(None, monitors=[file]).run(updates=2)
    assert all(line["update_ratio"] > 0 for line in lines_of(file.path))
    rare = tbptt.StabilityFile(tmp_path / "r.jsonl", every=5)
    copies: list[int] = []

    class Counts(tbptt.Monitor):
        def update(self, update: Update) -> None:
            copies.append(len(rare._before))

    trainer(None, monitors=[rare, Counts()]).run(updates=12)
    assert [bool(count) for count in copies] == [number % 5 == 4 for number in range(1, 13)]
    assert not rare._before


def test_what_it_hears_is_written(tmp_path: Path) -> None:
    file = tbptt.StabilityFile(tmp_path / "s.jsonl")
    file.begin(Plan(0, None, 1))
    file.alarm(Alarm("stalled", 70, "a loss that falls was expected", "k2=8"))
    file.end()
    assert lines_of(file.path) == [
        {
            "kind": "alarm",
            "update": 70,
            "name": "stalled",
            "message": "a loss that falls was expected",
            "fix": "k2=8",
        }
    ]


def test_an_update_that_is_kept_keeps_neither_weights_nor_state() -> None:
    kept = update_of(1, torch.ones(2)).to_keep()
    assert (kept.state, dict(kept.weights), kept.estimate.gradients) == (None, {}, {})
    assert kept.gradient_norm() == 5.0


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "3"])
def test_every_is_checked(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ConfigError, match="every"):
        tbptt.StabilityFile(tmp_path / "s.jsonl", every)


def test_a_stateless_model_has_no_state_to_measure(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)

        def forward(self, inputs: Tensor, state: None = None) -> tuple[Tensor, None]:
            return self.head(inputs), state

    file = tbptt.StabilityFile(tmp_path / "s.jsonl", 1)
    trainer(None, tbptt.TBPTT(4, 4), monitors=[file], model=Flat(), stream=stream()).run(updates=2)
    for line in lines_of(file.path):
        assert (line["state_norm"], line["state_drift"], line["saturated"]) == (None, None, None)
