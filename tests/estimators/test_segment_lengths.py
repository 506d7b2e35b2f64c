"""Lengths on a model that is cut into segments: refused before training, and whole at the end of a pass."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import ARTBP, TBPTT, Adaptive, Choice, Curriculum, FullBPTT, Mixture, Ramp, Telescope, Window
from tbptt.errors import ConfigError
from tbptt.models import SegmentTransformer

S, B, INPUTS, OUTPUTS = 4, 2, 3, 5
PASS = 5 * S + 2
"""Steps of a pass, whose last segment is short."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(**settings: Any) -> SegmentTransformer:
    given = {"heads": 2, "layers": 2, "memory": S, "memory_tokens": 2, "segment": S} | settings
    model = SegmentTransformer(INPUTS, OUTPUTS, 8, **given).double()
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.1 * torch.randn_like(each))
    return model


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def windows(passes: int, k1: int) -> list[Window]:
    """Passes of random data, each begun anew in all lanes, cut as a stream does."""
    found: list[Window] = []
    for _ in range(passes):
        reset = torch.zeros(PASS, B, dtype=torch.bool)
        reset[0] = True
        whole = Window(torch.randn(PASS, B, INPUTS).double(), torch.randn(PASS, B, OUTPUTS).double(), None, reset)
        found += [whole[begin : begin + k1] for begin in range(0, PASS, k1)]
    return found


# Refused before anything is trained

CUT: list[tuple[str, tbptt.Estimator, str]] = [
    ("k1", TBPTT(6, 8), "k1=8"),
    ("k2", TBPTT(4, 6), "k2=8"),
    ("k1", TBPTT(Ramp(4, 8, over=10), 8), r"k1=Curriculum\(\[1, 2, 4\], updates=1000, segment=4\)"),
    ("k2", TBPTT(4, Choice([4, 10])), r"k2=Curriculum\("),
    ("k2", TBPTT(4, Adaptive(max=30)), r"k2=Adaptive\(..., max=32, multiple=4\)"),
    ("k2", TBPTT(4, Curriculum([1, 2, 3], updates=5)), r"k2=Curriculum\("),
    ("segment", FullBPTT(segment=6), "segment=8"),
    ("k1", FullBPTT(k1=6), "k1=8"),
    ("block", ARTBP(mean_length=8), "block=4"),
    ("lengths", Telescope(4, (4, 6)), r"lengths=\[4, 8\]"),
    ("short", Mixture(4, 5, 8, 0.5), "short=8"),
    ("long", Mixture(4, 4, 9, 0.5), "long=12"),
    ("k1", tbptt.SyntheticGradients(6), "k1=8"),
    ("k1", tbptt.RTRL(k1=3), "k1=4"),
    ("k1", tbptt.PES(3, num_particles=2, sigma=0.1), "k1=4"),
]


@pytest.mark.parametrize(("name", "estimator", "fix"), CUT, ids=lambda each: str(each)[:40])
def test_lengths_that_would_cut_a_segment_are_refused(name: str, estimator: tbptt.Estimator, fix: str) -> None:
    model = made(memory=0)
    estimator.prepare(model, torch.randn(S, B, INPUTS).double())
    with pytest.raises(ConfigError, match=f"^{name} in multiples of the segments of 4 steps") as refused:
        estimator.init(model, B)
    assert re.match(fix, refused.value.fix)
    any_length = made(memory_tokens=0, segment=None)
    estimator.prepare(any_length, torch.randn(S, B, INPUTS).double())
    assert estimator.init(any_length, B)  # the control


# The end of a pass, which is no end of a segment

WHOLE: list[tbptt.Estimator] = [
    TBPTT(S, S),
    TBPTT(S, 3 * S),
    TBPTT(S, 3 * S, replay="retain"),
    TBPTT(2 * S, S),
    TBPTT(2 * S, S, losses="all"),
    TBPTT(2 * S, 3 * S),
    TBPTT(S, Adaptive(min=1, max=4 * S, every=2, multiple=S)),
    TBPTT(S, Curriculum([1, 2, 3], updates=4, segment=S)),
    FullBPTT(k1=2 * S),
    FullBPTT(k1=2 * S, segment=S, checkpoints=1),
    ARTBP(mean_length=3 * S, block=S),
    Telescope(S, (S, 2 * S, 4 * S)),
    Telescope(2 * S, (2 * S, 3 * S), segment=S),
    Mixture(S, S, 3 * S, 0.5),
    Mixture(S, 2 * S, None, 0.5),
]


@pytest.mark.parametrize("estimator", WHOLE, ids=str)
def test_passes_may_end_within_a_segment(estimator: tbptt.Estimator) -> None:
    stream = tbptt.ArrayStream(torch.randn(B * PASS, INPUTS), torch.randn(B * PASS, OUTPUTS), lanes=B)
    model = made().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    summary = tbptt.Trainer(model, nn.MSELoss(), optimizer, estimator, stream).run(passes=4)
    assert summary.passes == 4
    assert summary.updates >= 8


def by_hand(model: SegmentTransformer, whole: Window, segments: int) -> dict[str, Tensor]:
    """The gradient of the last segment's mean loss, the state before the last `segments` of them cut off."""
    state, found = None, torch.zeros(0)
    count = -(-whole.steps // S)
    for segment in range(count):
        if segment == count - segments and state is not None:
            state = type(state)(
                tuple(each.detach() for each in state.memory),
                state.filled,
                None if state.tokens is None else state.tokens.detach(),
                state.place,
            )
        outputs, state = model(whole.inputs[segment * S : (segment + 1) * S], state)
        found = outputs
    assert isinstance(whole.targets, Tensor)
    loss = squares(found, whole.targets[(count - 1) * S :]).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True)
    }


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    squares_of = [float((left[name] - right[name]).square().sum()) for name in left]
    return (sum(squares_of) / sum(float(each.square().sum()) for each in right.values())) ** 0.5


@pytest.mark.parametrize("replay", ["recompute", "retain"])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_the_last_window_of_a_pass_looks_back_as_many_segments(segments: int, replay: Any) -> None:
    """Two steps of a segment and whole segments before it; then the next pass, which looks back to its own start."""
    model, estimator = made(), TBPTT(S, segments * S, replay=replay)
    carry = estimator.init(model, B)
    seen: list[Window] = []
    for number, window in enumerate(windows(2, S)):
        seen = [window] if bool(window.reset[0].all()) else [*seen, window]
        estimate, carry = estimator.estimate(model, squares, carry, window)
        whole = Window.join(seen)
        wanted = by_hand(model, whole, segments)
        assert apart(estimate.gradients, wanted) < 1e-10, number
        assert estimate.lookback == min(whole.steps, segments * S - (-window.steps % S))
        if segments > 1 and len(seen) > segments:
            assert apart(estimate.gradients, by_hand(model, whole, segments - 1)) > 1e-3  # the control


def test_a_window_of_which_only_the_tail_is_learned_from_is_cut_at_a_segment() -> None:
    """The last window has S + 2 steps of the 4 S asked for: its second segment, the short one, is learned from."""
    model, estimator = made(), TBPTT(4 * S, S)
    carry = estimator.init(model, B)
    first, last = windows(1, 4 * S)
    assert last.steps == S + 2
    _, carry = estimator.estimate(model, squares, carry, first)
    estimate, _ = estimator.estimate(model, squares, carry, last)
    assert estimate.lookback == 2
    assert apart(estimate.gradients, by_hand(model, Window.join([first, last]), 1)) < 1e-10


# Lengths that change


def test_a_curriculum_goes_through_its_segments_in_a_run(tmp_path: Path) -> None:
    def run(directory: Path, updates: list[int]) -> Any:
        torch.manual_seed(3)
        stream = tbptt.ArrayStream(torch.randn(2000, INPUTS), torch.randn(2000, OUTPUTS), lanes=B)
        model = made().float()
        stages = Curriculum([1, 2, 3], updates=[4, 6], segment=S)
        for each in updates:
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            trainer = tbptt.Trainer(
                model, nn.MSELoss(), optimizer, TBPTT(S, stages), stream, directory=directory,
                saving=tbptt.Saving(every=3, log_every=1),
            )  # fmt: skip
            trainer.run(updates=each)
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        return model.state_dict(), [json.loads(line) for line in lines]

    weights, lines = run(tmp_path / "whole", [15])
    assert [each["lookback"] for each in lines] == [S] * 4 + [2 * S] * 6 + [3 * S] * 5
    again, _ = run(tmp_path / "resumed", [7, 15])
    assert all(again[name].equal(value) for name, value in weights.items())


@pytest.mark.parametrize("both", [False, True])
def test_adaptive_follows_in_whole_segments(both: bool) -> None:
    model, adaptive = made(), Adaptive(tolerance=0.3, min=1, max=8 * S, every=3, multiple=S)
    estimator = TBPTT(adaptive if both else 2 * S, adaptive)
    carry = estimator.init(model, B)
    probed = 0
    for _ in range(40):
        steps = estimator.next_steps(carry)
        window = Window(torch.randn(steps, B, INPUTS).double(), torch.randn(steps, B, OUTPUTS).double())
        estimate, carry = estimator.estimate(model, squares, carry, window)
        k1, k2 = estimate.metrics["k1"], estimate.metrics["k2"]
        assert k1 % S == k2 % S == 0
        if "needed_lookback" in estimate.metrics:
            probed += 1
            assert estimate.metrics["needed_lookback"] % S == 0
    assert probed > 5
    assert estimate.lookback == k2 or k2 <= k1
    assert k2 >= 2 * S  # its tokens hold on: one segment is not enough
