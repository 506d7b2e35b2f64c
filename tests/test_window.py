"""Windows: what agrees is taken, what does not is refused, and cutting and joining are inverse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from tbptt import Window
from tbptt.errors import CapabilityError, ShapeError
from tbptt.tree import tensors

T, B = 7, 3


def full() -> Window:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(T, B, 2), "ids": torch.randint(9, (T, B))}
    targets = (torch.randn(T, B), torch.randn(T, B, 4))
    return Window(inputs, targets, torch.rand(T, B) < 0.5, torch.rand(T, B) < 0.2, start=100)


def parts(window: Window) -> list[torch.Tensor]:
    return tensors((window.inputs, window.targets, window.mask, window.reset))


def test_what_is_left_out() -> None:
    window = Window(torch.zeros(T, B))
    assert (window.steps, window.lanes, window.start, window.targets) == (T, B, 0, None)
    assert window.mask.all()
    assert window.num_targets == T * B
    assert not window.reset.any()
    assert window.resets == {}


def test_resets_say_where_and_whether_all_lanes_start_anew() -> None:
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[0, 1] = reset[5, 0] = True
    reset[3] = True
    assert Window(torch.zeros(T, B), reset=reset).resets == {0: False, 3: True, 5: False}


def test_slices_are_views_that_know_their_place() -> None:
    window = full()
    part = window[2:5]
    assert (part.steps, part.lanes, part.start) == (3, B, 102)
    for whole, cut in zip(parts(window), parts(part), strict=True):
        assert torch.equal(whole[2:5], cut)
        assert cut.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert part.num_targets == int(window.mask[2:5].sum())
    assert window[:] is window
    assert window[-2:].start == 105
    assert window[4:99].steps == 3


@pytest.mark.parametrize("cuts", [(0, 7), (0, 1, 7), (0, 3, 4, 7)])
def test_joined_pieces_are_the_whole(cuts: tuple[int, ...]) -> None:
    window = full()
    joined = Window.join([window[a:b] for a, b in pairwise(cuts)])
    assert joined.start == 100
    assert joined.inputs.keys() == window.inputs.keys()
    assert all(torch.equal(a, b) for a, b in zip(parts(joined), parts(window), strict=True))


def test_context_has_nothing_to_learn_from() -> None:
    window = full()
    context = window.without_targets()
    assert context.targets is None
    assert context.num_targets == 0
    assert context.start == 100
    assert torch.equal(context.reset, window.reset)
    assert Window.join([context[:3], window[3:]]).targets is None
    assert window.num_targets > 0  # the window itself is as it was


def test_a_saved_window_is_the_same_window() -> None:
    window = full()
    again = Window(**window.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(parts(again), parts(window), strict=True))
    assert (again.start, again.resets) == (window.start, window.resets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": torch.zeros(T)}, r"time first, but shape \(7,\) came"),
        ({"inputs": {}}, "but no tensor came"),
        ({"inputs": torch.zeros(0, B)}, r"at least one step and one lane, but its inputs are \(T, B\) = \(0, 3\)"),
        ({"inputs": torch.zeros(T, 0)}, r"\(T, B\) = \(7, 0\)"),
        ({"inputs": (torch.zeros(T, B), torch.zeros(B, T))}, r"inputs .* a tensor of shape \(3, 7\) came"),
        ({"targets": torch.zeros(T - 1, B)}, r"targets .* a tensor of shape \(6, 3\) came: .* paired wrongly"),
        ({"targets": torch.zeros(T, 1)}, r"targets .* a tensor of shape \(7, 1\) came"),
        ({"targets": torch.zeros(T)}, r"targets .* a tensor of shape \(7,\) came"),
        ({"mask": torch.ones(T, B)}, r"mask was expected to be bool .* but is torch.float32"),
        ({"mask": torch.ones(T).bool()}, r"mask was expected .* but is torch.bool of shape \(7,\)"),
        ({"reset": torch.zeros(B, T).bool()}, r"reset was expected .* of shape \(3, 7\)"),
        ({"reset": torch.zeros(T, B).long()}, r"reset was expected to be bool .* but is torch.int64"),
    ],
)
def test_what_does_not_agree_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Window(**({"inputs": torch.zeros(T, B)} | arguments))


def test_strides_are_refused() -> None:
    with pytest.raises(ShapeError, match="consecutive steps"):
        full()[::2]


def test_what_cannot_be_looked_into_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"holds a builtins\.set, which cannot be looked into"):
        Window((torch.zeros(T, B), {1}))
