"""The recall task of docs/attention.md: what its gradients say before anything is learned, and that it is learned."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_models import apart
from torch import Tensor, nn

import tbptt
from tbptt.models import SegmentTransformer

SEGMENTS, LANES = 3, 6


@cache
def recall(name: str = "recall.py") -> Any:
    """The task that the benchmarks share, or one of them."""
    path = Path(__file__).parents[2] / "benchmarks" / name
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module, before = module_from_spec(spec), list(sys.path)
    try:
        sys.path.insert(0, str(path.parent))  # a script's own folder, which it takes away
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def made() -> tuple[SegmentTransformer, tbptt.Window]:
    torch.manual_seed(0)
    model = recall().made().double()
    window = recall().sequences(SEGMENTS, LANES, torch.Generator().manual_seed(0))
    return model, tbptt.Window(window.inputs.double(), window.targets, window.mask, window.reset)


def gradient(k1: int, lookback: int) -> dict[str, Tensor]:
    """The gradient of the sequence's one loss, in windows of so many segments."""
    model, window = made()
    steps = recall().STEPS
    estimator = tbptt.TBPTT(k1 * steps, lookback * steps)
    carry = estimator.init(model, LANES)
    for begin in range(0, window.steps, k1 * steps):
        estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window[begin : begin + k1 * steps])
    assert estimate.num_injected == LANES
    return estimate.gradients


@pytest.mark.parametrize("lookback", range(1, SEGMENTS + 1))
def test_windows_of_a_segment_and_of_the_whole_sequence_have_the_same_gradient(lookback: int) -> None:
    by_segment, whole = gradient(1, lookback), gradient(SEGMENTS, lookback)
    assert apart(by_segment, whole) < 1e-10
    other = gradient(SEGMENTS, lookback - 1 or 2)
    assert apart(by_segment, other) > 1e-6  # the control: the look-back matters


@pytest.mark.parametrize("k1", [1, SEGMENTS])
def test_what_writes_the_mark_has_a_gradient_with_a_look_back_to_it_and_exactly_none_with_less(k1: int) -> None:
    mark = recall().SYMBOLS  # the column of the weight that reads the mark, which stands in the first segment only
    for lookback in range(1, SEGMENTS + 1):
        weights = gradient(k1, lookback)["enter.weight"]
        assert bool(weights[:, mark].any()) is (lookback == SEGMENTS)
        assert bool((weights[:, :mark] != 0).all())  # the control: those that read symbols always have one
    assert bool((gradient(k1, SEGMENTS)["enter.weight"][:, mark] != 0).all())


@pytest.mark.slow
def test_memory_tokens_learn_over_four_segments_and_not_with_less() -> None:
    train = recall("quality/segment_recall.py").train
    assert train(4, 4, 0, 500)["accuracies"][-1] > 0.95
    assert max(train(4, 3, 0, 500)["accuracies"]) < 0.3  # guessing has 0.25
