"""Recurrent modules and policies of TorchRL, as models that carry their state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError
from tbptt.tree import Tree

__all__ = ["recurrent"]

Key: TypeAlias = str | tuple[str, ...]


def recurrent(module: nn.Module, *, outputs: Key | None = None) -> Stateful:
    """Make a model of an `LSTMModule`, a `GRUModule`, or a policy of TensorDict modules that has such in it.

    It is run in recurrent mode, a window at a time; where a lane starts anew is said by the window's resets,
    not by `is_init`.

    Args:
        module: has one input besides its states, and hands each state `name` on as `("next", name)`.
        outputs: key of what the losses are computed from; left out: the last one that is no state.

    Returns:
        A model of inputs (T, B, ...). Its state is a dict of tensors (B, layers, H).

    Raises:
        CapabilityError: no state is handed on, or there are several inputs.

    Exactness: against its pass over the whole sequence (tests/integrations/test_libraries.py, torchrl 0.14.1).
    """
    known: Any = module
    given: list[Key] = [_plain(key) for key in known.in_keys if _plain(key) != "is_init"]
    made: list[Key] = [_plain(key) for key in known.out_keys]
    states = [key for key in given if _next(key) in made]
    inputs = [key for key in given if key not in states]
    others = [key for key in made if key not in map(_next, states)]
    if not states or len(inputs) != 1 or not others:
        raise CapabilityError(
            f'one input, and states handed on as ("next", name), were expected, but {type(module).__name__} takes '
            f"{given} and returns {made}: what to carry from window to window is not told by the keys",
            fix='LSTMModule(..., in_key="observation", out_key="features")',
        )
    return stateful(module, _Call(inputs[0], others[-1] if outputs is None else outputs, tuple(states)))


@dataclass(frozen=True)
class _Call:
    """A TensorDict (B, T) in recurrent mode; of the states, which it wants at every step, only the first counts."""

    inputs: Key
    outputs: Key
    states: tuple[Key, ...]

    def __call__(self, module: nn.Module, inputs: Tensor, state: Tree | None) -> tuple[Tensor, Tree]:
        from tensordict import TensorDict  # pyright: ignore[reportMissingImports]
        from torchrl.modules import set_recurrent_mode  # pyright: ignore[reportMissingImports]

        steps, lanes = inputs.shape[:2]
        data = TensorDict({self.inputs: inputs.transpose(0, 1)}, batch_size=[lanes, steps])
        data["is_init"] = torch.zeros(lanes, steps, 1, dtype=torch.bool, device=inputs.device)
        given: dict[str, Tensor] = state or {}
        for key in self.states if given else ():
            first = given[_name(key)].unsqueeze(1)
            data[key] = first.expand(-1, steps, *first.shape[2:])
        with set_recurrent_mode(True):
            result = module(data)
        return result[self.outputs].transpose(0, 1), {_name(key): result[_next(key)][:, -1] for key in self.states}


def _plain(key: Any) -> Key:
    return key if isinstance(key, str) else tuple(key)


def _next(key: Key) -> Key:
    return ("next", key) if isinstance(key, str) else ("next", *key)


def _name(key: Key) -> str:
    return key if isinstance(key, str) else ".".join(key)
