"""Ranks: processes that train one model together, each on lanes of its own, and what they must agree on."""

from __future__ import annotations

import os
from typing import Protocol

from torch import distributed

from tbptt.errors import ConfigError
from tbptt.estimators.base import Estimate

__all__ = ["OneRank", "Ranks", "num_ranks", "refuse_ranks"]


class Ranks(Protocol):
    """How an update comes to be the same on all ranks. Every rank calls each of these as often, in the same order."""

    def reduce(self, estimate: Estimate) -> Estimate:
        """Return the estimate of the lanes of all ranks."""
        ...

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank."""
        ...


class OneRank:
    """A process on its own: there is nothing to agree on."""

    def reduce(self, estimate: Estimate) -> Estimate:
        """Return the estimate."""
        return estimate

    def any(self, flag: bool) -> bool:
        """Return `flag`."""
        return flag


def num_ranks() -> int:
    """Return how many processes take part in this run: of torch.distributed, or as torchrun says (WORLD_SIZE)."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    said = os.environ.get("WORLD_SIZE", "1")
    return int(said) if said.isdecimal() else 1


def refuse_ranks(who: str) -> None:
    """Refuse to train with something that does not sum gradients over ranks, where there are several.

    Args:
        who: would train, for people, such as "Trainer".

    Raises:
        ConfigError: this process is one of several.
    """
    ranks = num_ranks()
    if ranks > 1:
        raise ConfigError(
            f"one process was expected, since {who} does not sum gradients over ranks, but this is one of {ranks} "
            "(torch.distributed, or WORLD_SIZE in the environment): each would train a model of its own on the same "
            "data, and the models would drift apart",
            fix="tbptt.integrations.lightning.TBPTTMixin with Trainer(strategy='ddp'), or a loop with Accelerate as in "
            "examples/accelerate_loop.py; on one GPU: CUDA_VISIBLE_DEVICES=0 python train.py, without torchrun",
        )
