"""What is agreed between ranks: sums of gradients, and the end of a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tbptt.estimators.base import Estimate

__all__ = ["any_rank", "over_ranks"]


def any_rank(flag: bool, trainer: Trainer) -> bool:
    """Return whether it is so on any rank: else one would wait forever for those that go on."""
    if trainer.world_size == 1:
        return flag
    count = torch.tensor(int(flag), device=trainer.strategy.root_device)
    return int(cast(Tensor, trainer.strategy.reduce(count, reduce_op="sum"))) > 0


def over_ranks(estimate: Estimate, trainer: Trainer) -> Estimate:
    """Return the estimate for the lanes of all ranks: sums over all divided by counts over all."""
    if trainer.world_size == 1:
        return estimate

    def total(value: Tensor) -> Tensor:
        return cast(Tensor, trainer.strategy.reduce(value, reduce_op="sum"))

    mine = torch.tensor([estimate.num_injected, estimate.num_terms], device=trainer.strategy.root_device)
    num_injected, num_terms = (int(count) for count in total(mine))
    weights = torch.tensor([estimate.weight, estimate.loss_weight], dtype=torch.float64, device=mine.device)
    weight, loss_weight = cast("list[float]", total(weights).tolist())
    loss_sum = total(estimate.loss_sum.clone())
    share = estimate.weight / weight if weight else 0.0
    gradients = {name: total(gradient * share) for name, gradient in estimate.gradients.items()}
    return replace(
        estimate,
        loss=loss_sum / loss_weight,
        loss_sum=loss_sum,
        num_terms=num_terms,
        gradients=gradients,
        num_injected=num_injected,
        denominator=None if weight == num_injected else weight,
        loss_denominator=None if loss_weight == num_terms else loss_weight,
    )
