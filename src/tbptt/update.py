"""One update, from a window to the weights and the carry after it; written once, for all who train.

window, with the resets owed -> estimate -> sum over ranks -> guards -> step, or refusal, or roll-back -> carry
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tbptt.checkpoint import weights_of
from tbptt.codec import Like
from tbptt.distributed import OneRank, Ranks
from tbptt.errors import AlarmWarning, CheckpointError, ConfigError
from tbptt.estimators.base import LOSS_PREFIX, Carry, Estimate, Estimator
from tbptt.first_states import first_states
from tbptt.guards.base import Guard, RollBack, Start, guarded
from tbptt.length import scaled_rate
from tbptt.loss import StepLoss
from tbptt.model import named_parameters, trainable_parameters
from tbptt.side_changes import SideChanges
from tbptt.snapshots import Snapshots, load_loss_state, loss_state
from tbptt.streams.base import Stream
from tbptt.tree import to
from tbptt.window import Window

__all__ = ["Updated", "Updater", "check_optimizer"]

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Updated:
    """What became of a window.

    Args:
        window: as it was run: with the resets that were owed.
        raw: the estimate, over all ranks, before the guards.
        estimate: after them; None when they refused it.
        roll_back: the verdict to go back; None for any other.
        undone: how many updates before this one are undone by it.
        applied: whether the optimizer made a step.
        carried_on: whether the carry is that after the window.
        learning_rate: of the first parameter group, with the estimate's `rate_factor`.
    """

    window: Window
    raw: Estimate
    estimate: Estimate | None
    roll_back: RollBack | None
    undone: int
    applied: bool
    carried_on: bool
    learning_rate: float

    @property
    def seen(self) -> Estimate:
        """The estimate to report: after the guards, or as it came when they refused it."""
        return self.raw if self.estimate is None else self.estimate


class Updater:
    """Makes updates: the gradient of a window, the guards' verdict on it, and all that follows from that.

    Args:
        model: that is trained. If it is in eval mode it is put in train mode, which is said once; parts that are in
            eval mode inside a model in train mode stay so.
        loss: likewise; moved to the model's device.
        optimizer: over the model's parameters and those of the loss.
        estimator: how the gradient is made.
        lanes: sequences side by side, B.
        guards: in order, as `check_guards` returns them.
        scheduler: steps once for each step of the optimizer; ReduceLROnPlateau is left to those who validate.
        ranks: how several processes agree.
        ignored: attributes that are not the model's own, by name, as `SideChanges` takes them.

    Attributes:
        carry: after the last window, or before it, where that is not carried on.
        updates: how many windows there were, those that were refused included.
        snapshots: what to go back to, and the resets owed.
        side: what else has changed since this was made: attributes, buffers and generators of model and loss.

    Raises:
        ConfigError: an optimizer that would not train what it holds, or needs a closure.
        CapabilityError: the model cannot be trained in windows.

    Warns:
        AlarmWarning: a parameter that is in no group of the optimizer; a model in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: StepLoss,
        optimizer: Optimizer,
        estimator: Estimator,
        lanes: int,
        *,
        guards: Sequence[Guard] = (),
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        ranks: Ranks | None = None,
        ignored: Collection[str] = (),
    ) -> None:
        self.model, self.loss, self.optimizer, self.estimator = model, loss, optimizer, estimator
        self.guards, self.scheduler, self.ranks = list(guards), scheduler, ranks or OneRank()
        self.device = next(model.parameters()).device
        if loss.module is not None:
            loss.module.to(self.device)
        self.carry: Carry = estimator.init(model, lanes)
        check_optimizer(optimizer, model, loss)
        for guard in self.guards:
            guard.begin(model, loss.module)
        self.snapshots = Snapshots(self.guards, model, optimizer, scheduler, loss.module)
        modules = [model] if loss.module is None else [model, loss.module]
        self.side = SideChanges(*modules, ignored=ignored)
        self.updates = 0
        self._told: set[str] = set()

    def update(self, window: Window, loss: StepLoss | None = None) -> Updated:
        """Learn from a window, as far as the guards allow.

        Args:
            window: the next one, on the model's device.
            loss: for this window alone; left out: the usual one.
        """
        self._put_in_train_mode()
        self.optimizer.zero_grad()  # the last gradients make room for the next
        window = self.snapshots.with_resets(window)
        own, carry = self.estimator.estimate(self.model, loss or self.loss, self.carry, window)
        raw = self.ranks.reduce(own)
        verdict = guarded(raw, self.guards, self._start(window))
        estimate = verdict if isinstance(verdict, Estimate) else None
        back = verdict if isinstance(verdict, RollBack) else None
        if back is not None:
            self.snapshots.require()  # before anything is changed
        applied = estimate is not None and estimate.num_injected > 0
        rate = float(self.optimizer.param_groups[0]["lr"]) * raw.rate_factor
        if estimate is not None and applied:
            estimate.apply(self.model, self.loss.module)
            with scaled_rate(self.optimizer, estimate.rate_factor):
                self.optimizer.step()
            if isinstance(self.scheduler, LRScheduler) and not isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step()
        # A refused window that broke the state counts as never seen, but for the sequences that it begins.
        carried_on = estimate is not None or (verdict is None and not self.ranks.any(not carry.finite))
        self.updates += 1
        self.snapshots.note(window, carried_on=carried_on)
        undone = 0
        if back is not None:
            undone = self.snapshots.restore(self.updates, self.carry)
        elif carried_on:
            self.carry = carry
        if applied:
            self.snapshots.take(self.updates, self.carry)
        return Updated(window, raw, estimate, back, undone, applied, carried_on, rate)

    def state_dict(self) -> dict[str, Any]:
        """Return all that evolves but the model, the optimizer and its scheduler, which have files of their own."""
        return {
            "carry": self.carry.state_dict(),
            "guards": [guard.state_dict() for guard in self.guards],
            "snapshots": self.snapshots.state_dict(),
            "loss": loss_state(self.loss.module, self.model),
            "side": self.side.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; the model's own comes first.

        Raises:
            CheckpointError: another loss's, or of a version that did not save the loss's parameters.
        """
        self._load_loss(state.get("loss"))
        self.carry.load_state_dict(to(state["carry"], self.device))
        for guard, remembered in zip(self.guards, state["guards"], strict=True):
            guard.load_state_dict(remembered)
        if "snapshots" in state:  # Lightning's checkpoints had none once
            self.snapshots.load_state_dict(state["snapshots"])
        if "side" in state:  # nor had any of an earlier version
            self.side.load_state_dict(state["side"])

    def like(self, own: Callable[[], Mapping[str, Any]], stream: Stream) -> Like:
        """Return what tells of each entry of a saved state what it may be made of, as `tbptt.codec` asks it.

        Args:
            own: returns this run's state, by entry. For what a new run does not have yet, the states of the model, it
                is run on the first window.
            stream: what is trained on; it stays where it is.
        """

        def like(entry: str) -> Any:
            there = own().get(entry)
            if entry not in ("carry", "snapshots"):
                return there
            return there, first_states(self.model, stream, self.estimator.next_steps(self.carry))

        return like

    def unsaved(self) -> str:
        """Say what training changes and no state_dict holds, each place once; empty for nothing new."""
        places = ", ".join(self.side.unsaved())
        return places and (
            f"{places} of {type(self.model).__name__} changes while it trains, but is made of what no checkpoint holds "
            "(objects, functions): a resumed run begins with a new one, and is not the run that was stopped"
        )

    def _load_loss(self, state: dict[str, Any] | None) -> None:
        here = weights_of(loss_state(self.loss.module, self.model))
        if state is None and self.loss.own_parameters(self.model):
            raise CheckpointError(
                f"parameters of the loss were expected ({here}), but this was saved by a version of tbptt that neither "
                "trained nor saved them: going on from others would not be going on",
                fix="start anew, in another directory, with model.load_state_dict(...) for the weights",
            )
        if state is not None and weights_of(state) != here:
            raise CheckpointError(
                f"the loss was expected to be the one that was saved, with {weights_of(state) or 'no weights'}, but it "
                f"has {here or 'none'}: going on with it would not be going on",
                fix="resume with the loss that the run was started with",
            )
        if state:
            load_loss_state(self.loss.module, state)

    def _start(self, window: Window) -> Start:
        """Return what state the window is run from, alike on all ranks, as guards judge by it."""
        start = self.snapshots.start(window)
        if self.ranks.any(start != "sequence") and start == "sequence":
            return "usual"
        return start

    def _put_in_train_mode(self) -> None:
        for name, module in (("model", self.model), ("loss", self.loss.module)):
            if module is None or module.training:
                continue
            module.train()
            if name not in self._told:
                self._told.add(name)
                warnings.warn(
                    f"the {name} was expected in train mode, but is in eval mode, as from_pretrained() and eval() "
                    "leave it: dropout would be off, and statistics frozen, while it learns. It is in train mode from "
                    f"here on\nhint: {name}.train() before training; to train without dropout, put the parts that "
                    f"drop out in eval mode: {name}.dropout.eval()",
                    AlarmWarning,
                    stacklevel=4,
                )


def check_optimizer(optimizer: Optimizer, model: nn.Module, loss: StepLoss) -> None:
    """Refuse an optimizer that cannot be used, or holds what would never get a gradient.

    Raises:
        ConfigError: it needs a closure; or it holds a parameter that is neither the model's nor the loss's.

    Warns:
        AlarmWarning: a parameter requires a gradient and is in no group.
    """
    _refuse_closure(optimizer)
    names = {id(each): name for name, each in named_parameters(model).items()}
    of_loss = {id(each): LOSS_PREFIX + name for name, each in loss.own_parameters(model).items()}
    known = names.keys() | ({id(each) for each in loss.module.parameters()} if loss.module is not None else set())
    held: list[Tensor] = [each for group in optimizer.param_groups for each in group["params"]]
    kind = type(optimizer).__name__
    if not any(id(each) in names for each in held):
        raise ConfigError(
            f"an optimizer over the model's parameters was expected, but this {kind} holds {len(held)} others, and "
            "none of the model's: it was made for another copy, or before the parameters were replaced, and would "
            "train nothing",
            fix=f"torch.optim.{kind}(model.parameters(), ...) with the model that is trained",
        )
    strangers = [each for each in held if id(each) not in known]
    if strangers:
        shapes = ", ".join(str(tuple(each.shape)) for each in strangers[:_SHOWN])
        raise ConfigError(
            f"an optimizer over parameters of the model and of the loss was expected, but {len(strangers)} of the "
            f"{len(held)} that this {kind} holds belong to neither (shapes {shapes}"
            f"{', ...' if len(strangers) > _SHOWN else ''}): they would never get a gradient",
            fix="make what they belong to a part of the model (an encoder: self.encoder = encoder, run in forward), or "
            "the loss an nn.Module that holds them; or leave them out of the optimizer",
        )
    trained = {id(each): name for name, each in trainable_parameters(model).items()} | of_loss
    left_out = [name for key, name in trained.items() if key not in {id(each) for each in held}]
    if left_out:
        shown = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
        warnings.warn(
            f"{len(left_out)} of {len(trained)} parameters that require a gradient are in no group of the optimizer "
            f"({shown}): they will not be trained\nhint: torch.optim.{kind}([*model.parameters(), "
            "*loss.parameters()], ...), or requires_grad_(False) for those that are to stay as they are",
            AlarmWarning,
            stacklevel=4,
        )


def _refuse_closure(optimizer: Optimizer) -> None:
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]  # all but self
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY)
    needed = [each.name for each in parameters if each.default is inspect.Parameter.empty and each.kind in kinds]
    if needed or isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            f"an optimizer that makes a step from one gradient was expected, but {type(optimizer).__name__}.step needs "
            f"{needed[0] if needed else 'closure'!r}, to evaluate the window several times for one step",
            fix="a loop of your own, over the carry before the window:\n"
            "    def closure():\n"
            "        estimate, closure.carry = estimator.estimate(model, loss, carry, window)\n"
            "        estimate.apply(model)\n"
            "        return estimate.loss\n"
            "    optimizer.step(closure)\n"
            "    carry = closure.carry",
        )
