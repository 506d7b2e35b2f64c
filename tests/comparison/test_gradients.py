"""Gradients at matched points, against closed forms and against plain autograd that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, ArrayStream, Choice, Estimator, SyntheticGradients
from tbptt.comparison import Comparison, compare
from tbptt.models import InfluenceBalancingModel
from tbptt.streams import InfluenceBalancing
from tbptt.testing import influence_sums

T, B, D, H = 72, 2, 2, 3
BURN_IN, SPAN, POINTS = 24, 12, 4


def to_one(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square()


@pytest.fixture(scope="module")
def influence() -> Comparison:
    estimators = [TBPTT(1, k2) for k2 in (1, 10, 41, 50)] + [TBPTT(4, 500)]
    stream = InfluenceBalancing(dtype=torch.float64)
    model = InfluenceBalancingModel().double()
    return compare(estimators, model, stream, loss=to_one, points=2, span=4, burn_in=120)


def test_influence_balancing_in_closed_form(influence: Comparison) -> None:
    sums = influence_sums(50)
    for row, k2 in zip(influence.rows, (1, 10, 41, 50), strict=False):
        assert row.relative_bias == pytest.approx(abs(sums[k2 - 1] + 6) / 6, abs=1e-6), row.name
        assert row.relative_variance == 0.0
        assert row.cosine == pytest.approx(-1.0 if sums[k2 - 1] > 0 else 1.0, abs=1e-12)
        assert row.lookback == k2
    assert influence.rows[-1].relative_bias < 1e-10
    assert influence.reference_steps == 120
    assert not any(row.failed for row in influence.rows)


def test_a_reference_that_goes_back_less_hides_what_lies_farther() -> None:
    """The negative control of the above: with 8 steps before it the reference itself has the wrong sign."""
    found = compare(
        [TBPTT(1, 8)],
        InfluenceBalancingModel().double(),
        InfluenceBalancing(dtype=torch.float64),
        loss=to_one,
        points=2,
        span=4,
        burn_in=120,
        longest=8,
    )
    assert found.rows[0].cosine == pytest.approx(1.0)
    assert found.reference_steps == 8
    assert "longest=8" in found.notes[0]


class Data:
    """A recording of T steps in B lanes, with masked targets and resets, and an LSTM."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.LSTM(D, H).double()
        with torch.no_grad():
            for value in self.model.parameters():
                value.mul_(2.0)  # longer memory
        self.inputs = torch.randn(T, B, D, dtype=torch.float64)
        self.targets = torch.randn(T, B, H, dtype=torch.float64)
        self.mask = torch.rand(T, B) < 0.6
        self.reset = torch.rand(T, B) < 0.03

    def stream(self) -> ArrayStream:
        def rows(values: Tensor) -> Tensor:
            return values.transpose(0, 1).flatten(0, 1)

        given = [rows(each) for each in (self.inputs, self.targets, self.mask, self.reset)]
        return ArrayStream(given[0], given[1], lanes=B, mask=given[2], reset=given[3])

    def gradient(self, runs: list[tuple[int, int, int]]) -> Tensor:
        """The gradient of sum / count of the losses in [first, end) of each run, cut before its `start`."""
        parameters = list(self.model.parameters())
        total, count = torch.zeros((), dtype=torch.float64), 0
        for start, first, end in runs:
            h = c = torch.zeros(1, B, H, dtype=torch.float64)
            for t in range(end):
                if t == start:
                    h, c = h.detach(), c.detach()
                h, c = (torch.where(self.reset[t][None, :, None], 0.0, each) for each in (h, c))
                y, (h, c) = self.model(self.inputs[t : t + 1], (h, c))
                if t >= first:
                    losses = (y[0] - self.targets[t]).square().mean(-1)
                    total = total + losses[self.mask[t]].sum()
                    count += int(self.mask[t].sum())
        found = torch.autograd.grad(total / count, parameters)
        return torch.cat([each.flatten() for each in found])


def spans() -> list[tuple[int, int]]:
    return [(BURN_IN + each * SPAN, BURN_IN + (each + 1) * SPAN) for each in range(POINTS)]


def look_backs(begin: int, end: int, k1: int, k2: int) -> list[tuple[int, int, int]]:
    """Start of the look-back, first loss and end of each window of a span, for k2 >= k1."""
    cuts = [*range(begin, end, k1), end]
    return [(max(0, last - k2) if k2 > k1 else first, first, last) for first, last in pairwise(cuts)]


def measured(data: Data, *estimators: Estimator, **settings: Any) -> Comparison:
    sizes: dict[str, Any] = {"points": POINTS, "span": SPAN, "burn_in": BURN_IN}
    return compare(list(estimators), data.model, data.stream(), loss=nn.MSELoss(), **(sizes | settings))


@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (4, 6), (5, 9), (1, 3)])
def test_an_lstm_against_plain_autograd(k1: int, k2: int) -> None:
    data = Data()
    row = measured(data, TBPTT(k1, k2)).rows[0]
    full = torch.stack([data.gradient([(0, begin, end)]) for begin, end in spans()])
    cut = torch.stack([data.gradient(look_backs(begin, end, k1, k2)) for begin, end in spans()])
    error = cut - full
    assert row.relative_bias == pytest.approx(float(error.mean(0).norm() / full.mean(0).norm()), rel=1e-9)
    assert row.mean_relative_error == pytest.approx(float(error.norm() / full.norm()), rel=1e-9)
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(cut, full, dim=1).mean()), abs=1e-12)
    assert row.relative_bias > 1e-3
    wrong = torch.stack([data.gradient(look_backs(begin, end, k1, k2 + 1)) for begin, end in spans()]) - full
    assert row.mean_relative_error != pytest.approx(float(wrong.norm() / full.norm()), rel=1e-3)


def test_a_mean_of_unequal_means_would_be_another_figure() -> None:
    """The negative control of the weights: windows with few targets count less."""
    data = Data()
    row = measured(data, TBPTT(4, 4)).rows[0]
    full = torch.stack([data.gradient([(0, begin, end)]) for begin, end in spans()])
    means = [
        torch.stack([data.gradient([each]) for each in look_backs(begin, end, 4, 4)]).mean(0) for begin, end in spans()
    ]
    error = torch.stack(means) - full
    assert row.mean_relative_error != pytest.approx(float(error.norm() / full.norm()), rel=1e-3)


def test_a_look_back_over_everything_has_no_bias() -> None:
    found = measured(Data(), TBPTT(4, 500), TBPTT(5, 500), TBPTT(4, 500, replay="retain"))
    assert all(row.relative_bias < 1e-10 for row in found.rows)
    assert all(row.mean_relative_error < 1e-10 for row in found.rows)
    assert all(row.cosine == pytest.approx(1.0, abs=1e-12) for row in found.rows)
    limited = measured(Data(), TBPTT(4, 500), longest=1)
    assert limited.reference_steps == SPAN  # in whole spans
    assert limited.rows[0].relative_bias > 1e-6


def test_no_burn_in_compares_from_the_first_step_on() -> None:
    found = measured(Data(), TBPTT(4, 500), burn_in=0, points=2)
    assert found.reference_steps == 0
    assert found.rows[0].mean_relative_error < 1e-10


def test_an_unbiased_estimator_is_found_to_be_one_and_its_variance_measured(fake: Callable[..., Any]) -> None:
    exact = TBPTT(SPAN, 500)
    found = compare(
        {"unbiased": fake(exact, deviation=0.5), "biased": fake(exact, mean=0.7, deviation=0.1), "exact": fake(exact)},
        (data := Data()).model,
        data.stream(),
        loss=nn.MSELoss(),
        points=POINTS,
        span=SPAN,
        burn_in=BURN_IN,
        repeats=30,
    )
    unbiased, biased, same = found.rows
    assert unbiased.bias_low == 0.0
    assert unbiased.bias_high < 0.2
    assert unbiased.relative_variance == pytest.approx(0.25, rel=0.25)
    assert biased.bias_low <= 0.3 <= biased.bias_high
    assert biased.bias_low > 0.1
    assert biased.relative_variance == pytest.approx(0.01, rel=0.25)
    assert same.relative_bias < 1e-10
    assert same.relative_variance == 0.0


def test_seeds_among_the_settings_are_drawn_anew_in_each_repeat() -> None:
    found = measured(Data(), TBPTT(4, Choice([4, 500], seed=5)), TBPTT(4, 4))
    mixed, short = found.rows
    assert mixed.relative_variance > 0
    assert mixed.relative_bias < short.relative_bias
    assert 4 < mixed.lookback < 60
    assert any("change" in note for note in found.notes)


def test_only_the_tail_of_long_windows_is_what_their_estimates_are_made_of() -> None:
    """With k2 < k1 the first losses of a window are not learned from: that counts as bias."""
    data = Data()
    row = measured(data, TBPTT(12, 4)).rows[0]
    full = torch.stack([data.gradient([(0, begin, end)]) for begin, end in spans()])
    cut = torch.stack([data.gradient([(end - 4, end - 4, end)]) for _, end in spans()])
    assert row.mean_relative_error == pytest.approx(float((cut - full).norm() / full.norm()), rel=1e-9)


def test_spans_without_a_target_are_left_out_and_said_so() -> None:
    data = Data()
    begin, end = spans()[1]
    data.mask[begin:end] = False
    found = measured(data, TBPTT(4, 6))
    kept = [each for each in spans() if each != (begin, end)]
    full = torch.stack([data.gradient([(0, *each)]) for each in kept])
    cut = torch.stack([data.gradient(look_backs(*each, 4, 6)) for each in kept])
    assert found.rows[0].mean_relative_error == pytest.approx(float((cut - full).norm() / full.norm()), rel=1e-9)
    assert "1 of 4 points had no target" in found.notes[1]
    assert found.points == 3


def test_dropout_is_off_while_gradients_are_compared() -> None:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(2, 1, hidden=4, dropout=0.5).double()
    stream = ArrayStream(torch.randn(200, 2).double(), torch.randn(200).double(), lanes=2)
    found = compare([TBPTT(4, 500)], model, stream, loss=nn.MSELoss(), points=2, span=8, burn_in=8)
    assert found.rows[0].relative_bias < 1e-10
    assert found.rows[0].relative_variance == 0.0
    assert any("dropout off" in note for note in found.notes)
    assert model.training


def test_sizes_that_are_left_out_suit_all_estimators() -> None:
    stream = ArrayStream(torch.randn(4000, 2), torch.randn(4000, 3), lanes=2)
    model = nn.GRU(2, 3)
    found = compare([TBPTT(8, 8), TBPTT(12, 100)], model, stream, loss=nn.MSELoss(), points=2)
    assert found.span == 48
    assert found.reference_steps == 288  # in whole spans
    found = compare([TBPTT(7, 7), TBPTT(64, 200)], model, stream, loss=nn.MSELoss(), points=2)
    assert found.span == 64  # 7 * 64 would be too long
    assert found.reference_steps == 448
    assert compare([TBPTT(1, 4)], model, stream, loss=nn.MSELoss(), points=2).span == 32


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu() -> None:
    """cuDNN has no backward pass in eval mode: it is left out while gradients are compared."""
    torch.manual_seed(0)
    data = Data()
    data.model = data.model.cuda()
    found = measured(data, TBPTT(4, 4), TBPTT(4, 500))
    data.model = data.model.cpu()
    wanted = measured(data, TBPTT(4, 4))
    assert found.rows[0].relative_bias == pytest.approx(wanted.rows[0].relative_bias, rel=1e-6)
    assert found.rows[1].relative_bias < 1e-10


def test_a_fresh_predictor_is_truncation_and_a_trained_one_is_not_compared_itself() -> None:
    """Only the model's own weights count, whether it came with a predictor or not; and it stays as it came."""
    data, estimator = Data(), SyntheticGradients(4)
    names = list(data.model.state_dict())
    found = {}
    for attached in (False, True):
        if attached:
            estimator.attach(data.model, data.inputs[:2])
            with torch.no_grad():
                for value in data.model.get_submodule("synthetic_gradients").parameters():
                    value.normal_(std=0.3)
        rows = measured(data, TBPTT(4, 4), estimator).rows
        assert list(data.model.state_dict())[: len(names)] == names
        assert [row.failed for row in rows] == ["", ""]
        found[attached] = [row.relative_bias for row in rows]
    assert found[False][0] == found[True][0]
    assert found[False][1] == pytest.approx(found[False][0], rel=1e-9)
    assert abs(found[True][1] - found[True][0]) > 1e-3
