"""The models of the xlstm package, as models that carry their state."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError
from tbptt.tree import Tree

__all__ = ["block_stack", "large"]


def block_stack(module: nn.Module, *, in_place: Literal["auto", "protect", "leave"] = "auto") -> Stateful:
    """Make a model of an `xLSTMBlockStack` or an `xLSTMLMModel`, run by their `step`.

    Only `step` takes a state, so it is slower than their `forward`, which computes a whole sequence at once.

    Args:
        module: the stack, of inputs (T, B, D), or the language model, of token ids (T, B).
        in_place: see `tbptt.stateful`.

    Exactness: against the module's own `forward` (tests/integrations/test_libraries.py, xlstm 2.0.6).
    """
    return stateful(module, _step, max_steps=1, in_place=in_place)


def large(module: nn.Module, *, in_place: Literal["auto", "protect", "leave"] = "auto") -> Stateful:
    """Make a model of an `xLSTMLarge`, of token ids (T, B).

    Args:
        module: built with return_last_states=True. In mode "train" it takes multiples of its chunk_size only;
            in mode "inference", with native kernels, any number of steps, and its gradient is right too.
        in_place: see `tbptt.stateful`.

    Raises:
        CapabilityError: built with return_last_states=False, so that its state cannot be had.

    Exactness: against its pass over the whole sequence (tests/integrations/test_libraries.py, xlstm 2.0.6).
    """
    config: Any = module.config
    if not config.return_last_states:
        raise CapabilityError(
            "an xLSTMLarge that returns its state was expected, but its return_last_states is False: every window "
            "would start from nothing",
            fix="xLSTMLargeConfig(..., return_last_states=True)",
        )
    return stateful(module, batch_first=True, in_place=in_place)


def _step(module: Any, inputs: Tensor, state: Tree | None) -> tuple[Tensor, Tree]:
    outputs, state = module.step(inputs.transpose(0, 1), state=state)
    return outputs.transpose(0, 1), state
