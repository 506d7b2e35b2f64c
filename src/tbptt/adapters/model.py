"""The model that `tbptt.stateful` makes.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from torch import nn

from tbptt.adapters.conventions import Call
from tbptt.adapters.protect import overwrites_what_it_needs, protected
from tbptt.errors import ShapeError
from tbptt.tree import Tree, copy, tensors
from tbptt.wrappers import method_of

__all__ = ["Stateful", "StatefulFrom"]


class Stateful(nn.Module):
    """A module of any habit, called as `model(inputs, state) -> (outputs, state)`, time first.

    Attributes:
        module: the module.
        in_place: "auto", "protect" or "leave"; see `tbptt.stateful`.
        overwrites: what was found out for "auto", by the kind of call: "one step", "several steps".
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        in_place: Literal["auto", "protect", "leave"],
        initial: Callable[[int], Tree] | None,
        pathways: Callable[[Tree], Mapping[str, Tree]] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.in_place = in_place
        self.overwrites: dict[str, bool] = {}
        self._call = call
        self._initial = initial
        self._pathways = pathways

    def forward(self, inputs: Tree, state: Tree | None = None) -> tuple[Tree, Tree]:
        """Run the module over inputs (T, B, ...) from `state`, which stays as it is.

        Raises:
            ShapeError: the outputs are not (T, B, ...).
        """
        size = tensors(inputs)[0].shape[:2]
        given = self._start(size[1]) if state is None else copy(state)
        with protected() if self._protects(inputs) else nullcontext():
            outputs, state = self._call(self.module, inputs, given)
        for leaf in tensors(outputs):
            if leaf.shape[:2] != size:
                raise ShapeError(
                    f"{type(self.module).__name__} was expected to return outputs (T, B, ...) = {tuple(size)} + (...), "
                    f"but returned {tuple(leaf.shape)}: steps and lanes would be taken for each other",
                    fix="tbptt.stateful(module, batch_first=True) or one_step=True, as the module is; "
                    f"or it is wrong in windows of {size[0]} steps",
                )
        return outputs, state

    def pathways(self, state: Tree) -> Mapping[str, Tree]:
        """Return by which ways the past comes, where that was said: see `tbptt.pathways.HasPathways`."""
        return {} if self._pathways is None else self._pathways(state)

    def segment_steps(self) -> int | None:
        """Return the steps of a segment, where the module says so: see `tbptt.pathways.HasSegments`."""
        own = method_of(self.module, "segment_steps")
        return None if own is None else own()

    def _start(self, lanes: int) -> Tree | None:
        return None if self._initial is None else self._initial(lanes)

    def _protects(self, inputs: Tree) -> bool:
        if self.in_place != "auto":
            return self.in_place == "protect"
        if not torch.is_grad_enabled():
            return False
        kind = "one step" if tensors(inputs)[0].shape[0] == 1 else "several steps"
        if kind not in self.overwrites:
            self.overwrites[kind] = overwrites_what_it_needs(self.module, self._call, inputs, self._start)
        return self.overwrites[kind]


class StatefulFrom(Stateful):
    """A `Stateful` that says itself how a sequence starts."""

    def initial_state(self, lanes: int) -> Tree:
        """Return the state before the first step."""
        return self._start(lanes)
