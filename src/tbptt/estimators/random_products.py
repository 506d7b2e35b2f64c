"""What methods need that carry influence as one random product: signs, and the sizes of its two factors.

Letters: B lanes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["balance", "norms_of", "signs", "spread"]

_PURPOSE = 0x554F524F
"""Keeps these signs apart from all else that is drawn from a seed and a number, such as the data of a stream."""


def signs(about: tuple[int, ...], like: Tensor) -> Tensor:
    """Return random signs of this shape: the same on every machine and device.

    Args:
        about: the seed and what tells this draw from others.
        like: of the wanted shape, type and device.
    """
    drawn = np.random.default_rng((*about, _PURPOSE)).integers(0, 2, tuple(like.shape)) * 2 - 1
    return torch.from_numpy(drawn).to(dtype=like.dtype, device=like.device)


def spread(about: tuple[int, ...], size: int, like: Tensor) -> Tensor:
    """Return as many random factors between 1 and 2, which tell numbers apart: the same on every machine and device.

    Args:
        about: what tells this draw from others.
        size: how many.
        like: of the wanted type and device.
    """
    drawn = np.random.default_rng(about).uniform(1.0, 2.0, size)
    return torch.from_numpy(drawn).to(dtype=like.dtype, device=like.device)


def norms_of(vectors: dict[str, Tensor], like: Tensor) -> Tensor:
    """Return each lane's norm over all of them. Shape (B,)."""
    total = like.new_zeros(len(like))
    for each in vectors.values():
        total = total + each.square().sum(1).to(like.dtype)
    return total.sqrt()


def balance(weights: Tensor, state: Tensor) -> Tensor:
    """Return (|weights| / |state|)^(1/2), which makes the variance least; 1 where either is 0 and nothing is mixed."""
    known = (weights > 0) & (state > 0)
    return torch.where(known, weights / torch.where(known, state, 1.0), 1.0).sqrt()
