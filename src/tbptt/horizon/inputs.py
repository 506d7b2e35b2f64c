"""The gradient with respect to what a model is fed, step by step.

Letters: T time, B lanes, E embedding.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tbptt.tree import Tree, tensors, tree_map
from tbptt.window import Window

__all__ = ["InputTap"]


class InputTap:
    """Makes the inputs of each segment something that a gradient can be asked of.

    Numbers become leaves of the graph. Symbols have no gradient; what an `nn.Embedding` gives out for them has, and
    is taken instead.

    Attributes:
        tapped: for each segment, the tensors to ask about, each (T, B, ...), or (B, T, ...) in a batch-first
            model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._embeddings = [each for each in model.modules() if isinstance(each, nn.Embedding)]
        self.tapped: list[list[Tensor]] = []
        self._batch_first: list[list[bool]] = []

    @contextmanager
    def enter(self, window: Window) -> Generator[Window]:
        """Watch one segment: what is run inside the block must be the window that is handed out."""
        numbers: list[Tensor] = []

        def leaf_of(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return leaf
            numbers.append(leaf.detach().requires_grad_())
            return numbers[-1]

        window = replace(window, inputs=tree_map(leaf_of, window.inputs))
        looked_up: list[tuple[Tensor, bool]] = []
        ids = [leaf for leaf in tensors(window.inputs) if not leaf.is_floating_point()]

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            del module  # whichever it is
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            for leaf in ids:
                batch_first = _matches(arguments[0], leaf, looked_up)
                if batch_first is not None:
                    looked_up.append((output, batch_first))
                    break
            return output

        handles = [each.register_forward_hook(hook) for each in self._embeddings] if ids else []
        try:
            yield window
        finally:
            for handle in handles:
                handle.remove()
        self.tapped.append([*numbers, *(output for output, _ in looked_up)])
        self._batch_first.append([*(False for _ in numbers), *(first for _, first in looked_up)])

    def norms(self, segment: int, gradients: list[Tensor | None], steps: int) -> Tensor:
        """Return the norm of the gradient of each step and lane, in float64. Shape (T, B)."""
        total: Tensor | None = None
        begin = 0
        pairs = zip(self.tapped[segment], gradients, self._batch_first[segment], strict=True)
        for tensor, gradient, batch_first in pairs:
            found = torch.zeros_like(tensor) if gradient is None else gradient
            found = found.transpose(0, 1) if batch_first else found
            squares = found.double().square().flatten(2).sum(2) if found.ndim > 2 else found.double().square()
            if total is None:
                total = squares.new_zeros(steps, squares.shape[1])
            if len(squares) == steps:
                total += squares
            else:  # a reset cut the segment: the model was called on one part after the other
                total[begin : begin + len(squares)] += squares
                begin += len(squares)
        assert total is not None
        return total.sqrt()


def _matches(seen: Tensor, leaf: Tensor, before: list[tuple[Tensor, bool]]) -> bool | None:
    """Tell whether ids that an embedding saw are those of the window, next in turn: batch first or not; None: no."""
    steps, lanes = leaf.shape[:2]
    if seen.ndim != 2 or leaf.ndim != 2:
        return None
    done = sum(output.shape[1 if batch_first else 0] for output, batch_first in before) % steps
    for batch_first, ids in ((False, seen), (True, seen.transpose(0, 1))):
        if ids.shape[1] == lanes and torch.equal(ids, leaf[done : done + len(ids)]):
            return batch_first
    return None


def has_any(inputs: Tree, model: nn.Module) -> bool:
    """Tell whether there is anything to ask about: numbers, or symbols that are looked up."""
    numbers = any(leaf.is_floating_point() for leaf in tensors(inputs))
    return numbers or any(isinstance(each, nn.Embedding) for each in model.modules())
