"""The steps that were observed and not learned from yet, and the labels that they wait for.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tbptt.errors import ConfigError
from tbptt.tree import Tree, time_cat
from tbptt.window import Window

__all__ = ["Pending", "Step"]


@dataclass(eq=False)
class Step:
    """One step that was observed.

    Attributes:
        number: how many were observed before it; its key.
        window: its inputs and reset, as a window of one step.
        settled: whether its label has come, or never will.
        targets: the label, leaves (1, B, ...); None for none.
        mask: the lanes that it counts in. Shape (B,); None for all of them.
        outputs: the prediction made of it, where something wants to compare it with the label.
    """

    number: int
    window: Window
    settled: bool = False
    targets: Tree | None = None
    mask: Tensor | None = None
    outputs: Tree | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and trees."""
        return dict(vars(self)) | {"window": self.window.state_dict()}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Step:
        """Return what `state_dict` described."""
        values: dict[str, Any] = dict(state) | {"window": Window(**state["window"])}
        return Step(**values)


class Pending:
    """The steps not learned from yet, oldest first.

    Args:
        patience: how many steps may be observed after one until its label has to be there.

    Attributes:
        given_up: how many steps' labels were not there in time.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.given_up = 0
        self._steps: deque[Step] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def add(self, step: Step) -> None:
        """Take a step."""
        self._steps.append(step)

    def give_up(self, number: int) -> None:
        """Give up the labels that are overdue once step `number` is observed."""
        for step in self._steps:
            if step.number >= number - self.patience:
                return
            if not step.settled:
                step.settled = True
                self.given_up += 1

    def open_step(self, key: int, observed: int) -> Step:
        """Return the step that waits for this label.

        Args:
            key: of the step.
            observed: how many steps were observed in all.

        Raises:
            ConfigError: none does.
        """
        whole = isinstance(key, int) and not isinstance(key, bool)  # pyright: ignore[reportUnnecessaryIsInstance]
        if not whole or not 0 <= key < observed:
            raise ConfigError(
                f"the key of a step that was observed was expected, but {key!r} came, and there were {observed} steps: "
                "a label without its step cannot be learned from",
                fix="key = online.observe(x); ...; online.label(key, y)",
            )
        first = self._steps[0].number if self._steps else observed
        step = self._steps[key - first] if key >= first else None
        if step is not None and not step.settled:
            return step
        late = key < observed - 1 - self.patience
        raise ConfigError(
            f"a step that waits for its label was expected, but step {key} of {observed} does not: "
            + (
                f"its label came already, or was given up {self.patience} steps after it (label_patience)"
                if late
                else "its label came already"
            ),
            fix=f"Online(..., label_patience={max(1, observed - 1 - key)}) for labels that come as late as this"
            if late
            else "label each step once; None for no label",
        )

    def ready(self, steps: int) -> bool:
        """Tell whether the oldest `steps` steps are there and have their labels, or never will."""
        return len(self._steps) >= steps and all(step.settled for step in islice(self._steps, steps))

    def window(self, steps: int) -> Window:
        """Return the oldest `steps` steps as a window to learn from; its targets are None where no step has a label."""
        chosen = list(islice(self._steps, steps))
        labelled = [step for step in chosen if step.targets is not None]
        targets = mask = reset = None
        if labelled:
            # a place holder, which the mask leaves out; a label all the same, as losses may divide by one
            like = labelled[0].targets
            targets = time_cat([like if step.targets is None else step.targets for step in chosen])
        if len(labelled) < steps or any(step.mask is not None for step in labelled):
            mask = torch.stack([_counting(step) for step in chosen])
        if any(step.window.resets for step in chosen):
            reset = torch.cat([step.window.reset for step in chosen])
        # What is left out is known, and need not be looked for in every window.
        left_out = {name: flags for name, flags in (("mask", mask), ("reset", reset)) if flags is not None}
        inputs = time_cat([step.window.inputs for step in chosen])
        return Window(inputs, targets, **left_out, start=chosen[0].number)

    def drop(self, steps: int) -> None:
        """Forget the oldest `steps` steps: they were learned from."""
        for _ in range(steps):
            self._steps.popleft()

    def reset_first(self, lanes: Tensor) -> bool:
        """Let the oldest step begin a sequence in these lanes; tell whether there is one."""
        if not self._steps:
            return False
        first = self._steps[0].window
        self._steps[0].window = Window(first.inputs, reset=first.reset | lanes, start=first.start)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the steps as plain values and trees."""
        return {"given_up": self.given_up, "steps": [step.state_dict() for step in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.given_up = state["given_up"]
        self._steps = deque(Step.from_state_dict(each) for each in state["steps"])


def _counting(step: Step) -> Tensor:
    """Return the lanes that a step's label counts in, shape (B,)."""
    if step.targets is not None and step.mask is not None:
        return step.mask
    like = step.window.mask[0]
    return torch.ones_like(like) if step.targets is not None else torch.zeros_like(like)
