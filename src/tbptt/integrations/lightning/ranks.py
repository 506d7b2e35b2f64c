"""What is agreed between ranks: sums of gradients, weights of the loss at the start, and the end of a pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from tbptt.estimators.base import Estimate
from tbptt.loss import StepLoss
from tbptt.model import trainable_parameters

__all__ = ["LightningRanks", "any_rank", "share_loss"]


def any_rank(flag: bool, trainer: Trainer) -> bool:
    """Return whether it is so on any rank: else one would wait forever for those that go on."""
    if trainer.world_size == 1:
        return flag
    return _total(torch.tensor(int(flag), device=trainer.strategy.root_device), trainer).item() > 0


def share_loss(loss: StepLoss, trainer: Trainer) -> None:
    """Give the loss the weights that it has on the first rank, as DDP does with those of the module."""
    if trainer.world_size > 1 and loss.module is not None:
        loss.module.load_state_dict(trainer.strategy.broadcast(loss.module.state_dict()))


@dataclass(frozen=True, eq=False)
class LightningRanks:
    """How Lightning's ranks come to make the same update.

    Args:
        module: that is trained.
        loss: likewise.
    """

    module: LightningModule
    loss: StepLoss

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank."""
        return any_rank(flag, self.module.trainer)

    def reduce(self, estimate: Estimate) -> Estimate:
        """Return the estimate for the lanes of all ranks: sums over all divided by counts over all.

        A rank whose losses do not reach a parameter, or that has none, adds zeros to its gradient; a parameter that no
        rank has a gradient of has none.
        """
        trainer = self.module.trainer
        if trainer.world_size == 1:
            return estimate
        named = trainable_parameters(self.module)
        of_loss = self.loss.own_parameters(self.module)
        found = estimate if estimate.num_injected else replace(estimate, gradients={}, loss_gradients={})
        mine = [found.gradients.get(name) for name in named] + [found.loss_gradients.get(name) for name in of_loss]
        device = trainer.strategy.root_device
        weights = [estimate.weight, estimate.loss_weight]
        counts = [estimate.num_injected, estimate.num_terms, *weights, *(each is not None for each in mine)]
        injected, terms, weight, loss_weight, *held = _total(
            torch.tensor(counts, dtype=torch.float64, device=device), trainer
        ).tolist()
        share = estimate.weight / weight if weight else 0.0
        parameters = [*named.values(), *of_loss.values()]
        sums = [
            _total(torch.zeros_like(parameter) if gradient is None else _dense(gradient) * share, trainer)
            if any_has
            else None
            for parameter, gradient, any_has in zip(parameters, mine, held, strict=True)
        ]
        loss_sum = _total(estimate.loss_sum.clone(), trainer)
        return replace(
            estimate,
            loss=loss_sum / loss_weight,
            loss_sum=loss_sum,
            num_terms=int(terms),
            gradients=_named(named, sums[: len(named)]),
            loss_gradients=_named(of_loss, sums[len(named) :]),
            num_injected=int(injected),
            denominator=None if weight == injected else weight,
            loss_denominator=None if loss_weight == terms else loss_weight,
        )


def _total(value: Tensor, trainer: Trainer) -> Tensor:
    return cast(Tensor, trainer.strategy.reduce(value, reduce_op="sum"))


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as all ranks can add it: another one's, of an embedding, is sparse in other rows."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _named(names: dict[str, Any], sums: list[Tensor | None]) -> dict[str, Tensor]:
    return {name: each for name, each in zip(names, sums, strict=True) if each is not None}
