"""What a model says of its form, and what the check makes of it: ways told apart, segments, and models that lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.checks import measure_reach
from tbptt.errors import ShapeError
from tbptt.models import Attentive, SegmentTransformer
from tbptt.pathways import pathways_of, segment_steps

INPUTS = 3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def segments(**settings: Any) -> SegmentTransformer:
    return SegmentTransformer(
        INPUTS, 2, 8, **({"heads": 2, "layers": 2, "memory": 4, "memory_tokens": 2, "segment": 4} | settings)
    )


def item(report: tbptt.CheckReport, name: str) -> Any:
    return next((each for each in report.items if each.name == name), None)


def test_what_models_say() -> None:
    model = segments()
    assert pathways_of(model, model.initial_state(2)) == {"attention": (0, 1), "memory": (3,)}
    looked_up = Attentive(nn.GRU(INPUTS, 4), memory=3, k_top=2)
    assert pathways_of(looked_up, looked_up(torch.zeros(2, 2, INPUTS))[1]) == {"recurrence": (0, 1), "attention": (2,)}
    for one_way in (segments(memory_tokens=0), segments(memory=0), nn.LSTM(INPUTS, 4)):
        assert pathways_of(one_way, one_way(torch.zeros(4, 2, INPUTS))[1]) == {}
    assert (segment_steps(model), segment_steps(segments(memory_tokens=0, segment=None))) == (4, 1)
    assert segment_steps(nn.LSTM(INPUTS, 4)) == 1


class TwoWays(nn.Module):
    """Two GRUs side by side."""

    def __init__(self, said: Any = None) -> None:
        super().__init__()
        self.one, self.two = nn.GRU(INPUTS, 4), nn.GRU(INPUTS, 4)
        self.said = said

    def pathways(self, state: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        return {"recurrence": state[0], "memory": state[1]} if self.said is None else self.said(state)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        one, two = (None, None) if state is None else state
        first, one = self.one(inputs, one)
        second, two = self.two(inputs, two)
        return first + second, (one, two)


class Detached(TwoWays):
    """One of the ways takes what came and sends nothing back: Transformer-XL's own rule."""

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return super().forward(inputs, None if state is None else (state[0], state[1].detach()))


class Unused(TwoWays):
    """One of the ways is carried on, and never looked at."""

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return super().forward(inputs, None if state is None else (state[0], torch.zeros_like(state[1])))


def test_the_check_tells_what_comes_by_each_way() -> None:
    inputs = torch.randn(12, 2, INPUTS)
    found = item(tbptt.check(TwoWays(), inputs), "pathways")
    assert (found.verdict, found.detail) == ("ok", "recurrence: values and gradient; memory: values and gradient")
    found = item(tbptt.check(Detached(), inputs), "pathways")
    assert found.verdict == "note"
    assert found.measured["recurrence"] == "values and gradient"
    assert found.measured["memory"].startswith("values, but no gradient: nothing is learned through it")
    ways = item(tbptt.check(segments(memory_gradient=False), inputs), "pathways").measured
    assert ways["attention"].startswith("values, but no gradient")
    assert ways["memory"] == "values and gradient"
    assert item(tbptt.check(nn.GRU(INPUTS, 4), inputs), "pathways") is None


def test_a_way_that_is_never_looked_at_is_found() -> None:
    """Its chunks compute what they compute without it, so that the value carry fails as well."""
    report = tbptt.check(Unused(), torch.randn(12, 2, INPUTS))
    assert item(report, "pathways").measured["memory"] == "nothing comes"
    assert not report


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda state: {"a": state[0], "b": state[0]}, r"\[0\] is in 2"),
        (lambda state: {"a": state[0]}, r"\[1\] is in 0"),
        (lambda state: {"a": state[0], "b": state[1].clone()}, "one came that is none of them"),
    ],
)
def test_ways_that_do_not_fit_the_state_are_refused(said: Any, message: str) -> None:
    model = TwoWays(said)
    with pytest.raises(ShapeError, match=message) as refused:
        pathways_of(model, model(torch.zeros(2, 2, INPUTS))[1])
    assert refused.value.fix
    report = tbptt.check(model, torch.randn(12, 2, INPUTS))
    assert item(report, "pathways").verdict == "fail"


def test_a_wrapped_model_says_what_the_module_says() -> None:
    inner = TwoWays()
    model = tbptt.stateful(inner)
    _, state = model(torch.zeros(2, 2, INPUTS))
    assert pathways_of(model, state) == {"recurrence": (0,), "memory": (1,)}
    other = tbptt.stateful(inner, pathways=lambda state: {"fast": state[0], "slow": state[1]})
    assert pathways_of(other, other(torch.zeros(2, 2, INPUTS))[1]) == {"fast": (0,), "slow": (1,)}
    assert segment_steps(tbptt.stateful(segments())) == 4
    assert pathways_of(tbptt.stateful(nn.GRU(INPUTS, 4)), state) == {}


# Segments


class Silent(nn.Module):
    """Says that it has segments, and when it is cut elsewhere computes something else instead of refusing."""

    def __init__(self, segment: int = 4) -> None:
        super().__init__()
        self.core, self.segment = nn.GRU(INPUTS, 4), segment

    def segment_steps(self) -> int:
        return self.segment

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pieces: list[Tensor] = []
        for part in inputs.split(self.segment):
            outputs, state = self.core(part, state)
            pieces.append(outputs + part.mean())  # of what is there of the segment
        assert state is not None
        return torch.cat(pieces), state


def test_a_model_that_is_silently_wrong_within_a_segment_fails() -> None:
    report = tbptt.check(Silent(), torch.randn(12, 1, INPUTS))
    assert item(report, "value carry").verdict == "fail"
    assert item(report, "value carry").measured["chunks"] < 1e-12
    assert item(report, "value carry").measured["elsewhere"] > 1e-3


@pytest.mark.parametrize("segment", [4, 10, 16])
def test_the_check_cuts_where_the_model_may_be_cut(segment: int) -> None:
    model = segments(segment=segment)
    assert tbptt.check(model, torch.randn(3 * segment, 2, INPUTS))
    with pytest.raises(ShapeError, match=f"at least three segments of {segment} steps"):
        tbptt.check(model, torch.randn(3 * segment - 1, 2, INPUTS))


@pytest.mark.parametrize("k2", [8, 16, 24])
def test_the_reach_is_measured_in_segments(k2: int) -> None:
    model = segments(segment=8).double()
    found = measure_reach(model, torch.randn(24, 1, INPUTS).double(), tbptt.TBPTT(8, k2))
    assert [(each.asked, each.measured) for each in found] == [(k2 - 7 + at, k2 - 7 + at) for at in range(8)]


def test_a_memory_that_lets_no_gradient_through_reaches_its_own_segment_only() -> None:
    """The control: asked for three segments, one is what comes."""
    model = segments(segment=8, memory_tokens=0, memory_gradient=False).double()
    found = measure_reach(model, torch.randn(24, 1, INPUTS).double(), tbptt.TBPTT(8, 24), [7])
    assert (found[0].asked, found[0].model, found[0].measured) == (24, 8, 8)


@pytest.mark.parametrize("steps", [1, 5, 10, 64])
def test_a_held_out_stream_is_read_in_whole_segments(steps: int) -> None:
    model, segment = segments(), 4
    inputs, targets = (
        torch.randn(2 * 19, INPUTS),
        torch.randn(2 * 19, 2),
    )  # passes of 19 steps: the last segment is short
    found = tbptt.evaluate(model, nn.MSELoss(), tbptt.ArrayStream(inputs, targets, lanes=2), steps=steps)
    state, total = None, 0.0
    for begin in range(0, 19, segment):
        part = slice(begin, min(begin + segment, 19))
        with torch.no_grad():
            outputs, state = model(inputs.view(2, 19, INPUTS).transpose(0, 1)[part], state)
        total += float((outputs - targets.view(2, 19, 2).transpose(0, 1)[part]).square().mean(-1).sum())
    assert found["loss"] == pytest.approx(total / 38, rel=1e-6)


class Undeclared(nn.Module):
    """A model of segments that does not say so."""

    def __init__(self, model: SegmentTransformer) -> None:
        super().__init__()
        self.model = model

    def initial_state(self, lanes: int) -> Any:
        return self.model.initial_state(lanes)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(inputs, state)


@pytest.mark.parametrize("segment", [4, 6, 10])
def test_lengths_that_an_undeclared_model_takes_are_found_and_the_others_noted(segment: int) -> None:
    model = Undeclared(segments(segment=segment))
    report = tbptt.check(model, torch.randn(30, 3, INPUTS), tbptt.TBPTT(segment, 2 * segment))
    assert report, str(report)
    assert "takes no single steps: ShapeError: a state at the end of a segment" in item(report, "value carry").detail
    assert item(report, "reset").verdict == "ok"
    assert item(report, "reach").detail == "not measured: the model takes no single steps"
