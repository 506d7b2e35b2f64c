"""SegmentTransformer: what it computes, what sees what, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import plain_segments as plain
import pytest
import torch
from segment_models import (
    INPUTS,
    OUTPUTS,
    SEGMENTS,
    B,
    S,
    W,
    by_hand,
    data,
    each_kind,
    last_estimate,
    made,
    sizes,
)
from torch import Tensor

import tbptt
from tbptt.errors import ConfigError, ShapeError, StreamError
from tbptt.models import SegmentTransformer
from tbptt.tree import tensors


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
