"""How a module is trained and how far it has come: the part that knows little of Lightning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from tbptt.checks import check_on_stream
from tbptt.codec import decode, encode
from tbptt.errors import CheckpointError, CheckpointWarning, ConfigError, EndOfStream, StreamError
from tbptt.estimators.base import Carry, Estimator
from tbptt.guards.base import Guard
from tbptt.integrations.lightning.ranks import LightningRanks, any_rank, share_loss
from tbptt.integrations.lightning.refusals import refuse_lengths
from tbptt.loss import Loss, StepLoss
from tbptt.randomness import random_state, set_random_state
from tbptt.streams.base import Stream
from tbptt.update import Updater
from tbptt.window import Window

__all__ = ["Course", "StreamOfRank"]

StreamOfRank: TypeAlias = Callable[[int, int], Stream]
"""`stream(rank, ranks)` -> the stream of the lanes that this rank trains on."""


@dataclass(eq=False)
class Course:
    """How a module is trained, and how far it has come.

    Args:
        estimator, loss, source, guards, monitor, checked, accept: as given to `use_tbptt`.
    """

    estimator: Estimator
    loss: Loss
    source: Stream | StreamOfRank
    guards: list[Guard]
    monitor: str
    checked: bool
    accept: frozenset[str]
    begun: bool = field(default=False, init=False)
    loaded: dict[str, Any] | None = field(default=None, init=False)
    random: dict[str, Any] | None = field(default=None, init=False)  # to be set just before the next update
    side: dict[str, Any] | None = field(
        default=None, init=False
    )  # likewise: validation comes before, and may change it
    ahead: Window | None = field(default=None, init=False)  # the next window, read but not trained on
    stream: Stream = field(init=False)
    updater: Updater = field(init=False)
    place: dict[str, Any] = field(init=False)  # of the last window that was trained on

    def __deepcopy__(self, memo: dict[int, Any]) -> Course:
        del memo  # a copied module - the check's, an average of weights - needs no second recording in memory
        return copy.copy(self)

    @property
    def carry(self) -> Carry:
        """What the estimator carries on from the last update."""
        return self.updater.carry

    def begin(self, module: LightningModule, optimizer: LightningOptimizer) -> None:
        """Take up the place in the stream: the first, that of the last fit, or that of a checkpoint.

        Args:
            optimizer: Lightning's wrapper, which counts the steps and looks after precision.
        """
        trainer = module.trainer
        if not self.begun:
            self.stream = _stream_of_rank(self.source, trainer)
            self.place = self.stream.state_dict()
        before = self.updater.state_dict() if self.begun else None
        loss = StepLoss.of(self.loss)
        self.updater = Updater(
            module,
            loss,
            cast(Any, optimizer),
            self.estimator,
            self.stream.lanes,
            guards=self.guards,
            ranks=LightningRanks(module, loss),
            ignored={*vars(LightningModule()), "_course"},
        )
        if before is not None:  # another fit goes on; the module may have been moved meanwhile
            self.updater.load_state_dict(before)
        else:
            share_loss(loss, trainer)
            refuse_lengths(self.estimator, trainer)
            if self.checked:
                estimator = self.estimator.fixed(self.carry)
                steps = estimator.next_steps(self.carry)
                check_on_stream(module, self.stream, estimator, steps, self.accept).raise_if_failed()
        if trainer.ckpt_path is not None:
            self._restore(module)
        self.loaded, self.begun = None, True

    def next_window(self) -> Window:
        """Return the window to train on, which most often has been read ahead."""
        window = self.ahead
        if window is None:
            try:
                window = self.stream.read(self.estimator.next_steps(self.carry))
            except EndOfStream as end:
                raise StreamError("the stream has no steps, not even after rewind()") from end
        if self.random is not None:
            set_random_state(self.random)
        if self.side is not None:
            self.updater.side.load_state_dict(self.side)
        self.ahead = self.random = self.side = None
        return window

    def read_ahead(self, trainer: Trainer) -> bool:
        """Read the next window, once this one is trained on; return whether the pass is over.

        Only by reading on is it known that a window was the last of its pass.
        """
        self.place = self.stream.state_dict()
        try:
            self.ahead = self.stream.read(self.estimator.next_steps(self.carry))
        except EndOfStream:
            self.ahead = None
        if any_rank(self.ahead is None, trainer):
            if self.ahead is not None:
                warnings.warn(
                    f"rank {trainer.global_rank} was expected to end its pass with the others, but had steps left at "
                    f"step {self.ahead.start}: these are left out of every pass; give all ranks as many steps",
                    stacklevel=2,
                )
            self.stream.rewind()
            self.place, self.ahead = self.stream.state_dict(), None
            return True
        return False

    def about(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        guards = ", ".join(type(guard).__name__ for guard in self.guards)
        return {"estimator": repr(self.estimator), "guards": guards}

    def state_dict(self) -> dict[str, Any]:
        """Return all that evolves, as plain values and tensors that `torch.load(weights_only=True)` reads."""
        if text := self.updater.unsaved():
            warnings.warn(text, CheckpointWarning, stacklevel=3)
        state = {
            **self.updater.state_dict(),
            "place": self.place,
            "ahead": None if self.ahead is None else self.ahead.steps,
            "random": self.random or random_state(),
        }
        tensors: dict[str, Tensor] = {}
        return {"state": encode(state, "tbptt", tensors), "tensors": tensors}

    def _restore(self, module: LightningModule) -> None:
        trainer = module.trainer
        if self.loaded is None:
            raise CheckpointError(
                f"{trainer.ckpt_path} was expected to hold a carry and a place in the stream, but does not: the run "
                "would not go on, it would begin anew with other weights",
                fix="Net.load_from_checkpoint(path), then fit without ckpt_path, if that is what is meant",
            )
        here = {**self.about(), "ranks": trainer.world_size}
        there = {**self.loaded["about"], "ranks": len(self.loaded["ranks"])}
        for name in here:
            if here[name] != there[name]:
                raise CheckpointError(
                    f"{trainer.ckpt_path} belongs to another run: its {name} was expected to be {here[name]}, but is "
                    f"{there[name]}. Going on from it would not be going on",
                    fix="resume with what the run was started with",
                )
        mine = self.loaded["ranks"][trainer.global_rank]
        like = self.updater.like(lambda: {**self.updater.state_dict(), "place": self.place}, self.stream)
        state = decode(mine["state"], mine["tensors"], like, "tbptt")
        self.updater.load_state_dict(state)
        self.place = state["place"]
        self.stream.load_state_dict(self.place)
        self.ahead = None if state["ahead"] is None else self.stream.read(state["ahead"])
        self.random, self.side = state["random"], state.get("side")


def _stream_of_rank(source: Stream | StreamOfRank, trainer: Trainer) -> Stream:
    if callable(source):
        return source(trainer.global_rank, trainer.world_size)
    if trainer.world_size > 1:
        raise ConfigError(
            f"a function that gives each of the {trainer.world_size} ranks lanes of its own was expected, but one "
            "stream came: every rank would train on the same data",
            fix="self.use_tbptt(estimator, loss, lambda rank, ranks: ArrayStream(parts[rank], lanes=8))",
        )
    return source
