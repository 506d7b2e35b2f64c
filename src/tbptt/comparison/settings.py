"""Estimators seen as their settings: their names, their seeds, the lengths they are written with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from torch import nn

from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.base import Estimator
from tbptt.length import Length
from tbptt.loss import StepLoss
from tbptt.tree import Tree

__all__ = ["copied", "longest_length", "longest_window", "named", "prepared", "reseeded", "spell"]

_Settings = TypeVar("_Settings")


def named(estimators: Mapping[str, Estimator] | Sequence[Estimator]) -> dict[str, Estimator]:
    """Return the estimators by name; those without one are named as they are written.

    Raises:
        ConfigError: there is none, or two have one name.
        CapabilityError: something else than an estimator.
    """
    if isinstance(estimators, Mapping):
        found = {str(name): each for name, each in estimators.items()}
    else:
        given = list(estimators)
        found = {spell(each): each for each in given}
        if len(found) < len(given):
            twice = next(name for name in found if sum(spell(each) == name for each in given) > 1)
            raise ConfigError(
                f"estimators that differ were expected, but {twice} came more than once: their results would stand "
                "under one name",
                fix=f'compare({{"first": {twice}, "second": {twice}}}, ...) gives them names',
            )
    if not found:
        raise ConfigError(
            "at least one estimator was expected, but none came: there is nothing to compare",
            fix="compare([TBPTT(k1=8, k2=8), TBPTT(k1=8, k2=64)], ...)",
        )
    for name, each in found.items():
        if not isinstance(each, Estimator):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CapabilityError(
                f"estimators were expected, but {name} is a {type(each).__name__}: it gives no gradient",
                fix="compare([TBPTT(k1=8, k2=8), TBPTT(k1=8, k2=64)], ...)",
            )
    return found


def spell(value: object) -> str:
    """Return a value as one would write it: a dataclass without the settings that are at their defaults.

    Example:
        >>> from tbptt.estimators import TBPTT
        >>> from tbptt.length import Adaptive
        >>> spell(TBPTT(k1=8, k2=Adaptive(tolerance=0.2)))
        'TBPTT(k1=8, k2=Adaptive(tolerance=0.2))'
    """
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    shown = [
        f"{each.name}={spell(setting)}"
        for each, setting in _settings(value).items()
        if each.default is MISSING or each.default != setting
    ]
    return f"{type(value).__name__}({', '.join(shown)})"


def reseeded(value: _Settings, by: int) -> _Settings:
    """Return the settings with every `seed` among them, those of lengths included, larger by so much.

    Example:
        >>> from tbptt.length import Choice
        >>> reseeded(Choice([8, 64], seed=3), 2).seed
        5
    """
    if not by or not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for each, setting in _settings(value).items():
        if each.name == "seed" and isinstance(setting, int):
            changed[each.name] = setting + by
        elif is_dataclass(setting):
            changed[each.name] = reseeded(setting, by)
    return replace(cast(Any, value), **changed)


def prepared(model: nn.Module, loss: StepLoss, estimator: Estimator, inputs: Tree) -> tuple[nn.Module, StepLoss]:
    """Return a copy of the model with what an estimator needs in it, and one of the loss.

    Args:
        inputs: an example, leaves (T, B, ...).
    """
    model, loss = copied(model, loss)
    estimator.prepare(model, inputs)
    return model, loss


def copied(model: nn.Module, loss: StepLoss) -> tuple[nn.Module, StepLoss]:
    """Return copies of a model and of its loss, if that is a module; weights that both have are one in the copies."""
    return (copy.deepcopy(model), loss) if loss.module is None else copy.deepcopy((model, loss))


def longest_window(estimator: Estimator, first: int) -> int:
    """Return the most steps that a window of an estimator may have.

    Args:
        first: of its first window, which says it all unless its `k1` is a `Length`.
    """
    found = [length.longest for name, length in _lengths(estimator) if name == "k1"]
    return max([first, *found])


def longest_length(estimator: Estimator) -> int:
    """Return the longest that any `Length` among the settings may become; 0 for none."""
    return max([length.longest for _, length in _lengths(estimator)], default=0)


def _lengths(estimator: Estimator) -> list[tuple[str, Length]]:
    return [(each.name, value) for each, value in _settings(estimator).items() if isinstance(value, Length)]


def _settings(value: object) -> dict[Field[Any], Any]:
    if not is_dataclass(value):
        return {}
    return {each: getattr(value, each.name) for each in fields(value) if each.init}
