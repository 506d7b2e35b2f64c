"""Estimators as they are written in Python, read without running anything else."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import tbptt.length
from tbptt.cli.config import estimator_classes
from tbptt.cli.settings import did_you_mean
from tbptt.errors import ConfigError
from tbptt.estimators import ClipBoundary, Estimator
from tbptt.length import Length

__all__ = ["parse_estimator"]

_EXAMPLE = "-e 'TBPTT(k1=8, k2=64)'"


def parse_estimator(text: str) -> Estimator:
    """Return the estimator that a call spells; its arguments are plain values, lengths and other estimators.

    Raises:
        ConfigError: it is no such call, or names or settings are unknown or cannot be meant.

    Example:
        >>> parse_estimator("TBPTT(k1=8, k2=Ramp(8, 64, over=100))").k2
        Ramp(first=8, last=64, over=100, shape='linear')
    """
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        _refuse(text, "which is not Python", error)
    classes = estimator_classes()
    if not isinstance(parsed, ast.Call):
        _refuse(text, "which is no call", None)
    found = _value(parsed, {**classes, **_lengths(), "ClipBoundary": ClipBoundary})
    if not isinstance(found, Estimator):
        _refuse(text, f"which is a {type(found).__name__}", None)
    return found


def _value(node: ast.expr, known: dict[str, Callable[..., Any]]) -> Any:
    """Return a plain value, or what a call of something known makes."""
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, known) for each in node.elts]
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError) as error:
            raise ConfigError(
                f"numbers, text, lists and calls of {', '.join(sorted(known))} were expected, but {ast.unparse(node)} "
                "came: nothing else is looked up",
                fix=_EXAMPLE,
            ) from error
    name = ast.unparse(node.func)
    if name not in known:
        raise ConfigError(
            f"one of {', '.join(sorted(known))} was expected, but {name} came",
            fix=did_you_mean(name, known) or _EXAMPLE,
        )
    given = [_value(each, known) for each in node.args]
    named = {each.arg or "**": _value(each.value, known) for each in node.keywords}
    signature = inspect.signature(known[name])
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        unknown = [each for each in named if each not in signature.parameters]
        raise ConfigError(
            f"{name}({', '.join(signature.parameters)}) was expected, but {ast.unparse(node)} came: "
            + (f"it has no {unknown[0]}" if unknown else str(error)),
            fix=(did_you_mean(unknown[0], signature.parameters) if unknown else "") or _EXAMPLE,
        ) from error
    return known[name](*given, **named)


def _lengths() -> dict[str, Callable[..., Any]]:
    return {name: each for name, each in vars(tbptt.length).items() if isinstance(each, type) and _is_policy(each)}


def _is_policy(kind: type) -> bool:
    return issubclass(kind, Length) and not inspect.isabstract(kind)


def _refuse(text: str, why: str, cause: Exception | None) -> NoReturn:
    raise ConfigError(f"an estimator was expected as a call, but {text!r} came, {why}", fix=_EXAMPLE) from cause
