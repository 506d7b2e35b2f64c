"""From a configuration to everything that the trainer takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from tbptt.cli.config import Config, Model, Schedule
from tbptt.cli.data import Opened, open_source
from tbptt.cli.rundir import Facts, Record
from tbptt.errors import ConfigError
from tbptt.estimators import Estimator, SyntheticGradients
from tbptt.guards import AdaptiveClip, ClipNorm, ClipValue, Guard, NonFinite, SpikeRollback, ZClip
from tbptt.length import Length
from tbptt.metrics import Metric, metric
from tbptt.models import SegmentTransformer, SequenceModel
from tbptt.randomness import seed_everything

__all__ = [
    "Parts",
    "build",
    "build_guards",
    "build_loss",
    "build_metrics",
    "build_model",
    "build_optimizer",
    "rate_until",
    "use_threads",
]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a run is made of.

    Args:
        updates: how many it will make in all, as far as is known beforehand.
        schedule_updates: how long its learning-rate schedule is.
    """

    model: nn.Module
    loss: nn.Module
    optimizer: Optimizer
    scheduler: lr_scheduler.LambdaLR | None
    estimator: Estimator
    guards: list[Guard]
    metrics: dict[str, Metric]
    data: Opened
    updates: int
    schedule_updates: int


def build(config: Config, record: Record | None = None) -> Parts:
    """Build a run; the same one, bit for bit, whenever the configuration is the same.

    Args:
        config: the run.
        record: of the run as it was started, if it goes on; its data must be the same.

    Raises:
        TbpttError: for data that cannot be read, and for settings that cannot be meant.
    """
    data = open_source(config, None if record is None else record.facts)
    estimator = config.build_estimator()
    seed_everything(config.run.seed)
    model = build_model(config, data.facts)
    optimizer = build_optimizer(config, estimator, model)
    steps = estimator.next_steps(estimator.init(model, data.train.lanes))
    _refuse_unknown_end(config, estimator)
    updates = _num_updates(config, data, steps)
    schedule_updates = config.schedule.updates or (updates if record is None else record.schedule_updates)
    if updates > rate_until(config.schedule, schedule_updates):
        _refuse_rate_of_zero(config, updates, schedule_updates, resumed=record is not None)
    return Parts(
        model=model,
        loss=build_loss(data.facts),
        optimizer=optimizer,
        scheduler=_scheduler(optimizer, config.schedule, schedule_updates),
        estimator=estimator,
        guards=build_guards(config),
        metrics=build_metrics(data.facts),
        data=data,
        updates=updates,
        schedule_updates=schedule_updates,
    )


def build_model(config: Config, facts: Facts) -> nn.Module:
    """Return the model of a run, its weights fresh, with what its estimator needs in it.

    Raises:
        ConfigError: settings of [model] that cannot be meant together.
    """
    settings = config.model
    try:
        model = _transformer(settings, facts) if settings.core == "transformer" else _recurrent(settings, facts)
    except ConfigError as error:
        raise ConfigError(f"in [model], {_in_toml(error.message)}", fix=_in_toml(error.fix)) from error
    size = (settings.segment or 1, 1)  # a whole segment: nothing could go on from one step of it
    example = torch.zeros(size, dtype=torch.int64) if facts.symbols else torch.zeros(*size, facts.inputs)
    config.build_estimator().prepare(model, example)
    return model


def _recurrent(settings: Model, facts: Facts) -> SequenceModel:
    assert settings.core != "transformer"
    return SequenceModel(
        facts.inputs,
        facts.outputs,
        hidden=settings.hidden,
        embedding=_embedding(settings, facts),
        core=settings.core,
        dropout=settings.dropout,
        **settings.own(),
    )


def _transformer(settings: Model, facts: Facts) -> SegmentTransformer:
    return SegmentTransformer(
        facts.inputs,
        facts.outputs,
        settings.hidden,
        embedding=_embedding(settings, facts),
        dropout=settings.dropout,
        **settings.own(),
    )


def _embedding(settings: Model, facts: Facts) -> int | None:
    return (settings.embedding or settings.hidden) if facts.symbols else None


def _in_toml(text: str) -> str:
    return text.replace("width=", "hidden=")  # its name in the section, where all cores have one


def build_loss(facts: Facts) -> nn.Module:
    """Return the loss of a run."""
    kinds = {"cross_entropy": nn.CrossEntropyLoss, "bce": nn.BCEWithLogitsLoss, "mse": nn.MSELoss}
    return kinds[facts.loss]()


def build_metrics(facts: Facts) -> dict[str, Metric]:
    """Return what a run is judged by, besides its loss."""
    return {shown: metric(name) for shown, name in facts.metrics.items()}


def build_optimizer(config: Config, estimator: Estimator, model: nn.Module) -> Optimizer:
    """Return the optimizer of a run, over the model's parameters."""
    return config.optimizer.kind(_groups(config, estimator, model), **config.optimizer.arguments())


def use_threads(config: Config) -> Config:
    """Set torch's threads as the run says; return the run with their number, be it torch's own choice."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return config.changed("run", threads=torch.get_num_threads())


def _groups(config: Config, estimator: Estimator, model: nn.Module) -> Iterable[Any]:
    """Return what the optimizer moves, in groups where they have rates of their own."""
    rate = config.optimizer.predictor_lr
    if rate is None:
        return model.parameters()
    if not isinstance(estimator, SyntheticGradients):
        raise ConfigError(
            f"an estimator with a predictor was expected, as optimizer.predictor_lr is set, but it is {estimator}: "
            "the setting would have no effect",
            fix="leave optimizer.predictor_lr out; or --set estimator.name=SyntheticGradients",
        )
    return estimator.parameter_groups(model, lr=config.optimizer.lr, predictor_lr=rate)


def rate_until(schedule: Schedule, schedule_updates: int) -> float:
    """Return how many updates have a learning rate above 0, with a schedule of that length."""
    if schedule.name != "cosine" or schedule.final > 0:
        return math.inf
    return max(schedule_updates, schedule.warmup + 1)


def _refuse_rate_of_zero(config: Config, updates: int, schedule_updates: int, *, resumed: bool) -> None:
    if resumed:
        until = f"--passes {config.run.passes}" if config.run.updates is None else f"--updates {updates}"
        fix = (
            f"tbptt resume RUN {until} --schedule-updates {updates}, with which the rate rises once more; or "
            f"tbptt train --config RUN/config.toml {until} for a run in which it only falls"
        )
    else:
        fix = f"--set schedule.updates={updates}; or --set schedule.final=0.1, which keeps a tenth of the rate"
    raise ConfigError(
        f"a learning-rate schedule of {updates} updates was expected, as many as are to be made, but it ends at update "
        f"{schedule_updates}, with schedule.final = 0: after it the rate is 0, and nothing is learned",
        fix=fix,
    )


class LambdaLR(lr_scheduler.LambdaLR):
    """torch's, by the same name, which checkpoints have; a schedule that was made longer holds at once."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the number of updates, and set the rate that the schedule has after them."""
        super().load_state_dict(state_dict)
        shares = [share(self.last_epoch) for share in self.lr_lambdas]
        self._last_lr = [rate * share for rate, share in zip(self.base_lrs, shares, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def _refuse_unknown_end(config: Config, estimator: Estimator) -> None:
    """Refuse a schedule that ends with the last pass, where nobody knows how many updates a pass will have."""
    k1: object = getattr(estimator, "k1", None)
    decays = config.schedule.name != "constant"
    varies = k1 is None or isinstance(k1, Length)  # without a k1 the windows' lengths are drawn
    if varies and decays and config.run.updates is None and config.schedule.updates is None:
        raise ConfigError(
            f"the number of updates was expected, as the learning rate is to fall until the end, but the "
            f"windows of {estimator} are not all alike: how many updates a pass has is not known beforehand",
            fix="--updates 5000; or --set schedule.updates=5000; or --set schedule.name=constant",
        )


def _num_updates(config: Config, data: Opened, steps: int) -> int:
    of_passes = None if config.run.passes is None else config.run.passes * math.ceil(data.steps / steps)
    return min(each for each in (config.run.updates, of_passes) if each is not None)


def _scheduler(optimizer: Optimizer, schedule: Schedule, updates: int) -> LambdaLR | None:
    if schedule.name == "constant" and not schedule.warmup:
        return None

    def share(update: int) -> float:
        if update < schedule.warmup:
            return (update + 1) / (schedule.warmup + 1)
        if schedule.name == "constant":
            return 1.0
        done = min(1.0, (update - schedule.warmup) / max(1, updates - schedule.warmup))
        return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimizer, share)


def build_guards(config: Config) -> list[Guard]:
    """Return the guards, in the order in which the section has them."""
    chosen, bias = config.guards, config.guards.allow_bias is True
    guards: list[Guard] = [NonFinite(chosen.non_finite)]
    if chosen.spike_rollback is not None:
        guards.append(SpikeRollback(chosen.spike_rollback, allow_bias=bias))
    if chosen.clip_value is not None:
        guards.append(ClipValue(chosen.clip_value, allow_bias=bias))
    if chosen.adaptive_clip is not None:
        guards.append(AdaptiveClip(chosen.adaptive_clip, allow_bias=bias))
    if chosen.z_clip is not None:
        guards.append(ZClip(chosen.z_clip, allow_bias=bias))
    if chosen.clip_norm:  # 0 is none
        guards.append(ClipNorm(chosen.clip_norm, allow_bias=bias))
    return guards
