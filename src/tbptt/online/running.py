"""The model's state after every step that was observed, for predictions.

Letters: B lanes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tbptt.model import find_lane_dims
from tbptt.online.pending import Pending
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, tensors
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = ["Running"]


class Running:
    """Runs the model in eval mode and without a graph from where the estimator's carry ends.

    It goes one step at a time and only when a prediction asks for it, so that what it finds does not depend on when
    it was asked, and an update that follows each step costs it nothing.

    Args:
        model: the model; its mode and the random generators are afterwards as they were.
        lanes: the number of sequences side by side, B.
    """

    def __init__(self, model: nn.Module, lanes: int) -> None:
        self.model, self.lanes = model, lanes
        self.device = next(model.parameters()).device
        self._parts = list(model.modules())
        self._own_train = any(type(part).train is not nn.Module.train for part in self._parts)
        self._state: Tree | None = None
        self._done = 0  # how many of the pending steps the state has gone through
        self._dims: LaneDims | None = None
        self._looked = lanes == 1  # one lane is always reset as a whole
        self._ahead: tuple[Window, Tree, Tree] | None = None  # the step looked at last, and what came out of it

    def restart(self, state: Tree | None) -> None:
        """Begin again with the state before the oldest pending step, as weights or steps have changed."""
        self._state, self._done, self._ahead = state, 0, None

    def outputs(self, pending: Pending, window: Window) -> Tree:
        """Return the model's outputs at a step that would come after the pending ones, which changes nothing."""
        if self._ahead is not None and _same(self._ahead[0], window):
            return self._ahead[1]
        with self._quietly():
            for step in islice(pending, self._done, None):
                self._state = self._run(step.window)[1]
                self._done += 1
            outputs, state = self._run(window)
        self._ahead = window, outputs, state
        return outputs

    def added(self, pending: Pending, window: Window) -> None:
        """Hear that a step was added to the pending ones; if it was looked at last, there is nothing left to run."""
        if self._ahead is not None and self._done == len(pending) - 1 and _same(self._ahead[0], window):
            self._state, self._done = self._ahead[2], len(pending)
        self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state, and how far it is."""
        return {"state": self._state, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._state, self._done, self._ahead = state["state"], state["done"], None

    def _run(self, window: Window) -> tuple[Tree, Tree]:
        if not self._looked:
            self._dims, self._looked = find_lane_dims(self.model, window.inputs), True
        return unroll(self.model, window, self._state, self._dims)

    @contextmanager
    def _quietly(self) -> Generator[None]:
        """Run in eval mode, without a graph; leave each part's mode and the random generators as they were."""
        modes = [part.training for part in self._parts]
        self._switch([False] * len(modes))
        try:
            with torch.no_grad(), preserved(device=self.device):
                yield
        finally:
            self._switch(modes)

    def _switch(self, modes: list[bool]) -> None:
        """Put each part of the model into its mode; by `train`, which is slow, only where a class has made its own."""
        if self._own_train:
            self.model.train(modes[0])
        for part, training in zip(self._parts, modes, strict=True):
            vars(part)["training"] = training


def _same(one: Window, other: Window) -> bool:
    """Tell whether two steps are the same, number by number."""
    return (
        one.start == other.start
        and one.resets == other.resets
        and _equal([*tensors(one.inputs), one.reset], [*tensors(other.inputs), other.reset])
    )


def _equal(ones: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
