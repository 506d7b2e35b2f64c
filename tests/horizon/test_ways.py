"""The lag curve through attention, memory and recurrence, told apart: against plain loops with the other ways cut."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.errors import ConfigError
from tbptt.horizon.samples import places, sample
from tbptt.horizon.sent import Place, Plan
from tbptt.loss import StepLoss
from tbptt.models import Attentive, SegmentTransformer
from tbptt.report import horizon_page

INPUTS, OUTPUTS, LANES = 3, 2, 3
SEGMENT, MEMORY, LAYERS = 4, 4, 2
K_ATT, SLOTS = 2, 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def shaken(model: nn.Module) -> Any:
    """No weight at its initial value, so that no part of a gradient is zero or lost in rounding."""
    model = model.double()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.2 * torch.randn_like(each))
    return model


def segments(**settings: Any) -> Any:
    given = {"heads": 2, "layers": LAYERS, "memory": MEMORY, "memory_tokens": 2, "segment": SEGMENT} | settings
    return shaken(SegmentTransformer(INPUTS, OUTPUTS, 8, **given))


def attentive() -> Any:
    return shaken(Attentive(nn.LSTM(INPUTS, OUTPUTS), k_att=K_ATT, k_top=2, memory=SLOTS))


# By model: what makes it, the steps of a piece, and which tensors of its state are which way.
MODELS: dict[str, tuple[Any, int, dict[str, Sequence[int]]]] = {
    "segments": (segments, SEGMENT, {"attention": (0, 1), "memory": (3,)}),
    "attentive": (attentive, 1, {"recurrence": (0, 1), "attention": (2,)}),
}
each_model = pytest.mark.parametrize("name", MODELS)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[..., :OUTPUTS] - targets).square().sum(-1)


def stream(steps: int = 2000) -> tbptt.ArrayStream:
    return tbptt.ArrayStream(torch.randn(steps, INPUTS).double(), torch.randn(steps, OUTPUTS).double(), lanes=LANES)


def flat(state: Any) -> list[Tensor]:
    """The tensors of a state in order, without the library's own trees."""
    if isinstance(state, Tensor):
        return [state]
    return [] if state is None else [leaf for each in state for leaf in flat(each)]


def rebuilt(state: Any, leaves: list[Tensor]) -> Any:
    if isinstance(state, Tensor):
        return leaves.pop(0)
    if state is None:
        return None
    parts = [rebuilt(each, leaves) for each in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def by_hand(
    model: nn.Module, place: Place, unit: int, part: Sequence[int], *, alone: bool
) -> tuple[dict[int, float], list[float]]:
    """Run in pieces and differentiate: norms at the part's tensors, and at the inputs, by lag; means over lanes.

    With `alone` all tensors but the part's are cut at each boundary.
    """
    steps = place.window.steps
    inputs = place.window.inputs.detach().requires_grad_()  # type: ignore[union-attr]
    state = rebuilt(place.state, [each.detach().clone() for each in flat(place.state)])
    at: dict[int, list[Tensor]] = {}
    outputs = torch.zeros(0)
    for begin in range(0, steps, unit):
        leaves = [
            each.requires_grad_() if begin == 0 and each.is_floating_point() else each.clone() for each in flat(state)
        ]
        at[steps - begin] = leaves
        given = [each.detach() if alone and index not in part else each for index, each in enumerate(leaves)]
        outputs, state = model(inputs[begin : begin + unit], rebuilt(state, given))
    targets = place.window.targets
    assert isinstance(targets, Tensor)
    loss = squares(outputs, targets[-unit:])[unit - 1 - place.early].sum()
    norms: dict[int, float] = {}
    for lag, leaves in at.items():
        chosen = [leaves[index] for index in part]
        found = torch.autograd.grad(loss, chosen, retain_graph=True, materialize_grads=True, allow_unused=True)
        norms[lag] = float(sum(each.flatten(1).square().sum(1) for each in found).sqrt().mean())  # type: ignore[union-attr]
    (arrived,) = torch.autograd.grad(loss, inputs)
    return norms, arrived.norm(dim=2).mean(1).flip(0).tolist()


def found_places(model: nn.Module, longest: int, unit: int, count: int = 2) -> list[Place]:
    draws = np.random.default_rng(0)
    return places(model, StepLoss.of(squares), stream(), longest, count, longest, draws, unit)


@each_model
def test_each_way_alone_and_all_that_crosses_are_those_of_plain_loops(name: str) -> None:
    make, unit, parts = MODELS[name]
    model, longest = make(), 24
    lags = tuple(range(unit, longest + 1, unit))
    found = found_places(model, longest, unit)
    seen = sample(model, StepLoss.of(squares), found, Plan(lags, (longest,), context=False, ways=tuple(parts)))
    for way, part in parts.items():
        for kind in ("crossing", "alone"):
            hands = [by_hand(model, place, unit, part, alone=kind == "alone") for place in found]
            wanted = [np.mean([norms[lag] for norms, _ in hands]) for lag in lags]
            assert getattr(seen.ways[way], kind).mean == pytest.approx(wanted, rel=1e-10, abs=1e-18), (way, kind)
            if kind == "alone":
                of_inputs = np.mean([arrived for _, arrived in hands], axis=0)
                of_inputs[:unit] = 0  # the newest piece, in which nothing has crossed
                assert seen.ways[way].inputs is not None
                assert seen.ways[way].inputs.mean == pytest.approx(of_inputs.tolist(), rel=1e-10, abs=1e-18)
        at_last = [getattr(seen.ways[way], kind).mean[-1] for kind in ("crossing", "alone")]
        assert at_last[0] != pytest.approx(at_last[1], rel=1e-3)  # the control: the two are not one


@each_model
def test_the_squares_of_the_ways_add_up_to_the_state(name: str) -> None:
    make, unit, parts = MODELS[name]
    model = make()
    found = found_places(model, 16, unit, count=1)
    lanes = [Place(place.window, place.state, place.dims, place.early) for place in found]
    plan = Plan(tuple(range(unit, 17, unit)), (16,), context=False, ways=tuple(parts))
    seen = sample(model, StepLoss.of(of_first_lane), lanes, plan)
    total = sum(np.square(way.crossing.mean) for way in seen.ways.values())
    assert np.sqrt(total) == pytest.approx(seen.state[0], rel=1e-12)


def of_first_lane(outputs: Tensor, targets: Tensor) -> Tensor:
    """Losses that are those of one lane, so that a mean of norms over lanes is a norm."""
    return squares(outputs, targets) * torch.tensor([1.0] + [0.0] * (LANES - 1), dtype=torch.float64)


def test_remembered_steps_alone_reach_as_far_as_layers_times_memory_and_not_a_step_farther() -> None:
    """Dai et al. (2019): L layers see L M steps back, through attention alone; tokens have no such end."""
    report = tbptt.horizon.measure(segments(), squares, stream(), max_lag=32, probes=3, costs=False)
    alone = dict(zip(report.state.at, report.pathways["attention"].alone.mean, strict=True))
    assert [lag for lag, norm in alone.items() if norm > 0] == [4, 8]
    assert all(norm > 0 for norm in report.pathways["memory"].alone.mean)
    inputs = report.pathways["attention"].inputs
    assert inputs is not None
    assert [lag for lag, norm in enumerate(inputs.mean) if norm > 0] == list(range(SEGMENT, SEGMENT + LAYERS * MEMORY))
    assert all(norm > 0 for norm in report.pathways["attention"].crossing.mean)  # the control: by way of the tokens


def test_looked_up_states_alone_reach_as_far_as_the_memory_and_not_a_step_farther() -> None:
    report = tbptt.horizon.measure(attentive(), squares, stream(), max_lag=20, probes=4, costs=False)
    alone = report.pathways["attention"].alone
    reached = [lag for lag, norm in zip(alone.at, alone.mean, strict=True) if norm > 0]
    assert max(reached) in (K_ATT * SLOTS - 1, K_ATT * SLOTS)  # by whether the loss is at a step that stores
    assert report.pathways["recurrence"].alone.mean[-1] > 0
    assert report.pathways["attention"].crossing.mean[-1] > 0


def test_the_report_says_it_in_numbers_words_and_a_page() -> None:
    report = tbptt.horizon.measure(segments(), squares, stream(), max_lag=16, probes=3, costs=False)
    assert report.resolution == SEGMENT
    assert report.lookbacks == (4, 8, 12, 16)
    shares = {name: report.share_of(name) for name in report.pathways}
    assert sum(shares.values()) == pytest.approx(1)
    assert report.lag_of_share(0.99, "attention") < 12 < report.lag_of_share(0.99, "memory")
    text = str(report)
    assert f"through   attention: {shares['attention']:.0%} of what crosses" in text
    assert "segments  of 4 steps" in text
    told = json.loads(report.to_json())
    assert told["shares"] == pytest.approx(shares)
    assert told["tables"]["memory_lags"]["alone"] == pytest.approx(list(report.pathways["memory"].alone.mean))
    assert len(told["tables"]["attention_input_lags"]["lag"]) == 16
    page = horizon_page(report).html()
    assert "Gradient of the state by lag, through memory" in page
    with pytest.raises(ConfigError, match="one of the pathways told apart"):
        report.share_of("recurrence")


def test_a_model_with_one_way_is_not_told_apart_and_pathways_may_be_left_out() -> None:
    data = stream()
    plain = tbptt.horizon.measure(shaken(nn.GRU(INPUTS, OUTPUTS)), squares, data, max_lag=8, probes=3, costs=False)
    assert plain.pathways == {}
    assert "through" not in str(plain)
    model = attentive()
    options = {"max_lag": 8, "probes": 3, "costs": False}
    with_ways, without = (
        tbptt.horizon.measure(model, squares, data, pathways=told, **options) for told in (True, False)
    )
    assert without.pathways == {}
    assert with_ways.state == without.state
    assert with_ways.bias == without.bias


@pytest.mark.parametrize("k1", [None, 8])
def test_a_recommendation_is_in_whole_segments(k1: int | None) -> None:
    report = tbptt.horizon.measure(segments(memory_tokens=0), squares, stream(), max_lag=64, probes=4)
    assert report.costs is not None
    chosen = report.recommend(0.3, k1=k1)
    assert chosen.needed is not None
    assert chosen.needed % SEGMENT == chosen.k1 % SEGMENT == chosen.k2 % SEGMENT == 0
    assert chosen.k2 == chosen.needed + chosen.k1 - SEGMENT  # each loss of the window reaches `needed`, or more
    assert k1 is None or chosen.k1 == k1
    little = report.recommend(0.3, memory=report.costs.bytes_at(11))
    assert little.k2 == 8
    assert little.k1 % SEGMENT == 0
    slow = report.recommend(0.3, time=report.costs.seconds_at(chosen.k2) / 1e3)
    assert slow.k1 % SEGMENT == slow.k2 % SEGMENT == 0
    chosen.estimator().init(segments(), LANES)  # which would refuse it otherwise
    with pytest.raises(ConfigError, match="k1 in multiples of the model's segments of 4"):
        report.recommend(0.3, k1=6)


def test_lags_that_would_cut_a_segment_are_refused() -> None:
    with pytest.raises(ConfigError, match="a resolution in multiples of the model's segments of 4 steps") as refused:
        tbptt.horizon.measure(segments(), squares, stream(), max_lag=16, resolution=6)
    assert refused.value.fix == "resolution=4, or leave it out"
    with pytest.raises(ConfigError, match="multiples of the resolution of 4 steps"):
        tbptt.horizon.measure(segments(), squares, stream(), max_lag=18)


def test_the_cosine_of_a_gradient_that_is_lost_in_the_noise_is_not_a_number() -> None:
    """A look-back whose own mean product is not above zero has no direction; the others have theirs."""
    truth = torch.tensor([3.0, 0.0], dtype=torch.float64)
    noise = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    both = torch.stack([noise, truth.expand(4, 2) + 0.01 * noise], 1)
    cosine = tbptt.horizon.statistics.GradientStatistics(both).cosine((1, 2)).mean
    assert math.isnan(cosine[0])
    assert cosine[1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("steps", [10, 12])
def test_what_past_steps_did_to_a_prediction_is_shown_over_whole_segments(steps: int) -> None:
    """Targets come at every seventh step only, so that most losses are not at the end of their segment."""
    model, data = segments(), stream()
    window = data.read(500)
    mask = torch.zeros(500, LANES, dtype=torch.bool)
    mask[::7] = True
    given = tbptt.ArrayStream(
        window.inputs.transpose(0, 1).reshape(-1, INPUTS),  # type: ignore[union-attr]
        window.targets.transpose(0, 1).reshape(-1, OUTPUTS),  # type: ignore[union-attr]
        lanes=LANES,
        mask=mask.T.reshape(-1),
    )
    found = tbptt.horizon.influences(model, squares, given, steps=steps, count=3)
    lengths = set()
    for each in found:
        assert each.target is not None
        at = int((given.read(500).targets == each.target).all(-1).any(1).nonzero()[0])  # type: ignore[union-attr]
        given.rewind()
        lane = int((window.targets[at] == each.target).all(-1).nonzero()[0])  # type: ignore[index]
        end = -(-(at + 1) // SEGMENT) * SEGMENT
        inputs = window.inputs[:end].detach().requires_grad_()  # type: ignore[index]
        loss = squares(model(inputs)[0], window.targets[:end])[at, lane]  # type: ignore[index]
        (gradient,) = torch.autograd.grad(loss, inputs)
        assert each.loss == pytest.approx(float(loss.detach()), rel=1e-10)
        wanted = gradient[at + 1 - len(each.norms) : at + 1, lane].norm(dim=1)
        assert each.norms.tolist() == pytest.approx(wanted.tolist(), rel=1e-9)
        assert len(each.inputs) == len(each.norms) <= steps
        lengths.add(len(each.norms))
    assert max(lengths) >= steps - SEGMENT
