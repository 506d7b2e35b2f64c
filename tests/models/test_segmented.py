"""SegmentTransformer: what it computes, what sees what, and that gradients go as far back as they are sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import plain_segments as plain
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.codec import decode, encode
from tbptt.errors import ConfigError, ShapeError, StreamError
from tbptt.models import SegmentState, SegmentTransformer
from tbptt.tree import tensors

S, SEGMENTS, B, W = 4, 5, 2, 8
INPUTS, OUTPUTS = 3, 2
KINDS: dict[str, dict[str, int]] = {
    "memory": {"memory": 6},  # more than a segment
    "short memory": {"memory": 3},
    "tokens": {"memory_tokens": 2},
    "both": {"memory": 3, "memory_tokens": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
far_kind = pytest.mark.parametrize("kind", ["memory", "tokens", "both"])  # two layers see back to the first segment


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(kind: str, **settings: Any) -> SegmentTransformer:
    model = SegmentTransformer(
        INPUTS, OUTPUTS, W, **({"heads": 2, "layers": 2, "segment": S} | KINDS[kind] | settings)
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases, too: none of them is 0 or 1 here
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sizes(model: SegmentTransformer, **changes: Any) -> plain.Sizes:
    return replace(plain.Sizes(2, len(model.blocks), model.memory, detached=not model.memory_gradient), **changes)


def data(segments: int = SEGMENTS) -> tbptt.Window:
    steps = segments * S
    return tbptt.Window(torch.randn(steps, B, INPUTS).double(), torch.randn(steps, B, OUTPUTS).double())


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1) + outputs[..., 0]


def by_hand(
    model: SegmentTransformer,
    window: tbptt.Window,
    injected: Sequence[int],
    lookback: int,
    between: Callable[[int, plain.Past], plain.Past] = lambda _, past: past,
    **changes: Any,
) -> tuple[Tensor, plain.Past, dict[str, Tensor]]:
    """Return the outputs, the last state and the summed losses' gradient, cut before the last `lookback` segments."""
    weights, own = dict(model.named_parameters()), sizes(model, **changes)
    past = plain.start(weights, own, window.lanes)
    pieces: list[Tensor] = []
    count = window.steps // S
    for segment in range(count):
        if 0 < segment == count - lookback:
            past = past.cut()
        past = between(segment, past)
        piece, past = plain.run_segment(weights, own, window.inputs[segment * S : (segment + 1) * S], past)
        pieces.append(piece)
    outputs = torch.cat(pieces)
    total = sum(losses(pieces[k], window.targets[k * S : (k + 1) * S]).sum() for k in injected)
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True, retain_graph=True)
    zeros = [
        torch.zeros_like(value) if each is None else each for each, value in zip(found, weights.values(), strict=True)
    ]
    return outputs, past, dict(zip(weights, zeros, strict=True))


def last_estimate(estimator: tbptt.Estimator, model: nn.Module, window: tbptt.Window, steps: int = S) -> tbptt.Estimate:
    """Return the estimate of the last window."""
    carry, estimate = estimator.init(model, window.lanes), None
    for begin in range(0, window.steps, steps):
        estimate, carry = estimator.estimate(model, losses, carry, window[begin : begin + steps])
    assert estimate is not None
    return estimate


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the relative distance of two gradients, all parameters together."""
    one, two = (torch.cat([each[name].flatten() for name in left]) for each in (left, right))
    return float((one - two).norm() / two.norm())


def summed(estimate: tbptt.Estimate) -> dict[str, Tensor]:
    return {name: each * estimate.weight for name, each in estimate.gradients.items()}


@each_kind
def test_it_computes_what_plain_loops_do(kind: str) -> None:
    model, window = made(kind), data()
    outputs, state = model(window.inputs)
    expected, past, _ = by_hand(model, window, [0], SEGMENTS)
    assert outputs.allclose(expected, rtol=0, atol=1e-12)
    for found, rows in zip(state.memory, past.memory, strict=False):
        assert found.allclose(torch.stack(rows, 1), rtol=0, atol=1e-12)
    if state.tokens is not None:
        assert state.tokens.allclose(torch.stack(past.tokens, 1), rtol=0, atol=1e-12)
    off = {"memory": model.memory - 1} if model.memory else {"base": 9_999.0}  # the control
    assert not outputs.allclose(by_hand(model, window, [0], SEGMENTS, **off)[0], rtol=0, atol=1e-9)


def test_without_segments_a_step_sees_so_many_before_it_and_any_chunks_are_one_pass() -> None:
    model = made("short memory", segment=None)
    window = data()
    outputs, _ = model(window.inputs)
    weights, own = dict(model.named_parameters()), sizes(model, sliding=True)
    expected, _ = plain.run_segment(weights, own, window.inputs, plain.start(weights, own, B))
    assert outputs.allclose(expected, rtol=0, atol=1e-12)
    state, pieces = None, []
    for part in window.inputs.split([1, 5, 2, 9, 3]):
        piece, state = model(part, state)
        pieces.append(piece)
    assert torch.cat(pieces).allclose(outputs, rtol=0, atol=1e-12)
    segmented = made("short memory")
    segmented.load_state_dict(model.state_dict())
    assert not segmented(window.inputs)[0].allclose(outputs, atol=1e-6)  # the control


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize("lookback", [1, 2, 3, 4])
@far_kind
def test_tbptt_is_autograd_over_so_many_segments(kind: str, lookback: int, replay: Any) -> None:
    model, window = made(kind), data()
    estimate = last_estimate(tbptt.TBPTT(S, lookback * S, replay=replay), model, window)
    newest = SEGMENTS - 1
    assert apart(summed(estimate), by_hand(model, window, [newest], lookback)[2]) < 1e-10
    for other in {max(1, lookback - 1), lookback + 1} - {lookback}:  # the controls
        assert apart(summed(estimate), by_hand(model, window, [newest], other)[2]) > 1e-6


@pytest.mark.parametrize("lookback", [1, 3])
def test_tbptt_over_ids_and_windows_of_several_segments(lookback: int) -> None:
    model = made("both", embedding=5)
    ids = torch.randint(INPUTS, (6 * S, B))
    window = tbptt.Window(ids, torch.randn(6 * S, B, OUTPUTS).double())
    estimate = last_estimate(tbptt.TBPTT(2 * S, lookback * 2 * S), model, window, 2 * S)
    assert model.embedding is not None
    vectors = model.embedding.weight[ids]
    expected = by_hand(model, replace(window, inputs=vectors), [4, 5], 2 * lookback)[2]
    assert apart(summed(estimate), expected) < 1e-10
    assert apart(summed(estimate), by_hand(model, replace(window, inputs=vectors), [4, 5], 1)[2]) > 1e-6  # the control


class Gains(nn.Module):
    """The model with what each segment writes multiplied by a number of its own: its gradient is that of the write."""

    def __init__(self, model: SegmentTransformer) -> None:
        super().__init__()
        self.model = model
        self.gain = nn.Parameter(torch.ones(SEGMENTS).double())

    def initial_state(self, lanes: int) -> SegmentState:
        return self.model.initial_state(lanes)

    def forward(self, inputs: Any, state: Any = None) -> Any:
        values, number = inputs
        outputs = []
        for begin in range(0, len(values), S):
            piece, state = self.model(values[begin : begin + S], state)
            gain = self.gain[number[begin, 0]]
            tokens = None if state.tokens is None else state.tokens * gain
            state = state._replace(memory=tuple(each * gain for each in state.memory), tokens=tokens)
            outputs.append(piece)
        return torch.cat(outputs), state


@pytest.mark.parametrize("lookback", [1, 2, 3, 4, 5])
@far_kind
def test_nothing_older_than_the_look_back_has_a_gradient_and_all_inside_has(kind: str, lookback: int) -> None:
    model = Gains(made(kind))
    number = torch.arange(SEGMENTS).repeat_interleave(S)[:, None].expand(-1, B)
    window = replace(data(), inputs=(data().inputs, number))
    found = last_estimate(tbptt.TBPTT(S, lookback * S), model, window).gradients["gain"]
    inside = range(SEGMENTS - lookback, SEGMENTS - 1)  # the newest one's write is read by nobody
    assert [bool(each) for each in found.tolist()] == [segment in inside for segment in range(SEGMENTS)]
    full = losses(model(window.inputs)[0], window.targets)[-S:].sum()
    [through] = torch.autograd.grad(full, [model.gain])  # the control: without a cut all have one
    assert bool((through[:-1] != 0).all())


@each_kind
@pytest.mark.parametrize("checkpoints", [None, 2])
def test_full_bptt_is_autograd_over_all_segments(kind: str, checkpoints: int | None) -> None:
    model, window = made(kind), data()
    estimator = tbptt.FullBPTT(k1=SEGMENTS * S, segment=S, checkpoints=checkpoints)
    estimate = last_estimate(estimator, model, window, SEGMENTS * S)
    everywhere = range(SEGMENTS)
    assert apart(summed(estimate), by_hand(model, window, everywhere, SEGMENTS)[2]) < 1e-10
    assert apart(summed(estimate), by_hand(model, window, everywhere, SEGMENTS - 1)[2]) > 1e-6  # the control


class _Scale(torch.autograd.Function):
    """Nothing forward, a factor back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * ctx.factor, None


@each_kind
def test_artbp_scales_what_crosses_a_segment(kind: str) -> None:
    model, mean = made(kind), 4 * S
    estimator = next(
        each
        for each in (tbptt.ARTBP(mean_length=mean, block=S, seed=seed) for seed in range(100))
        if each.next_steps(each.init(model, B)) == 3 * S
    )
    window = data(3)
    estimate = last_estimate(estimator, model, window, 3 * S)

    def scaled(segment: int, past: plain.Past, alpha: float = 4.0) -> plain.Past:
        if not segment:
            return past
        factor = 1 / (1 - alpha / ((alpha - 1) * mean / S + segment))
        scale = [[_Scale.apply(row, factor) for row in rows] for rows in [*past.memory, past.tokens]]
        return plain.Past(scale[:-1], scale[-1])

    expected = by_hand(model, window, range(3), 3, scaled)[2]
    assert estimate.weight == mean * B
    assert apart(summed(estimate), expected) < 1e-10
    assert apart(summed(estimate), by_hand(model, window, range(3), 3)[2]) > 1e-3  # the control


def test_synthetic_gradients_reach_what_is_written() -> None:
    model, window = made("tokens"), data(3)
    net = nn.Linear(2 * W, 2 * W).double()
    estimator = tbptt.SyntheticGradients(S, predictor="own")
    estimator.attach(model, window.inputs[:S], net)
    estimate = last_estimate(estimator, model, window)
    own = {name: each for name, each in summed(estimate).items() if not name.startswith("synthetic_gradients")}

    def gradient(share: float) -> dict[str, Tensor]:
        weights = {name: each for name, each in model.named_parameters() if name in own}
        past = plain.start(weights, sizes(model), B)
        for segment in range(2):
            _, past = plain.run_segment(weights, sizes(model), window.inputs[segment * S : (segment + 1) * S], past)
        past = past.cut()
        outputs, past = plain.run_segment(weights, sizes(model), window.inputs[-S:], past)
        rows = torch.cat(past.tokens, -1)
        ahead = (rows @ net.weight.T + net.bias).detach()
        total = losses(outputs, window.targets[-S:]).sum() + share * (ahead * rows).sum()
        found = torch.autograd.grad(total, list(weights.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(weights, found, strict=True))

    assert apart(own, gradient(1.0)) < 1e-10
    assert apart(own, gradient(0.0)) > 1e-3  # the control: TBPTT(S, S)


def test_detached_memory_stops_gradients_at_each_segment_and_tokens_do_not() -> None:
    window = data()
    for kind, crosses in (("memory", False), ("both", True)):
        model = made(kind, memory_gradient=False)
        found = {k: summed(last_estimate(tbptt.TBPTT(S, k * S), model, window)) for k in (1, 3)}
        assert apart(found[3], by_hand(model, window, [SEGMENTS - 1], 3)[2]) < 1e-10
        assert (apart(found[3], found[1]) > 1e-6) is crosses
        assert apart(found[3], by_hand(model, window, [SEGMENTS - 1], 3, detached=False)[2]) > 1e-6  # the control


@each_kind
@pytest.mark.parametrize("step", [0, 1, S, 2 * S + 3])
def test_outputs_do_not_see_later_inputs(kind: str, step: int) -> None:
    model, window = made(kind), data()
    inputs = window.inputs.clone().requires_grad_()
    seen = torch.autograd.grad(model(inputs)[0][step].sum(), inputs)[0].abs().sum((1, 2))
    assert not seen[step + 1 :].any()
    assert bool(seen[step])
    start = step // S * S
    assert bool((seen[start : step + 1] != 0).all())
    assert bool(seen[:start].any()) is (start > 0)


@each_kind
def test_one_lane_starts_anew_where_a_segment_begins(kind: str) -> None:
    model, window = made(kind), data()
    reset = torch.zeros(window.steps, B, dtype=torch.bool)
    reset[2 * S, 0] = True
    estimator = tbptt.TBPTT(window.steps, window.steps, keep_outputs=True)
    outputs = last_estimate(estimator, model, replace(window, reset=reset), window.steps).outputs
    assert isinstance(outputs, Tensor)
    whole, fresh = model(window.inputs)[0], model(window.inputs[2 * S :])[0]
    assert outputs[2 * S :, 0].allclose(fresh[:, 0], rtol=0, atol=1e-12)
    assert outputs[:, 1].allclose(whole[:, 1], rtol=0, atol=1e-12)
    assert not outputs[2 * S :, 0].allclose(whole[2 * S :, 0], atol=1e-4)  # the control


def test_without_segments_a_lane_starts_anew_at_any_step() -> None:
    model, window = made("memory", segment=None), data()
    reset = torch.zeros(window.steps, B, dtype=torch.bool)
    reset[7, 0] = reset[9, 1] = True
    estimator = tbptt.TBPTT(5, 12, keep_outputs=True)
    outputs = torch.cat(
        [last_estimate(estimator, model, replace(window, reset=reset)[:end], 5).outputs for end in (5, 10, 15, 20)]
    )
    assert outputs[7:, 0].allclose(model(window.inputs[7:])[0][:, 0], rtol=0, atol=1e-12)
    assert outputs[9:, 1].allclose(model(window.inputs[9:])[0][:, 1], rtol=0, atol=1e-12)
    assert not outputs[7:, 0].allclose(model(window.inputs)[0][7:, 0], atol=1e-4)  # the control


@each_kind
def test_nothing_goes_on_from_the_middle_of_a_segment(kind: str) -> None:
    model, window = made(kind), data()
    outputs, state = model(window.inputs[: S + 1])  # a shorter one may be the last
    assert outputs.allclose(model(window.inputs)[0][: S + 1], rtol=0, atol=1e-12)
    with pytest.raises(ShapeError, match=rf"lane 0 stands after step 1 of a segment of {S}.*\n?.*multiples of"):
        model(window.inputs[S + 1 :], state)
    reset = torch.zeros(2 * S, B, dtype=torch.bool)
    reset[S + 1, 1] = True
    estimator = tbptt.TBPTT(2 * S, 2 * S)
    with pytest.raises(ShapeError, match="lane 0 stands after step 1"):  # the other lane would be cut, too
        last_estimate(estimator, model, replace(window[: 2 * S], reset=reset), 2 * S)
    reset[S + 1] = True
    assert last_estimate(estimator, model, replace(window[: 2 * S], reset=reset), 2 * S).loss.isfinite()


@each_kind
@pytest.mark.parametrize("segment", [4, 6, 10])
def test_check_passes_in_segments_and_measures_the_reach(kind: str, segment: int) -> None:
    report = tbptt.check(
        made(kind, segment=segment).float(), torch.randn(30, 3, INPUTS), tbptt.TBPTT(segment, 2 * segment)
    )
    assert report, str(report)
    assert report.conclusion == "it carries its state"
    found = {item.name: item for item in report.items}
    cut_in_mid_segment = found["value carry"].measured["elsewhere"]
    assert isinstance(cut_in_mid_segment, str)
    assert cut_in_mid_segment.startswith("ShapeError: a state at the end of a segment")
    asked = f"{segment + 1} steps asked, {segment + 1} measured; {2 * segment} steps asked, {2 * segment} measured"
    assert found["reach"].detail == f"{asked}, in segments of {segment}"


def test_check_passes_any_length_without_segments() -> None:
    report = tbptt.check(made("memory", segment=None), torch.randn(24, 3, INPUTS), tbptt.TBPTT(4, 8))
    assert report.conclusion == "it carries its state"


def test_check_says_that_detached_memory_sends_nothing_back() -> None:
    report = tbptt.check(made("memory", memory_gradient=False), torch.randn(24, 3, INPUTS))
    assert [item.name for item in report.items if not item.passed] == ["gradient carry"]
    assert tbptt.check(made("both", memory_gradient=False), torch.randn(24, 3, INPUTS))


@each_kind
def test_a_saved_carry_goes_on_to_the_bit(kind: str) -> None:
    model, window, estimator = made(kind), data(), tbptt.TBPTT(S, 3 * S)
    carry = estimator.init(model, B)
    for begin in (0, S, 2 * S):
        _, carry = estimator.estimate(model, losses, carry, window[begin : begin + S])
    stored: dict[str, Tensor] = {}
    written = encode(carry.state_dict(), "carry", stored)
    again = estimator.init(model, B)
    again.load_state_dict(decode(written, {name: each.clone() for name, each in stored.items()}))
    one, two = (estimator.estimate(model, losses, each, window[3 * S : 4 * S]) for each in (carry, again))
    assert isinstance(two[1].state, SegmentState)
    assert all(a.equal(b) for a, b in zip(tensors(one[1].state), tensors(two[1].state), strict=True))
    assert all(one[0].gradients[name].equal(two[0].gradients[name]) for name in one[0].gradients)
    fresh = estimator.estimate(model, losses, estimator.init(model, B), window[3 * S : 4 * S])[0]
    assert not all(one[0].gradients[name].equal(fresh.gradients[name]) for name in one[0].gradients)  # the control


def test_dropout_acts_in_training_only() -> None:
    model, inputs = made("both", dropout=0.5), data().inputs
    assert not model(inputs)[0].equal(model(inputs)[0])
    model.eval()
    assert model(inputs)[0].equal(model(inputs)[0])


def test_autocast_carries_a_state_of_the_weights_own_type() -> None:
    model, inputs = made("both").float(), data().inputs.float()
    exact, state = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, carried = model(inputs[: 3 * S])
        more, carried = model(inputs[3 * S :], carried)
    assert [leaf.dtype for leaf in tensors(carried)] == [leaf.dtype for leaf in tensors(state)]
    found = torch.cat([narrow, more]).float()
    assert found.allclose(exact, atol=0.1)
    assert not found.allclose(exact, atol=1e-5)  # the control: it was narrower


def test_inputs_and_states_of_another_kind_are_refused() -> None:
    model = made("both")
    inputs = data().inputs
    with pytest.raises(ShapeError, match=r"\(T, B, 3\) were expected"):
        model(inputs[..., :2])
    with pytest.raises(ShapeError, match=r"a SegmentState of tensors .* was expected, but SegmentState of"):
        model(inputs[:, :1], model(inputs)[1])
    with pytest.raises(ShapeError, match="was expected, but Tensor of"):
        model(inputs, torch.zeros(2, 2))
    with pytest.raises(StreamError, match="ids from 0 to 2 were expected, but 7 came at step 1 of the window, lane 1"):
        made("both", embedding=4)(torch.tensor([[0, 1], [2, 7]]))
    with pytest.raises(ShapeError, match=r"SegmentTransformer\(\.\.\., embedding=None\)"):
        made("both", embedding=4)(inputs)


def test_one_output_has_no_dimension_of_its_own() -> None:
    model = SegmentTransformer(INPUTS, 1, W, heads=2, layers=1, memory=4)
    assert tuple(model(torch.zeros(7, B, INPUTS))[0].shape) == (7, B)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "both are 0: nothing would be carried"),
        ({"memory_tokens": 2}, "segment was expected together with memory_tokens=2"),
        ({"memory": 4, "memory_gradient": False}, "memory=4 and segment=None"),
        ({"memory_tokens": 4, "segment": 4, "memory_gradient": False}, "memory=0 and segment=4"),
        ({"memory": 4, "heads": 3}, "a multiple of 2 heads was expected, but width=8 and heads=3"),
        ({"memory": 4, "heads": 8}, "numbers are turned in pairs"),
        ({"memory": -1}, "memory was expected"),
        ({"memory_tokens": -1, "segment": 4}, "memory_tokens was expected"),
        ({"memory": 4, "segment": 0}, "segment was expected"),
        ({"memory": 4, "layers": 0}, "layers was expected"),
        ({"memory": 4, "embedding": 0}, "embedding was expected"),
        ({"memory": 4, "dropout": 1.0}, "dropout from 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SegmentTransformer(**({"inputs": INPUTS, "outputs": OUTPUTS, "width": W, "heads": 2, "layers": 1} | settings))
    assert "hint:" in str(caught.value)


@pytest.mark.slow
def test_memory_tokens_learn_over_four_segments_and_not_with_less() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "quality" / "segment_recall.py"
    spec = spec_from_file_location("segment_recall", path)
    assert spec is not None
    assert spec.loader is not None
    recall = module_from_spec(spec)
    spec.loader.exec_module(recall)
    assert recall.train(4, 4, 0, 500)["accuracies"][-1] > 0.95
    assert max(recall.train(4, 3, 0, 500)["accuracies"]) < 0.3  # guessing has 0.25
