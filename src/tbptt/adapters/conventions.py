"""How modules are called: each class turns one habit into `call(module, inputs, state) -> (outputs, state)`.

They hold no module and no tensor, so that a model made of them can be copied and pickled.

Letters: T time, B lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.model import Scan, split_result
from tbptt.tree import Tree, copy, tensors, time_cat, time_slice, tree_map

__all__ = ["BatchFirst", "Call", "Keyword", "OneStep", "Outputs", "Pair", "Pieces"]

Call: TypeAlias = Callable[[nn.Module, Tree, Tree | None], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Pair:
    """`outputs, state = module(inputs, state)`."""

    arguments: Mapping[str, Any]

    def __call__(self, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Return outputs and state."""
        return split_result(module, module(inputs, state, **self.arguments))


@dataclass(frozen=True)
class Keyword:
    """`result = module(inputs, cache=state)`, then `result.logits` and `result.cache`; or a pair of both."""

    state: str
    outputs: str | None
    arguments: Mapping[str, Any]

    def __call__(self, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Return outputs and state; at the start the keyword is left out."""
        given = {} if state is None else {self.state: state}
        result = module(inputs, **given, **self.arguments)
        if self.outputs is None:
            return split_result(module, result)
        return _named(module, result, self.outputs), _named(module, result, self.state)


@dataclass(frozen=True)
class Outputs:
    """`result = module(inputs)`, then `result.logits`: the state stays inside."""

    outputs: str | None
    arguments: Mapping[str, Any]

    def __call__(self, module: nn.Module, inputs: Tree) -> Tree:
        """Return the outputs."""
        result = module(inputs, **self.arguments)
        return result if self.outputs is None else _named(module, result, self.outputs)


@dataclass(frozen=True)
class BatchFirst:
    """A module that takes and returns (B, T, ...)."""

    call: Call

    def __call__(self, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Return outputs (T, B, ...) and state."""
        outputs, state = self.call(module, tree_map(_swap, inputs), state)
        return tree_map(_swap, outputs), state


@dataclass(frozen=True)
class OneStep:
    """A module that takes one step, (B, ...)."""

    call: Call

    def __call__(self, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Return outputs (T, B, ...) and state."""
        return Scan(partial(_with_own_outputs, self.call, module))(inputs, state)


@dataclass(frozen=True)
class Pieces:
    """A module that is right only when it is given few steps at a time."""

    call: Call
    steps: int

    def __call__(self, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        """Return outputs (T, B, ...) and state."""
        pieces: list[Tree] = []
        for begin in range(0, tensors(inputs)[0].shape[0], self.steps):
            piece = time_slice(inputs, begin, begin + self.steps)
            outputs, state = _with_own_outputs(self.call, module, piece, state)
            pieces.append(outputs)
        return time_cat(pieces), state


def _with_own_outputs(call: Call, module: nn.Module, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
    """Return outputs that are not the state: the next call may write into that."""
    outputs, state = call(module, inputs, state)
    return copy(outputs), state


def _swap(leaf: Tensor) -> Tensor:
    return leaf.transpose(0, 1).contiguous()


def _named(module: nn.Module, result: Any, name: str) -> Any:
    found: Any = result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)  # pyright: ignore[reportUnknownArgumentType]
    if found is None:
        known: Any = result if isinstance(result, Mapping) else getattr(result, "__dict__", ())
        raise CapabilityError(
            f"{type(module).__name__} was expected to return an object with {name!r}, but its "
            f"{type(result).__name__} has {sorted(key for key in known if known[key] is not None)}: "
            "without its outputs and its state it cannot be trained in windows",
            fix='tbptt.stateful(module, state="past_key_values", outputs="logits", arguments={"use_cache": True})',
        )
    return found
