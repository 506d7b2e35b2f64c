"""Trees of tensors: nothing lost, nothing shared that should not be, and no gradient across a reset."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tbptt import tree
from tbptt.errors import CapabilityError, ShapeError


class Pair(NamedTuple):
    hidden: Tensor
    cell: Any


def nest() -> Any:
    torch.manual_seed(0)
    return {
        "b": Pair(torch.randn(1, 3, 2, requires_grad=True), [torch.randn(3), None]),
        "a": (torch.arange(3), 7, "name", 1.5, True),
        "c": OrderedDict(z=torch.randn(3, 2).bool(), y=torch.randn(3, dtype=torch.complex64)),
    }


def test_a_tree_comes_apart_and_together_again() -> None:
    original = nest()
    parts = tree.tensors(original)
    assert len(parts) == 5
    again = tree.replace_tensors(original, parts)
    assert isinstance(again["b"], Pair)
    assert again["b"].hidden is original["b"].hidden
    assert again["b"].cell[1] is None
    assert again["a"][1:] == (7, "name", 1.5, True)
    assert list(again["c"]) == ["z", "y"]
    doubled = tree.tree_map(lambda leaf: leaf * 2, original)
    assert torch.equal(doubled["b"].cell[0], original["b"].cell[0] * 2)
    assert doubled["a"][1] == 7


@pytest.mark.parametrize("empty", [None, (), {}, [None], 3])
def test_trees_without_tensors(empty: Any) -> None:
    assert tree.tensors(empty) == []
    assert tree.detach(empty) == empty
    assert tree.num_bytes(empty) == 0
    assert tree.all_finite(empty)


@pytest.mark.parametrize(
    "value", [np.zeros(3), torch.nn.Linear(1, 1), {1, 2}, [].append, (item for item in ()), threading.Lock()], ids=type
)
def test_what_cannot_be_looked_into_is_refused(value: Any) -> None:
    with pytest.raises(
        CapabilityError, match=f"holds a .*{type(value).__name__}, which cannot be looked into"
    ) as caught:
        tree.tensors((torch.zeros(3), value))
    assert "tuples, lists, dicts, or objects" in caught.value.fix


def test_detach_shares_and_clone_copies() -> None:
    original = nest()
    hidden = original["b"].hidden
    detached, copied = tree.detach(original)["b"].hidden, tree.clone(original)["b"].hidden
    assert not detached.requires_grad
    assert not copied.requires_grad
    assert detached.data_ptr() == hidden.data_ptr()
    assert copied.data_ptr() != hidden.data_ptr()
    assert torch.equal(copied, hidden)


def test_leaves_are_cut_off_and_ask_for_a_gradient_where_they_can_have_one() -> None:
    weight = torch.ones(2, requires_grad=True)
    leaves = tree.as_leaves((weight * 2, torch.arange(3), torch.randn(2, dtype=torch.complex64)))
    assert [leaf.requires_grad for leaf in leaves] == [True, False, True]
    assert all(leaf.is_leaf for leaf in leaves)
    assert [leaf.dtype for leaf in tree.differentiable(leaves)] == [torch.float32, torch.complex64]
    leaves[0].sum().backward()
    assert weight.grad is None


def test_time_is_cut_and_joined() -> None:
    whole = {"x": torch.randn(5, 2), "y": (torch.randn(5, 2, 3), None)}
    pieces = [tree.time_slice(whole, 0, 2), tree.time_slice(whole, 2, 3), tree.time_slice(whole, 3, 5)]
    joined = tree.time_cat(pieces)
    assert all(torch.equal(a, b) for a, b in zip(tree.tensors(joined), tree.tensors(whole), strict=True))
    assert joined["y"][1] is None
    assert tree.time_cat([whole]) is whole


def test_bytes_and_finiteness() -> None:
    state = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.int64)}
    assert tree.num_bytes(state) == 3 * 2 * 4 + 4 * 8
    assert tree.all_finite(state)
    for bad in (float("nan"), float("inf"), -float("inf")):
        state["a"][1, 1] = bad
        assert not tree.all_finite(state)


DIMS = (1, 0)


def two(value: float) -> tuple[Tensor, Tensor]:
    """An LSTM-like state of 3 lanes, with the lanes in two places."""
    return torch.full((2, 3, 4), value, requires_grad=True), torch.full((3,), value, requires_grad=True)


@pytest.mark.parametrize("given", [True, False])
def test_lanes_are_replaced_and_no_gradient_crosses(given: bool) -> None:
    old, fresh = two(1.0), two(5.0)
    chosen = torch.tensor([False, True, False])
    merged = tree.where_lanes(chosen, fresh if given else None, old, DIMS)
    start = 5.0 if given else 0.0
    assert torch.equal(merged[1], torch.tensor([1.0, start, 1.0]))
    assert torch.equal(merged[0], merged[1].view(1, 3, 1).expand(2, 3, 4))
    sum(leaf.sum() for leaf in merged).backward()
    kept = torch.tensor([1.0, 0.0, 1.0])
    assert torch.equal(old[1].grad, kept)
    assert torch.equal(old[0].grad, kept.view(1, 3, 1).expand(2, 3, 4))
    if given:
        assert torch.equal(fresh[1].grad, 1 - kept)  # the control: the fresh lanes do get theirs


def test_a_shared_leaf_cannot_be_reset_for_one_lane() -> None:
    with pytest.raises(CapabilityError, match=r"state tensor 1 of shape \(3,\) has no lanes of its own"):
        tree.where_lanes(torch.tensor([True, False, False]), None, two(1.0), (1, None))


def test_an_initial_state_of_another_structure_is_refused() -> None:
    with pytest.raises(ShapeError, match="returned 1 tensors, but the model's state has 2"):
        tree.where_lanes(torch.tensor([True, False, False]), torch.zeros(3), two(1.0), DIMS)


def test_a_state_of_another_structure_cannot_be_reset_for_one_lane() -> None:
    tree.check_lanes((torch.zeros(2, 3, 4),), DIMS, 3)
    with pytest.raises(ShapeError, match="had 2 tensors when it was first seen and now has 1"):
        tree.where_lanes(torch.tensor([True, False, False]), None, (torch.zeros(2, 3, 4),), DIMS)


def test_lanes_are_checked() -> None:
    tree.check_lanes(two(0.0), DIMS, 3)
    tree.check_lanes((torch.zeros(9), torch.zeros(3)), (None, 0), 3)
    for state, dims, message in [
        (two(0.0), (0, 0), r"state tensor 0 was expected to have 3 lanes in dimension 0, but has shape \(2, 3, 4\)"),
        ((torch.zeros(2, 3, 4), torch.zeros(4)), DIMS, r"state tensor 1 .* shape \(4,\)"),
        ((torch.zeros(3), torch.zeros(3)), DIMS, r"state tensor 0 .* in dimension 1"),
    ]:
        with pytest.raises(ShapeError, match=message):
            tree.check_lanes(state, dims, 3)
