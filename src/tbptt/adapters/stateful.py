"""Any stateful module as `model(inputs, state) -> (outputs, state)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from tbptt.adapters.conventions import BatchFirst, Call, Keyword, OneStep, Outputs, Pair, Pieces
from tbptt.adapters.inside import Inside
from tbptt.adapters.model import Stateful, StatefulFrom
from tbptt.errors import CapabilityError, ConfigError
from tbptt.tree import Tree
from tbptt.wrappers import method_of

__all__ = ["stateful"]


def stateful(
    module: nn.Module,
    call: Call | None = None,
    *,
    state: str | None = None,
    outputs: str | None = None,
    inside: bool | Callable[[nn.Module], object] = False,
    arguments: Mapping[str, Any] | None = None,
    batch_first: bool = False,
    one_step: bool = False,
    max_steps: int | None = None,
    initial: Callable[[int], Tree] | None = None,
    pathways: Callable[[Tree], Mapping[str, Tree]] | None = None,
    in_place: Literal["auto", "protect", "leave"] = "auto",
) -> Stateful:
    """Make a model of a module that is called in another way.

    The module gets a copy of the state, so that it may write into it. `tbptt.check` then tells whether the
    result carries its state.

    Args:
        module: the module. Its parameters become those of the model, under "module.".
        call: `call(module, inputs, state) -> (outputs, state)`, for what the other arguments cannot say;
            a function of a module's top level can be pickled.
        state: keyword under which the module takes its state; left out: its second positional argument.
        outputs: name under which the module's result has the outputs; the state is then there under the name
            `state`. Left out: it returns a pair (outputs, state).
        inside: the module keeps its state in its own buffers or attributes. True: they stand at the start of
            a sequence now. Or a function that puts the module there, called before each sequence.
        arguments: further keyword arguments of each call, such as {"use_cache": True}.
        batch_first: whether the module takes and returns (B, T, ...) instead of (T, B, ...).
        one_step: whether the module takes one step (B, ...) instead of many.
        max_steps: the most steps that it is given in one call; 1 for a module that is right only in single
            steps. Left out: any number.
        initial: `initial(lanes) -> state`; left out: the module's own `initial_state`, if it has one. With
            `inside` a state is a dict by "path.of.submodule:attribute".
        pathways: `pathways(state) -> {"recurrence": ..., "attention": ...}`, parts of the state by the way in which the
            past comes through them, for `tbptt.horizon` and `tbptt.check` to tell apart; left out: the module's own
            `pathways`, if it has one. See `tbptt.pathways.HasPathways`.
        in_place: what to do about a module that overwrites what its backward pass needs. "auto": find out at
            the first call with a graph, and protect where it is needed. "protect": always. "leave": never.

    Returns:
        The model: `model(inputs, state=None) -> (outputs, state)`, time first.

    Raises:
        ConfigError: arguments that contradict each other, or that the module does not take.
        CapabilityError: not a module.

    Exactness: the model computes what the module does, protected or not, bit for bit (tests/adapters).
    Cost: a copy of the state each call. Protection: Python for each operation, and copies of what is
        overwritten; see `protected`.

    Example:
        >>> model = stateful(nn.LSTM(3, 5, batch_first=True), batch_first=True)
        >>> outputs, state = model(torch.zeros(7, 2, 3))
        >>> outputs.shape
        torch.Size([7, 2, 5])
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CapabilityError(
            f"an nn.Module was expected, but a {type(module).__name__} came: it has no parameters to train",
            fix="tbptt.stateful(module, ...), with the module itself",
        )
    extra = dict(arguments or {})
    _check_choices(in_place, max_steps, inside)
    _check_together(call, state, outputs, inside, extra)
    _check_steps(batch_first, one_step, max_steps)
    if call is None:
        _check_torchs_own(module, batch_first)
        _check_keywords(module, [*extra, *([state] if state else [])])
        _check_takes_state(module, state, inside, extra)
    chosen: Call = call or (Keyword(state, outputs, extra) if state else Pair(extra))
    if inside:
        chosen = Inside(None if inside is True else inside, Outputs(outputs, extra))
    if one_step:
        chosen = OneStep(chosen)
    elif batch_first:
        chosen = BatchFirst(chosen)
    if max_steps is not None:
        chosen = Pieces(chosen, max_steps)
    if initial is None and not inside:
        initial = method_of(module, "initial_state")
    if pathways is None:
        pathways = method_of(module, "pathways")
    kind = Stateful if initial is None else StatefulFrom
    return kind(module, chosen, in_place, initial, pathways)


def _check_choices(in_place: str, max_steps: object, inside: object) -> None:
    if in_place not in ("auto", "protect", "leave"):
        raise ConfigError(
            f'in_place was expected to be "auto", "protect" or "leave", but is {in_place!r}', fix='in_place="auto"'
        )
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise ConfigError(
            f"max_steps was expected to be a whole number of steps, at least 1, but is {max_steps!r}", fix="max_steps=1"
        )
    if not isinstance(inside, bool) and not callable(inside):
        raise ConfigError(
            f"inside was expected to be True, or a function that puts the module to its start, but is {inside!r}",
            fix="inside=True",
        )


def _check_steps(batch_first: bool, one_step: bool, max_steps: int | None) -> None:
    if one_step and (batch_first or max_steps is not None):
        other = "batch_first" if batch_first else "max_steps"
        raise ConfigError(
            f"either one_step or {other} was expected, but both came: a module that takes one step (B, ...) has "
            "no time among its dimensions",
            fix="one_step=True for inputs (B, ...); batch_first=True, max_steps=1 for inputs (B, 1, ...)",
        )


def _check_torchs_own(module: nn.Module, batch_first: bool) -> None:
    """Refuse what torch's own layers are known not to be."""
    if isinstance(module, nn.RNNCellBase):
        raise ConfigError(
            f"a module that returns outputs and state was expected, but nn.{type(module).__name__} returns its state "
            "alone",
            fix="tbptt.scan(cell)",
        )
    if isinstance(module, nn.RNNBase) and module.batch_first != batch_first:
        raise ConfigError(
            f"nn.{type(module).__name__} was built with batch_first={module.batch_first}, but batch_first="
            f"{batch_first} came: it would take lanes for steps",
            fix=f"tbptt.stateful(module, batch_first={module.batch_first})",
        )


def _check_together(call: object, state: object, outputs: object, inside: object, extra: object) -> None:
    """Refuse arguments of which one would be ignored."""
    clash = [name for name, value in (("state", state), ("outputs", outputs), ("arguments", extra)) if value]
    if call is not None and (clash or inside):
        others = clash + (["inside"] if inside else [])
        raise ConfigError(
            f"either call or {' and '.join(others)} was expected, but both came: a call of your own says already "
            "how inputs, state and outputs are passed",
            fix="def call(module, inputs, state): ...; return outputs, state",
        )
    if inside and state is not None:
        raise ConfigError(
            f"a state kept inside the module, or one passed as {state!r}, was expected, but both came",
            fix="leave out one of inside and state",
        )
    if outputs is not None and state is None and not inside:
        raise ConfigError(
            f"the outputs are taken from the result under {outputs!r}, but it is not said under which name the "
            "state is: every window would start from nothing",
            fix=f'tbptt.stateful(module, state="past_key_values", outputs={outputs!r})',
        )


def _check_keywords(module: nn.Module, names: list[str]) -> None:
    taken = inspect.signature(module.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
        return
    unknown = [name for name in names if name not in taken]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} was expected to take {', '.join(map(repr, unknown))}, but its forward takes "
            f"{', '.join(taken)}",
            fix=f"tbptt.stateful(module, state={[*taken, 'state'][len(taken) - 1]!r})",
        )


def _check_takes_state(module: nn.Module, state: str | None, inside: object, extra: Mapping[str, Any]) -> None:
    if inside or state is not None:
        return
    try:
        inspect.signature(module.forward).bind(None, None, **extra)
    except TypeError:
        raise ConfigError(
            f"{type(module).__name__} was expected to take its state as the second argument, but its forward takes "
            f"{', '.join(inspect.signature(module.forward).parameters)}",
            fix="tbptt.stateful(module, state=...), inside=True or call=..., as the module is",
        ) from None
