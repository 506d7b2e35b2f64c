"""The Mamba of the mambapy package, as a model that carries its state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tbptt.adapters import Stateful, stateful
from tbptt.tree import Tree

__all__ = ["recurrent"]


def recurrent(module: nn.Module) -> Stateful:
    """Make a model of a `mambapy.mamba.Mamba`, of inputs (T, B, D), run by its `step`.

    Only `step` takes a state, so it is slower than its `forward`, which computes a whole sequence at once.
    Under a language model of mambapy this is the part that has the state: `recurrent(lm.mamba)`.

    Exactness: against the module's own `forward` (tests/integrations/test_libraries.py, mambapy 1.2.0).
    """
    return stateful(module, _step, one_step=True, initial=lambda lanes: _empty(module, lanes))


def _step(module: Any, inputs: Tensor, state: Tree | None) -> tuple[Tensor, Tree]:
    return module.step(inputs, _empty(module, inputs.shape[0]) if state is None else state)


def _empty(module: Any, lanes: int) -> Tree:
    """Return caches of zeros: of None, as mambapy's own are at first, no single lane could be reset."""
    config = module.config
    like: Tensor = module.layers[0].mixer.in_proj.weight
    return [
        (
            like.new_zeros(lanes, config.d_inner, config.d_state),
            like.new_zeros(lanes, config.d_inner, config.d_conv - 1),
        )
        for _ in module.layers
    ]
