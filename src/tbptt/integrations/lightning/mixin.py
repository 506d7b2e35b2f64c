"""The mixin: Lightning's hooks, and what each of them does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimator
from tbptt.guards.base import Guard, check_guards
from tbptt.guards.nonfinite import NonFinite
from tbptt.integrations.lightning.course import Course, StreamOfRank
from tbptt.integrations.lightning.refusals import plateaus, refuse_optimizers, refuse_overridden, refuse_settings
from tbptt.loss import Loss
from tbptt.streams.base import Stream
from tbptt.window import Window

__all__ = ["TBPTTMixin"]

KEY = "tbptt"
_NO_ROLL_BACK = (
    "Lightning's callbacks, schedulers and averages of weights would not go back with them, and ranks, each with "
    "a loss of its own, could disagree on it"
)


class _Turn:
    """What Lightning is given for a batch; the window is read when its length is known."""


class _Turns:
    """Turns without end: Lightning takes them before their time, which costs nothing and reads nothing."""

    def __iter__(self) -> Iterator[_Turn]:
        while True:
            yield _Turn()


class TBPTTMixin(LightningModule):
    """Train a LightningModule on a stream with truncated backpropagation through time.

    Name it before the module that it is mixed into, if there is one, and call `use_tbptt` in `__init__`. The
    module itself is the model: `forward(inputs, state) -> (outputs, state)`, time first. An epoch is one pass
    over the stream, or `limit_train_batches` windows of it; `global_step` counts the updates that were made.

    An update that a guard refuses, or that has no loss to learn from, changes no weight and does not count. Logged
    are `train_loss`, `refused` and whatever guards measure. Schedulers with `interval="step"` step once an update,
    those with "epoch" (Lightning's default) once an epoch, ReduceLROnPlateau once a validation.

    For validation write `validation_step` as ever. A held-out stream is one batch of its own:

        def val_dataloader(self):
            return [0]

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", tbptt.evaluate(self, nn.MSELoss(), held_out)["loss"], batch_size=1)

    With several ranks (DDP) the gradients are summed over them, each by the number of its losses, before the guards.
    Each rank has lanes of its own, which a function of (rank, ranks) gives in the place of the stream. A pass ends
    for all ranks when it ends for one: give them equal shares. They must be as many when a run is resumed.

    Hooks in use, for `super()` in a subclass: configure_callbacks, on_fit_start, on_validation_epoch_end,
    on_save_checkpoint, on_load_checkpoint.

    Example:
        >>> from lightning import Trainer
        >>> from torch import nn
        >>> from tbptt import TBPTT, ArrayStream
        >>> class Net(TBPTTMixin):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.core = nn.GRU(1, 1)
        ...         stream = ArrayStream(torch.randn(80, 1), torch.randn(80, 1), lanes=2)
        ...         self.use_tbptt(TBPTT(k1=8, k2=16), nn.MSELoss(), stream)
        ...
        ...     def forward(self, inputs, state=None):
        ...         return self.core(inputs, state)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> trainer.fit(Net())
        >>> trainer.global_step
        10
    """

    _course: Course | None = None

    def use_tbptt(
        self,
        estimator: Estimator,
        loss: Loss,
        stream: Stream | StreamOfRank,
        *,
        guards: Sequence[Guard] | None = None,
        monitor: str = "val_loss",
        checked: bool = True,
    ) -> None:
        """Say how this module is trained; call it in `__init__`, after `super().__init__()`.

        Args:
            estimator: how the gradient is made, for example `TBPTT(k1=64, k2=128)`.
            loss: losses by step, or one of torch.nn's own. A module with parameters of its own, which
                `configure_optimizers` gives to the optimizer, is trained, saved and resumed with this one.
            stream: where the windows come from, or, for several ranks, a function of (rank, ranks) that returns it.
            guards: in order, between estimate and optimizer. Left out: `NonFinite("raise")`. Refused are those that
                change the mean of an unbiased estimator without `allow_bias=True`, and `SpikeRollback`.
            monitor: the metric that ReduceLROnPlateau watches, as validation logs it.
            checked: whether `tbptt.check` runs when a fit begins. Leave it on.
        """
        self.automatic_optimization = False
        given: Sequence[Guard] = [NonFinite("raise")] if guards is None else guards
        chosen = check_guards(given, estimator, no_roll_back=_NO_ROLL_BACK)
        self._course = Course(estimator, loss, stream, chosen, monitor, checked)

    @property
    def tbptt_course(self) -> Course:
        """What `use_tbptt` has set up, and the carry."""
        if self._course is None:
            raise ConfigError(
                f"{type(self).__name__} was expected to say how it is trained, but use_tbptt was not called",
                fix="self.use_tbptt(TBPTT(k1=64, k2=128), loss, stream) in __init__",
            )
        return self._course

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Add none; it is Lightning's first hook, and settings are refused before anything is done with them."""
        if self.trainer.state.fn == "fit":
            self._refuse()
        return super().configure_callbacks()

    def on_fit_start(self) -> None:
        """Check the model, and take up the place in the stream."""
        super().on_fit_start()
        self._refuse()  # again, for a subclass may have no use for the hook before
        refuse_optimizers(self)
        self.tbptt_course.begin(self, cast(LightningOptimizer, self.optimizers()))

    def train_dataloader(self) -> _Turns:
        """Return turns; the windows are read from the stream, each when it is needed."""
        return _Turns()

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        """Read a window, estimate, and update; returns the window's loss."""
        course = self.tbptt_course
        if not isinstance(batch, _Turn):
            raise ConfigError(
                f"no data loader was expected, but Lightning was given one of {type(batch).__name__}: the windows "
                "come from the stream, and what a loader holds would be ignored",
                fix="trainer.fit(net), and the data in self.use_tbptt(estimator, loss, stream)",
            )
        if not course.begun:
            raise ConfigError(
                f"{type(self).__name__}.on_fit_start was expected to reach TBPTTMixin, but did not: the model is not "
                "checked and no place in the stream taken up",
                fix="super().on_fit_start() in it",
            )
        found = course.updater.update(self._on_device(course.next_window()))
        seen = found.seen
        if seen.num_terms:
            self.log("train_loss", seen.loss, prog_bar=True, batch_size=seen.num_terms)
        self.log_dict({**seen.metrics, "refused": float(found.estimate is None)})
        if course.read_ahead(self.trainer):
            # What ends the epoch, with its validation and checkpoints: Lightning itself sets it where it knows.
            self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True
        epoch_over = self.trainer.is_last_batch or batch_idx + 1 == self.trainer.num_training_batches
        if found.applied:
            self._step_schedulers("step", self.trainer.global_step)
        if epoch_over:
            self._step_schedulers("epoch", self.current_epoch + 1)
        return seen.loss

    def on_validation_epoch_end(self) -> None:
        """Let ReduceLROnPlateau see what was measured; before checkpoints are written, which then hold what it did."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            for scheduler in plateaus(self.trainer):
                self.lr_scheduler_step(scheduler, self._monitored())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the carry, the place in the stream, the guards and the random generators of every rank."""
        super().on_save_checkpoint(checkpoint)
        if self._course is not None and self._course.begun:
            mine = self._course.state_dict()
            ranks = [mine] * self.trainer.world_size
            if len(ranks) > 1:
                torch.distributed.all_gather_object(ranks, mine)
            checkpoint[KEY] = {"about": self._course.about(), "ranks": ranks}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `on_save_checkpoint` added until the fit begins."""
        super().on_load_checkpoint(checkpoint)
        if self._course is not None:
            self._course.loaded = checkpoint.get(KEY)

    def _refuse(self) -> None:
        refuse_overridden(self, TBPTTMixin)
        _ = self.tbptt_course  # there is none without use_tbptt, which is what must be said first
        refuse_settings(self)

    def _on_device(self, window: Window) -> Window:
        window = window.to(self.device)
        if self.trainer.precision != "64-true":
            return window
        convert = self.trainer.precision_plugin.convert_input
        return replace(window, inputs=convert(window.inputs), targets=convert(window.targets))

    def _monitored(self) -> Tensor:
        name, metrics = self.tbptt_course.monitor, self.trainer.callback_metrics
        if name not in metrics:
            raise ConfigError(
                f"the metric {name!r} was expected for ReduceLROnPlateau, but validation has logged {sorted(metrics)}: "
                "the learning rate would never fall",
                fix=f'self.log("{name}", ...) in validation_step, or use_tbptt(..., monitor="another")',
            )
        return metrics[name]

    def _step_schedulers(self, interval: str, count: int) -> None:
        watching = plateaus(self.trainer)
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and count % config.frequency == 0
            if due and config.scheduler not in watching:
                self.lr_scheduler_step(config.scheduler, None)
