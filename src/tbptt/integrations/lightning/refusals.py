"""Settings that would have no effect with TBPTT, or another one than meant: none of them is ignored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tbptt.errors import ConfigError
from tbptt.estimators import Estimator
from tbptt.length import Adaptive

__all__ = ["plateaus", "refuse_lengths", "refuse_optimizers", "refuse_overridden", "refuse_settings"]

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")
_NOT_CALLED = {
    "training_step": "class Net(TBPTTMixin, YourModule), the mixin first, without a training_step of its own",
    "train_dataloader": "self.use_tbptt(estimator, loss, stream): the windows come from the stream",
    "backward": "an Estimator of your own: it makes the gradient",
    "configure_gradient_clipping": "self.use_tbptt(..., guards=[NonFinite(), ClipNorm(1.0)])",
    "optimizer_step": "self.use_tbptt(..., guards=[...]) for what is done to gradients before the step",
    "optimizer_zero_grad": "leave it out: gradients are replaced, not added up",
}


def refuse_lengths(estimator: Estimator, trainer: Trainer) -> None:
    """Refuse lengths that follow the data where there are several ranks, each with data of its own.

    Raises:
        ConfigError: there is one.
    """
    adaptive = [each for each in vars(estimator).values() if isinstance(each, Adaptive)]
    if adaptive and trainer.world_size > 1:
        raise ConfigError(
            f"lengths that are the same on all {trainer.world_size} ranks were expected, but {adaptive[0]} follows the "
            "data of its own rank: windows would not be alike, and ranks would wait for each other forever",
            fix="tbptt.horizon.measure(...).recommend(0.1) for a fixed one, or devices=1",
        )


class _Refused(NamedTuple):
    is_set: bool
    came: str
    why: str
    fix: str


def refuse_overridden(module: LightningModule, mixin: type[LightningModule]) -> None:
    """Refuse a module whose own hooks stand in the way of the mixin's, or would never be called.

    Raises:
        ConfigError: the first such hook.
    """
    kind = type(module)
    for name, fix in _NOT_CALLED.items():
        if getattr(kind, name) is not getattr(mixin, name):
            raise ConfigError(
                f"{kind.__name__} was expected to leave {name} to {mixin.__name__}, but has one of its own: it would "
                "take the place of TBPTT, or never be called",
                fix=fix,
            )


def refuse_settings(module: LightningModule) -> None:
    """Refuse settings of the trainer that would have no effect, or another one than meant.

    Raises:
        ConfigError: the first such setting.
    """
    if module.automatic_optimization:
        raise ConfigError(
            "automatic_optimization=False was expected, as use_tbptt sets it, but is True: Lightning would look for a "
            "graph behind the loss, which the estimator has used up",
            fix="leave automatic_optimization alone after self.use_tbptt(...)",
        )
    for refused in (*_of_gradients(module.trainer), *_of_the_run(module.trainer)):
        if refused.is_set:
            raise ConfigError(
                f"{refused.came} was not expected with TBPTT, but is set: {refused.why}",
                fix=refused.fix,
            )


def _of_gradients(trainer: Trainer) -> Iterator[_Refused]:
    clip = trainer.gradient_clip_val
    guard = "ClipValue" if trainer.gradient_clip_algorithm == "value" else "ClipNorm"
    yield _Refused(
        bool(clip),
        f"Trainer(gradient_clip_val={clip})",
        "gradients are clipped by guards, after they are summed over ranks",
        f"self.use_tbptt(..., guards=[NonFinite(), {guard}({clip})])",
    )
    yield _Refused(
        trainer.accumulate_grad_batches != 1,
        f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})",
        "each window is one update, and how many steps it has is k1",
        'Trainer(accumulate_grad_batches=1), and longer windows: TBPTT(k1=128, k2=64, losses="all")',
    )


def _of_the_run(trainer: Trainer) -> Iterator[_Refused]:
    overfit = cast(Any, trainer).overfit_batches  # set, but not declared
    yield _Refused(
        bool(overfit),
        f"Trainer(overfit_batches={overfit})",
        "a stream moves on, and does not read the same windows again and again",
        "Trainer(overfit_batches=0), and a stream over a short recording",
    )
    yield _Refused(
        trainer.precision not in _PRECISIONS,
        f"Trainer(precision={trainer.precision!r})",
        "gradients are not scaled here, nor windows converted to half precision",
        'Trainer(precision="bf16-mixed"), "32-true" or "64-true"',
    )
    yield _Refused(
        not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)),
        f"the strategy {type(trainer.strategy).__name__}",
        "every rank must hold all parameters",
        'Trainer(strategy="ddp"), or one device',
    )
    timed = "'train_time_interval': datetime"  # what it was given is shown there, and nowhere else in public
    yield _Refused(
        any(isinstance(each, ModelCheckpoint) and timed in each.state_key for each in trainer.checkpoint_callbacks),
        "ModelCheckpoint(train_time_interval=...)",
        "Lightning writes no checkpoint by time where a module optimizes by itself",
        "ModelCheckpoint(every_n_train_steps=1000)",
    )


def refuse_optimizers(module: LightningModule) -> None:
    """Refuse what `configure_optimizers` returns, where it cannot be followed.

    Raises:
        ConfigError: not one optimizer, or a plateau scheduler without validation.
    """
    count = len(module.trainer.optimizers)
    if count != 1:
        raise ConfigError(
            f"one optimizer was expected, but configure_optimizers returns {count}: an update has one gradient",
            fix="one optimizer with several parameter groups",
        )
    if plateaus(module.trainer) and not module.trainer.enable_validation:
        raise ConfigError(
            "validation was expected, for ReduceLROnPlateau to step on, but there is none: the learning rate would "
            "never fall",
            fix='def validation_step(self, batch, batch_idx): self.log("val_loss", ...), and a val_dataloader',
        )


def plateaus(trainer: Trainer) -> list[ReduceLROnPlateau]:
    """Return the schedulers that step by what they see."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [each for each in schedulers if isinstance(each, ReduceLROnPlateau)]
