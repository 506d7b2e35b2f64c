"""The state of every global random generator, as plain values and tensors."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch

from tbptt.errors import CheckpointWarning

__all__ = ["random_state", "seed_everything", "set_random_state"]


def seed_everything(seed: int) -> None:
    """Seed torch's, numpy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of torch's, numpy's and Python's global generators.

    CUDA's are among them only once CUDA is in use: asking would start it.

    Example:
        >>> before = random_state()
        >>> first = torch.rand(3)
        >>> set_random_state(before)
        >>> torch.equal(first, torch.rand(3))
        True
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Take over what `random_state` returned.

    Warns:
        CheckpointWarning: there are fewer CUDA devices than there were, so that those generators are lost.
    """
    torch.set_rng_state(state["torch"])
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator, device)
    if len(state["cuda"]) > torch.cuda.device_count():
        warnings.warn(
            f"the random generators of {len(state['cuda'])} CUDA devices were saved, but "
            f"{torch.cuda.device_count()} are here: from here on the run differs from one that never stopped",
            CheckpointWarning,
            stacklevel=2,
        )
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
