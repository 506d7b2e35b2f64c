"""Each estimator's own examples on SegmentTransformer: it works, or says why not; nothing else happens."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from segment_models import INPUTS, OUTPUTS, apart, losses, summed
from torch import Tensor, nn

import tbptt
from tbptt import Estimator
from tbptt.cli.config import estimator_classes
from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.models import SegmentTransformer

S, B, SEGMENTS = 2, 2, 14
KINDS: dict[str, dict[str, int]] = {
    "memory": {"memory": 3},
    "tokens": {"memory_tokens": 2},
    "both": {"memory": 3, "memory_tokens": 2},
}
EXAMPLES = [each for _, kind in sorted(estimator_classes().items()) for each in kind.examples()]
STEPS = ("k1", "k2", "k_trunc", "lookback", "segment", "short", "long", "longest", "block", "mean_length", "lengths")
"""The fields that are numbers of steps."""
REFUSED = {"EProp", "ElementwiseRTRL", "KFRTRL", "RFLO", "SnAp", "SparseAttentiveBacktracking"}
"""Those for other models: they go step by step, or along what this model does not name."""
every = pytest.mark.parametrize("estimator", EXAMPLES, ids=str)


def in_segments(estimator: Estimator, steps: int) -> Estimator:
    """Return the estimator with segments for steps."""
    given: dict[str, Any] = {each.name: getattr(estimator, each.name) for each in fields(estimator)}  # pyright: ignore[reportArgumentType]
    found: dict[str, Any] = {}
    for name in STEPS:
        value = given.get(name)
        if value is not None:
            found[name] = tuple(steps * each for each in value) if isinstance(value, tuple) else steps * value
        elif name == "segment" and name in given:
            found[name] = steps  # left out, it would be a square root of the length
    return replace(estimator, **found)  # pyright: ignore[reportArgumentType, reportUnknownVariableType, reportCallIssue]


def made(kind: str, segment: int = S) -> SegmentTransformer:
    torch.manual_seed(0)
    return SegmentTransformer(INPUTS, OUTPUTS, 4, heads=1, layers=2, segment=segment, **KINDS[kind]).double()


def data(steps: int) -> tbptt.Window:
    return tbptt.Window(torch.randn(steps, B, INPUTS).double(), torch.randn(steps, B, OUTPUTS).double())


def estimates(estimator: Estimator, model: nn.Module, window: tbptt.Window) -> list[tuple[int, Any]]:
    """Return each window's estimate and the step after it."""
    estimator.prepare(model, window.inputs[: estimator_steps(estimator)])
    carry, at, found = estimator.init(model, window.lanes), 0, list[tuple[int, Any]]()
    while at < window.steps:
        steps = min(estimator.next_steps(carry), window.steps - at)
        estimate, carry = estimator.estimate(model, losses, carry, window[at : at + steps])
        at += steps
        found.append((at, estimate))
    return found


def estimator_steps(estimator: Estimator) -> int:
    return getattr(estimator, "k1", None) or S


def full(model: SegmentTransformer, window: tbptt.Window, begin: int, end: int) -> dict[str, Tensor]:
    """The gradient of the losses from `begin` to `end` over all that came before, by autograd, in one pass."""
    weights = dict(model.named_parameters())
    total = losses(model(window.inputs[:end])[0], window.targets[:end])[begin:].sum()
    return dict(zip(weights, torch.autograd.grad(total, list(weights.values()), materialize_grads=True), strict=True))


@every
@pytest.mark.parametrize("kind", KINDS)
def test_in_multiples_of_the_segment_it_works_or_says_why_not(kind: str, estimator: Estimator) -> None:
    model, window = made(kind), data(SEGMENTS * S)
    chosen = in_segments(estimator, S)
    if type(estimator).__name__ in REFUSED:
        with pytest.raises((CapabilityError, ConfigError), match=r"\nhint: \S"):
            estimates(chosen, model, window)
        return
    found = estimates(chosen, model, window)
    begin = 0
    for end, estimate in found:
        assert all(bool(each.isfinite().all()) for each in estimate.gradients.values())
        if chosen.kind == "exact":
            assert apart(summed(estimate), full(model, window, begin, end)) < 1e-10
            if begin:
                cut = made(kind)
                fresh = full(cut, window[begin:end], 0, end - begin)
                assert apart(summed(estimate), fresh) > 1e-4  # the control: what came before is a part of it
        begin = end
    assert len(found) > 1
    assert any(bool(each.any()) for each in found[-1][1].gradients.values())


@every
@pytest.mark.parametrize("kind", KINDS)
def test_in_lengths_that_are_no_multiples_it_is_refused_by_a_sentence(kind: str, estimator: Estimator) -> None:
    """Segments longer than any example's windows, which end within them."""
    model, window = made(kind, segment=16), data(80)
    with pytest.raises((ShapeError, CapabilityError, ConfigError)) as caught:
        estimates(estimator, model, window)
    message, _, hint = str(caught.value).partition("\nhint: ")
    assert hint
    if isinstance(caught.value, ShapeError):
        assert re.search("a state at the end of a segment was expected, but that of lane 0 stands after step", message)
        assert "multiples of segment=16" in hint


def test_methods_that_go_step_by_step_name_those_that_go_window_by_window() -> None:
    for estimator in (tbptt.SnAp(S), tbptt.RFLO(S), tbptt.EProp(S), tbptt.KFRTRL(S)):
        with pytest.raises(CapabilityError, match="goes on after each step was expected") as caught:
            estimates(estimator, made("both"), data(2 * S))
        assert "takes longer windows only: a state at the end of a segment" in str(caught.value)
        assert "RTRL(k1) or UORO(k1)" in str(caught.value)
    for estimator in (tbptt.RTRL(1), tbptt.UORO(1)):
        with pytest.raises(ConfigError, match=f"k1 in multiples of the segments of {S} steps"):
            estimates(estimator, made("both"), data(2 * S))
        with pytest.raises(CapabilityError, match="does not go on after a window of so many steps"):
            estimates(estimator, Undeclared(made("both")), data(2 * S))


class Undeclared(nn.Module):
    """The model without a word of its segments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(inputs, state)


def test_particles_side_by_side_are_refused_where_the_model_asks_about_numbers() -> None:
    estimator = tbptt.PES(S, 2, 0.1, vectorize=True)
    with pytest.raises(CapabilityError, match=r"torch\.func\.vmap can run were expected"):
        estimates(estimator, made("both"), data(2 * S))
