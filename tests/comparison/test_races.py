"""The race: the same weights, the same data, and a clock of one's own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import tbptt
from tbptt import TBPTT, ArrayStream, ClipNorm, Estimate, Guard, HeldOut, NonFinite, RandomLength
from tbptt.comparison import Comparison, compare

STEPS = 300


def stream(seed: int = 0, rows: int = 2 * STEPS) -> ArrayStream:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 2, generator=generator)
    return ArrayStream(inputs, inputs.cumsum(0).sin()[:, 0], lanes=2)


def model() -> nn.Module:
    torch.manual_seed(0)
    return tbptt.SequenceModel(2, 1, hidden=6, dropout=0.3)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def raced(estimators: Any, **settings: Any) -> Comparison:
    usual: dict[str, Any] = {"loss": nn.MSELoss(), "optimizer": adam, "points": 2, "span": 8, "burn_in": 8}
    if "seconds" not in settings:
        usual["updates"] = 60
    return compare(estimators, settings.pop("model", model()), settings.pop("stream", stream()), **(usual | settings))


def without_clock(curve: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(curve).items() if "seconds" not in name}


def test_equal_estimators_have_equal_curves_bit_by_bit() -> None:
    """Same weights, same data, same dropout: only the clock may tell them apart."""
    found = raced({"a": TBPTT(8, 16), "b": TBPTT(8, 16), "other": TBPTT(8, 8)}, held_out=stream(1))
    a, b, other = (without_clock(found.curves[name]) for name in ("a", "b", "other"))
    assert a == b
    assert a["train_loss"] != other["train_loss"]
    assert a["updates"][0] == other["updates"][0] == 1
    assert a["updates"][-1] == 60
    assert len(a["validation_loss"]) == 10
    assert [row.updates for row in found.rows] == [60, 60, 60]


def test_a_race_is_what_the_trainer_does() -> None:
    """Also over the end of a pass, with guards, dropout and lengths that scale the learning rate."""
    estimator = TBPTT(RandomLength(12, deviation=2.0), 16)
    trained = model()
    given = stream(rows=600)
    trainer = tbptt.Trainer(
        trained,
        nn.MSELoss(),
        adam(trained.parameters()),
        estimator,
        given,
        guards=[NonFinite(), ClipNorm(0.1)],
        seed=4,
        held_out=HeldOut(stream(1), every=1000),
    )
    summary = trainer.run(updates=60)
    assert summary.passes >= 1
    found = raced({"it": estimator}, guards=[NonFinite(), ClipNorm(0.1)], seed=4, held_out=stream(1))
    assert found.rows[0].final_validation == summary.validation["loss"]
    other = raced({"it": estimator}, guards=[NonFinite(), ClipNorm(0.1)], seed=5, held_out=stream(1))
    assert other.rows[0].final_validation != summary.validation["loss"]


def test_the_training_curve_is_the_loss_over_all_updates_since_the_last_point() -> None:
    """Windows with few targets count less; 400 updates make 200 points."""
    mask = torch.rand(800, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.manual_seed(0)
    data = ArrayStream(torch.randn(800, 2).cumsum(0).sin(), torch.randn(800), lanes=2, mask=mask)
    start = tbptt.SequenceModel(2, 1, hidden=4)
    found = raced([TBPTT(2, 2)], model=start, stream=data, updates=400).curves["TBPTT(k1=2, k2=2)"]
    trained, sums, counts = copy.deepcopy(start), [], []
    optimizer, estimator = adam(trained.parameters()), TBPTT(2, 2)
    carry = estimator.init(trained, 2)
    while len(sums) < 400:
        for window in data.windows(2):
            estimate, carry = estimator.estimate(trained, nn.MSELoss(), carry, window)
            estimate.apply(trained)
            optimizer.step()
            sums.append(float(estimate.loss_sum))
            counts.append(estimate.num_terms)
    ends = [0, *found.updates]
    assert ends[-1] == 400
    assert 190 <= len(found.updates) <= 200  # one without a target waits for the next
    for (begin, end), loss in zip(pairwise(ends), found.train_loss, strict=True):
        assert loss == pytest.approx(sum(sums[begin:end]) / sum(counts[begin:end]), rel=1e-6)
    assert found.steps == [2 * each for each in found.updates]


def test_seconds_are_of_the_clock_of_each() -> None:
    found = raced([TBPTT(8, 8), TBPTT(8, 64)], seconds=0.6, held_out=stream(1), metrics={})
    for row in found.rows:
        curve = found.curves[row.name]
        assert curve.seconds == sorted(curve.seconds)
        assert 0.6 <= curve.seconds[-1] < 3.0  # the last update may take long on a busy machine
        assert curve.validation_seconds[-1] == curve.seconds[-1]
        assert curve.validation_updates[-1] == curve.updates[-1] == row.updates
        assert curve.steps[-1] == 8 * row.updates or curve.steps[-1] < 8 * row.updates  # a pass ends on a short one
        assert row.final_loss == curve.train_loss[-1]
        assert 2 <= len(curve.validation_loss) <= 10
    assert found.rows[0].updates > found.rows[1].updates


def test_one_that_fails_does_not_stop_the_others(fake: Callable[..., Any]) -> None:
    found = raced({"fails": fake(TBPTT(8, 8), fails_at=200), "goes on": TBPTT(8, 8)})
    fails, goes_on = found.rows
    assert fails.failed == "RuntimeError: the fake has failed"
    assert 0 < fails.updates < 60
    assert not goes_on.failed
    assert goes_on.updates == 60
    assert not math.isnan(fails.relative_bias)
    assert found.curves["fails"].train_loss == found.curves["goes on"].train_loss[: fails.updates]


def test_one_that_diverges_ends_there() -> None:
    class Blow(Guard):
        """Explodes the gradient at the tenth update."""

        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, estimate: Estimate) -> Estimate | None:
            self.seen += 1
            if self.seen < 10:
                return estimate
            return estimate.with_gradients({name: value * 1e38 for name, value in estimate.gradients.items()})

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e10)

    guard = Blow()
    found = raced({"a": TBPTT(8, 8), "b": TBPTT(8, 8)}, guards=[guard], optimizer=sgd, held_out=stream(1))
    for row in found.rows:
        assert row.failed.startswith("diverged: its loss")
        assert all(math.isfinite(each) for each in found.curves[row.name].train_loss)
        assert row.updates < 60
    assert guard.seen == 0  # each has copies of its own


def test_one_that_gives_no_gradient_has_a_row_and_an_empty_curve(fake: Callable[..., Any]) -> None:
    found = raced({"fails": fake(TBPTT(8, 8), fails_at=0), "goes on": TBPTT(8, 8)})
    assert found.rows[0].failed
    assert found.curves["fails"].updates == []
    assert math.isnan(found.rows[0].relative_bias)
    assert math.isnan(found.rows[0].seconds_per_step)
    with pytest.raises(RuntimeError, match="the fake has failed"):
        raced({"fails": fake(TBPTT(8, 8), fails_at=0)})


def test_metrics_are_measured_with_the_loss() -> None:
    class Half(tbptt.metrics.Metric):
        def start(self) -> None:
            pass

        def see(self, *seen: Any) -> None:
            pass

        def result(self) -> float:
            return 0.5

    found = raced([TBPTT(8, 8)], held_out=stream(1), metrics={"half": Half()})
    assert found.curves["TBPTT(k1=8, k2=8)"].validation_metrics == {"half": [0.5] * 10}
    assert found.tables()["validation"]["half"] == [0.5] * 10


def test_costs_are_of_the_look_back() -> None:
    found = raced([TBPTT(8, 8), TBPTT(8, 64)], burn_in=64)
    short, long = found.rows
    assert long.held_bytes > 4 * short.held_bytes > 0
    assert long.seconds_per_step > 1.3 * short.seconds_per_step > 0


def test_nothing_of_the_callers_is_touched() -> None:
    given, data, held_out, guard = model(), stream(), stream(1), ClipNorm(0.1)
    data.read(10)
    held_out.read(7)
    before = copy.deepcopy((given.state_dict(), data.state_dict(), held_out.state_dict(), torch.get_rng_state()))
    raced([TBPTT(8, 16)], model=given, stream=data, held_out=held_out, guards=[guard])
    after = given.state_dict(), data.state_dict(), held_out.state_dict(), torch.get_rng_state()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert all(value.grad is None and value.requires_grad for value in given.parameters())
    assert given.training
    with pytest.raises(tbptt.TbpttError):
        raced([TBPTT(8, 16)], stream=data, points=1000)
    assert data.state_dict() == before[1]
    assert torch.equal(before[3], torch.get_rng_state())
