"""What a model is, and what is asked of one.

A model is any `model(inputs, state) -> (outputs, state)`, time first, with `state=None` at the start.

Letters: T time, B lanes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError, ShapeError
from tbptt.opaque import CONSTANTS
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, detach, leaf_names, tensors, time_slice, tree_map
from tbptt.wrappers import bare, method_of, refuse_wrapped

__all__ = ["HasInitialState", "Scan", "scan"]

_Result = TypeVar("_Result")


@runtime_checkable
class HasInitialState(Protocol):
    """A model that says itself how a sequence starts.

    Without it a sequence starts from `state=None`, and a lane that is reset in mid-window from zeros:
    `tbptt.check` refuses a model for which the two differ.
    """

    def initial_state(self, lanes: int) -> Tree:
        """Return the state before the first step; its parameters get their gradient."""
        ...


class Scan(nn.Module):
    """A one-step cell run over time; made by `scan`."""

    def __init__(self, cell: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = cell

    @property
    def kind(self) -> object:
        """The cell itself, where `torch.compile` has been put around it."""
        return bare(self.cell) if isinstance(self.cell, nn.Module) else self.cell

    def forward(self, inputs: Tree, state: Tree | None = None) -> tuple[Tree, Tree]:
        """Run the cell over inputs (T, B, ...); outputs are stacked over time."""
        outputs: list[Tree] = []
        for step in range(tensors(inputs)[0].shape[0]):
            output, state = self._step(tree_map(lambda leaf, step=step: leaf[step], inputs), state)
            outputs.append(output)
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), state
        columns = iter([torch.stack(parts) for parts in zip(*map(tensors, outputs), strict=True)])
        return tree_map(lambda _: next(columns), outputs[0]), state

    def _step(self, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        if isinstance(self.kind, nn.RNNCellBase):  # torch's cells return their state alone
            state = self.cell(inputs, state)
            return (state[0] if isinstance(state, tuple) else state), state
        return split_result(self.cell, self.cell(inputs, state))


class _ScanFrom(Scan):
    """A `Scan` of a cell that has an initial state of its own."""

    def initial_state(self, lanes: int) -> Tree:
        """Return the cell's own initial state."""
        own = method_of(self.cell, "initial_state")
        return own and own(lanes)


def scan(cell: Callable[..., Any]) -> Scan:
    """Make a model of a one-step cell.

    The plain loop: as fast as Python runs the cell. Prefer a fused layer where there is one.

    Args:
        cell: `cell(inputs, state) -> (outputs, state)` with inputs (B, ...) and `state=None` at the start,
            or nn.LSTMCell, nn.GRUCell, nn.RNNCell as they are. Its `initial_state`, if any, is used.

    Raises:
        CapabilityError: not callable; or, when run, a cell that returns one value.

    Example:
        >>> outputs, state = scan(nn.GRUCell(3, 5))(torch.zeros(7, 2, 3))
        >>> outputs.shape, state.shape
        (torch.Size([7, 2, 5]), torch.Size([2, 5]))
    """
    if not callable(cell):
        raise CapabilityError(f"a cell(inputs, state) was expected, but a {type(cell).__name__} came")
    kind = _ScanFrom if method_of(cell, "initial_state") else Scan
    return kind(cell)


def split_result(model: object, result: Any) -> tuple[Tree, Tree]:
    """Return what a model returned as (outputs, state).

    Raises:
        CapabilityError: it is not a pair.
    """
    if isinstance(result, tuple) and len(result) == 2:  # pyright: ignore[reportUnknownArgumentType]
        return result  # pyright: ignore[reportUnknownVariableType]
    name = type(model).__name__
    came = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"one {type(result).__name__}"  # pyright: ignore[reportUnknownArgumentType]
    raise CapabilityError(
        f"{name}(inputs, state) was expected to return (outputs, state), but returned {came}: "
        "without its state there is nothing to carry from window to window",
        fix="def forward(self, inputs, state=None): ...; return outputs, state; or tbptt.stateful(model, ...); "
        "tbptt.integrations has ready-made adapters, as for transformers",
    )


def check_outputs(model: nn.Module, outputs: Tree, steps: int, lanes: int) -> None:
    """Refuse outputs without a value for each step and lane.

    Raises:
        ShapeError: a tensor of them is not of shape (T, B, ...).
    """
    leaves = tensors(outputs)
    if all(leaf.shape[:2] == (steps, lanes) for leaf in leaves):
        return
    index = next(index for index, leaf in enumerate(leaves) if leaf.shape[:2] != (steps, lanes))
    shape = tuple(leaves[index].shape)
    whose = "" if isinstance(outputs, Tensor) else f" {leaf_names(outputs)[index]}"
    raise ShapeError(
        f"{type(model).__name__} was expected to return outputs of shape (T, B, ...) = ({steps}, {lanes}) + (...), but "
        f"the output{whose} has shape {shape}: without a value for each step and lane it can neither be cut at a reset "
        "nor weighed by the targets that count",
        fix="leave out the mean over steps and lanes: return the auxiliary loss with shape (T, B), and the state as "
        "the second of the pair",
    )


def check_trainable(model: object) -> None:
    """Refuse what is known not to be trainable in windows, before anything is run.

    Raises:
        CapabilityError: not an nn.Module, batch-first, bidirectional, wrapped in what trains through `.backward()`
            alone (`tbptt.wrappers`), or without parameters to train.
    """
    if not isinstance(model, nn.Module):
        raise CapabilityError(
            f"an nn.Module was expected, but a {type(model).__name__} came: it has no parameters to train",
            fix="tbptt.scan(cell) makes a module of a one-step cell",
        )
    refuse_wrapped(model)
    core = bare(model)
    if isinstance(core, nn.RNNBase):
        name = type(core).__name__
        if core.batch_first:
            raise CapabilityError(
                f"nn.{name} was built with batch_first=True, but windows are time first, (T, B, ...): "
                "it would take lanes for steps",
                fix="tbptt.stateful(model, batch_first=True)",
            )
        if core.bidirectional:
            raise CapabilityError(
                f"a bidirectional nn.{name} needs the future of the sequence, so it cannot be run in windows",
                fix="bidirectional=False",
            )
    try:
        inspect.signature(model.forward).bind(None, None)
    except ValueError:
        pass  # a copy of a scripted module tells no signature: what is wrong with its call is seen when it is made
    except TypeError:
        raise CapabilityError(
            f"{type(model).__name__} was expected to be called as model(inputs, state), but it takes no state",
            fix="def forward(self, inputs, state=None): ...; return outputs, state",
        ) from None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CapabilityError(f"{type(model).__name__} has no parameter that requires a gradient")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return what `model.named_parameters()` does, in the same order.

    The same walk in a tenth of the calls: for a small model torch's own is a noticeable part of an update.
    """
    found: dict[str, Tensor] = {}
    _collect(model, "", found, set())
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor], seen: set[int]) -> None:
    seen.add(id(module))
    for name, value in module._parameters.items():  # pyright: ignore[reportPrivateUsage]
        if value is not None and id(value) not in seen:
            seen.add(id(value))  # a tied weight counts once, under its first name
            found[prefix + name] = value
    for name, child in module._modules.items():  # pyright: ignore[reportPrivateUsage]
        if child is not None and id(child) not in seen:
            _collect(child, f"{prefix}{name}.", found, seen)


_HOLD = (dict, list, tuple)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model, also of one that keeps what it computed last.

    torch copies no tensor that is in a graph, such as the weights that `nn.utils.weight_norm` leaves as an attribute:
    those are copied without it.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            inside: list[Any] = (
                list(value.values() if type(value) is dict else value) if type(value) in _HOLD else [value]
            )
            for each in inside:
                if isinstance(each, Tensor) and not each.is_leaf:
                    memo[id(each)] = each.detach().clone()
    return copy.deepcopy(model, memo)


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name."""
    return {name: value for name, value in named_parameters(model).items() if value.requires_grad}


class _Host(nn.Module):
    """Runs a function while `functional_call` has other parameters in the model's place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_parameters(model: nn.Module, parameters: dict[str, Tensor], function: Callable[[], _Result]) -> _Result:
    """Return `function()`, run while `model` has these parameters instead of its own."""
    renamed = {f"model.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(_Host(model), renamed, (function,))


@contextmanager
def fork_random(device: torch.device) -> Generator[None]:
    """Leave the random generators, of the CPU and of `device`, as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the random generators, of the CPU and of `device`."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def random_from(states: list[Tensor], device: torch.device) -> Generator[None]:
    """Draw the random numbers that were drawn then, and leave the generators as they are now."""
    with fork_random(device):
        torch.set_rng_state(states[0].cpu())
        for state in states[1:]:
            torch.cuda.set_rng_state(state.cpu(), device)
        yield


@contextmanager
def left_as_it_was(model: nn.Module) -> Generator[None]:
    """Leave the model's buffers and attributes as they were, but for objects that are written into.

    A tensor that nobody writes to is not written back either: graphs may have saved it.
    """
    rooms: list[dict[str, Any]] = []
    for each in model.modules():
        rooms += [vars(each), each._buffers]  # pyright: ignore[reportPrivateUsage, reportArgumentType]
    kept = [{name: value for name, value in room.items() if isinstance(value, (Tensor, *CONSTANTS))} for room in rooms]
    names = [set(room.keys()) for room in rooms]  # a scripted module's buffers are no dict, and can do this alone
    held = [value for each in kept for value in each.values() if isinstance(value, Tensor)]
    before = [(value, value.detach().clone()) for value in held if value.layout == torch.strided]
    try:
        yield
    finally:
        for room, values, known in zip(rooms, kept, names, strict=True):
            for name in set(room.keys()) - known:
                del room[name]
            for name, value in values.items():
                room[name] = value
        with torch.no_grad():
            for value, old in before:
                if not torch.equal(value, old):  # batch normalisation writes without a new version
                    value.copy_(old)


@contextmanager
def eval_mode(*modules: nn.Module | None) -> Generator[None]:
    """Put the modules into eval mode; afterwards each of their parts is in the mode that it was in.

    A part may have been put into eval mode on purpose, such as a frozen batch normalisation.
    """
    given = [module for module in modules if module is not None]
    modes = [(part, part.training) for module in given for part in module.modules()]
    before = [module.training for module in given]
    try:
        for module in given:
            module.eval()
        yield
    finally:
        for module, training in zip(given, before, strict=True):
            module.train(training)  # first: a class may do more in it than set the flag
        for part, training in modes:
            part.training = training


def initial_state(model: nn.Module, lanes: int) -> Tree | None:
    """Return the model's own initial state for `lanes` lanes; None when it has none of its own."""
    own = method_of(model, "initial_state")
    return None if own is None else own(lanes)


def find_lane_dims(model: nn.Module, inputs: Tree) -> LaneDims | None:
    """Find the lane dimension of each tensor of the model's state, by experiment.

    The model is run for one step with B and with B + 1 lanes; the dimension that grew is the lanes'. A leaf
    that grows from step to step as well (a cache of all that was) has a length common to all lanes: no lane of
    it can start anew alone. Nothing remains: no graph, no buffer, no random number drawn.

    Args:
        inputs: leaves (T, B, ...).

    Returns:
        The dimensions, None for a leaf that did not grow or grows with the steps; None as a whole for a model
        that cannot be run with another number of lanes, or not at all.

    Raises:
        CapabilityError: the model does not return (outputs, state).
    """
    lanes = tensors(inputs)[0].shape[1]
    shapes: list[list[list[tuple[int, ...]]]] = []
    for sample in (time_slice(inputs, 0, 1), inputs):  # some models take no single step
        shapes = [_state_shapes(model, sample), _state_shapes(model, _one_lane_more(sample))]
        if all(shapes):
            break
    else:
        return None
    (before, later), (more, _) = shapes
    if len(before) != len(more):
        raise ShapeError(
            f"the model's state has {len(before)} tensors for {lanes} lanes and {len(more)} for {lanes + 1}: "
            "it cannot be told which of them belongs to which lane",
            fix="give each tensor of the state a lane dimension instead of one tensor for each lane",
        )
    later = later if len(later) == len(before) else [()] * len(before)
    return tuple(_grown(a, b, lanes) if a == c else None for a, b, c in zip(before, more, later, strict=True))


def folded_lanes(model: nn.Module, inputs: Tree) -> dict[int, tuple[int, int]]:
    """Find the tensors of the state whose lanes share a dimension with something else, such as the nodes of a graph.

    By the experiment of `find_lane_dims`: with one lane more that dimension grew by as much as it has for each lane.

    Args:
        inputs: leaves (T, B, ...).

    Returns:
        By the index of the tensor: the dimension, and how large it is for each lane.
    """
    lanes = tensors(inputs)[0].shape[1]
    found: dict[int, tuple[int, int]] = {}
    for sample in (time_slice(inputs, 0, 1), inputs):  # some models take no single step
        shapes = [_state_shapes(model, sample), _state_shapes(model, _one_lane_more(sample))]
        if not all(shapes):
            continue
        for index, (before, later, more) in enumerate(zip(*shapes[0], shapes[1][0], strict=False)):
            grown = [dim for dim, (a, b) in enumerate(zip(before, more, strict=False)) if a != b]
            if before == later and len(before) == len(more) and len(grown) == 1:
                each = more[grown[0]] - before[grown[0]]
                if each > 1 and before[grown[0]] == lanes * each:
                    found[index] = grown[0], each
        break
    return found


def _one_lane_more(inputs: Tree) -> Tree:
    return tree_map(lambda leaf: torch.cat([leaf, leaf[:, :1]], 1), inputs)


def _state_shapes(model: nn.Module, inputs: Tree) -> list[list[tuple[int, ...]]]:
    """Return the shapes of the state's tensors after one call and after two; empty if it cannot be run."""
    shapes: list[list[tuple[int, ...]]] = []
    with preserved(model, device=tensors(inputs)[0].device), torch.enable_grad():  # some need a gradient
        try:
            state = initial_state(model, tensors(inputs)[0].shape[1])
            for _ in range(2):
                _, state = split_result(model, model(inputs, state))
                shapes.append([tuple(leaf.shape) for leaf in tensors(detach(state))])
        except CapabilityError:
            raise
        except Exception:  # whatever a model says to a length it does not take; if to all, training says it again
            return []
    return shapes


def _grown(before: tuple[int, ...], after: tuple[int, ...], lanes: int) -> int | None:
    if len(before) != len(after):
        return None
    grown = [dim for dim, (a, b) in enumerate(zip(before, after, strict=True)) if (a, b) == (lanes, lanes + 1)]
    return grown[0] if len(grown) == 1 else None
