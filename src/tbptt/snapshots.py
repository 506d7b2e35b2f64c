"""What a run can go back to: copies of all that an update changes, in memory and in its checkpoints.

Letters: T time, B lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tbptt.errors import ConfigError
from tbptt.estimators.base import Carry
from tbptt.guards.base import Guard, Start
from tbptt.rereading import Rereading
from tbptt.tree import clone, to
from tbptt.window import Window

__all__ = ["Snapshots", "load_loss_state", "loss_state"]


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """All that an update changes, as it was after `update` of them; `resets` are the lanes reset since. Shape (B,)."""

    update: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    carry: dict[str, Any]
    guards: list[dict[str, Any]]
    resets: Tensor | None = None
    loss: dict[str, Any] = field(default_factory=dict[str, Any])


class Snapshots:
    """The newest few snapshots of a run, as often as its guards ask for them; none where no guard goes back.

    Args:
        guards: of the run; they go back as well, each as its `went_back` has it.
        model: its parameters and buffers are copied.
        optimizer: over the model's parameters.
        scheduler: of the learning rate, if there is one.
        loss: if it is a module: its parameters and buffers are copied as well.

    A window whose state is not carried on may have begun new sequences. These begin with the next window instead: the
    state carried there from further back is of older ones.

    Cost: `SnapshotPlan.keep` copies of all that, on the device where it is.
    """

    def __init__(
        self,
        guards: Sequence[Guard],
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        plans = [guard.snapshots for guard in guards if guard.snapshots is not None]
        self.plan = plans[0] if plans else None
        self.guards = list(guards)
        self.model, self.optimizer, self.scheduler, self.loss = model, optimizer, scheduler, loss
        self._kept: list[_Snapshot] = []  # the oldest first
        self._last = 0  # the update after which one was taken, or gone back to, last
        self._owed: Tensor | None = None  # the lanes to reset with the next window. Shape (B,)
        self._late = False  # whether all lanes began a sequence within the last window, so that the next is cold, too

    def with_resets(self, window: Window) -> Window:
        """Return the window, with the resets of those left out before it at its first step."""
        if self._owed is None:
            return window
        first = torch.zeros_like(window.reset)
        first[0] = self._owed.to(first.device)
        return replace(window, reset=window.reset | first)

    def start(self, window: Window) -> Start:
        """Return what state a window is run from, as guards take it."""
        if self._owed is not None:
            return "gap"
        return "sequence" if self._late or True in _resets(window).values() else "usual"

    def note(self, window: Window, *, carried_on: bool) -> None:
        """Hear of an update's window, and whether the state after it is carried on."""
        self._late = any(every for step, every in _resets(window).items() if step)
        lanes = None if carried_on and not self._kept else _begun(window)
        self._owed = None if carried_on else lanes
        if lanes is not None:
            self._kept = [replace(each, resets=_either(each.resets, lanes)) for each in self._kept]

    def take(self, update: int, carry: Carry) -> None:
        """Take a snapshot after this update, if one is due; the oldest is dropped when there are too many."""
        if self.plan is None or (self._kept and update - self._last < self.plan.every):
            return
        taken = _Snapshot(
            update=update,
            model=copy.deepcopy(dict(self.model.state_dict())),
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            scheduler=None if self.scheduler is None else copy.deepcopy(self.scheduler.state_dict()),
            carry=clone(carry.state_dict()),
            guards=[copy.deepcopy(guard.state_dict()) for guard in self.guards],
            loss=copy.deepcopy(loss_state(self.loss, self.model)),
        )
        self._kept = [*self._kept, taken][-self.plan.keep :]
        self._last = update

    def require(self) -> None:
        """Refuse to go back where there is nothing to go back to.

        Raises:
            ConfigError: no snapshot was taken.
        """
        if not self._kept:
            raise ConfigError(
                "a snapshot to go back to was expected, but none was taken: the guard that answers RollBack does not "
                "say that it needs one",
                fix="self.snapshots = SnapshotPlan(every=50, keep=2) in the guard's __init__",
            )

    def restore(self, update: int, carry: Carry) -> int:
        """Go back to the oldest snapshot, in place; after `note`.

        Args:
            update: the number of the update that is not made.
            carry: takes over what was carried then.

        Returns:
            How many updates are undone by it.

        Raises:
            ConfigError: there is none.
        """
        self.require()
        chosen, device = self._kept[0], next(self.model.parameters()).device
        # What is given away is a copy each time: an optimizer goes on with the very tensors that it is given.
        self.model.load_state_dict(chosen.model)
        load_loss_state(self.loss, chosen.loss)
        self.optimizer.load_state_dict(copy.deepcopy(chosen.optimizer))
        if self.scheduler is not None and chosen.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(chosen.scheduler))
        carry.load_state_dict(clone(to(chosen.carry, device)))
        for guard, remembered in zip(self.guards, chosen.guards, strict=True):
            guard.went_back(copy.deepcopy(remembered))
        self._kept = [chosen]  # the later ones may hold what made the spike
        self._last, self._owed = update, chosen.resets
        return update - 1 - chosen.update

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshots as plain values and tensors."""
        kept = [dict(vars(each)) for each in self._kept]
        return {"last": self._last, "owed": self._owed, "late": self._late, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._last, self._owed, self._late = state["last"], state["owed"], state["late"]
        self._kept = [_Snapshot(**each) for each in state["kept"]]


def loss_state(loss: nn.Module | None, model: nn.Module) -> dict[str, Any]:
    """Return the state_dict of a loss, without what is the model's, which is kept with the model.

    Nothing for a function, nor for torch.nn's own losses: class weights are a setting of theirs, and no state.
    """
    if loss is None or type(loss).__module__ == "torch.nn.modules.loss":
        return {}
    models = {id(each) for each in (*model.parameters(), *model.buffers())}
    named = dict(loss.state_dict(keep_vars=True))
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in named.items()
        if id(value) not in models
    }


def load_loss_state(loss: nn.Module | None, state: dict[str, Any]) -> None:
    """Take over what `loss_state` returned; what is the model's stays as it is."""
    if loss is not None and state:
        loss.load_state_dict({**loss.state_dict(), **state})


def _begun(window: Window) -> Tensor | None:
    """Return the lanes in which a sequence begins, shape (B,); None where that need not be made good."""
    return None if _is_pass(window) else window.reset.any(0)


def _resets(window: Window) -> dict[int, bool]:
    """Return where lanes begin a sequence, True for all of them; nowhere where each window is as the others are."""
    return {} if _is_pass(window) else window.resets


def _is_pass(window: Window) -> bool:
    """Tell whether this is a whole pass; so is the next, which begins with a reset of all lanes."""
    return isinstance(cast(object, window), Rereading)


def _either(before: Tensor | None, lanes: Tensor) -> Tensor:
    return lanes if before is None else before.to(lanes.device) | lanes
