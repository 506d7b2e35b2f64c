"""Lengths as they stand in a configuration and on the command line."""

from __future__ import annotations

import ast
from typing import cast

from tbptt.errors import ConfigError
from tbptt.length.adaptive import Adaptive
from tbptt.length.base import Length, is_whole
from tbptt.length.curriculum import Curriculum
from tbptt.length.schedules import Choice, Ramp, RandomLength

__all__ = ["parse_length"]

_POLICIES: dict[str, type[Length]] = {
    each.__name__: each for each in (Ramp, Choice, RandomLength, Curriculum, Adaptive)
}


def parse_length(text: str) -> int | Length:
    """Return the length that a text spells, as it stands in a configuration: "64", "Adaptive(tolerance=0.1)".

    Raises:
        ConfigError: it is neither a number nor one of the policies with plain values.

    Example:
        >>> parse_length("Ramp(8, 64, over=1000)")
        Ramp(first=8, last=64, over=1000, shape='linear')
    """
    known = ", ".join(_POLICIES)
    try:
        parsed = ast.parse(text.strip(), mode="eval").body
        if isinstance(parsed, ast.Constant) and is_whole(parsed.value):
            return cast(int, parsed.value)
        if not isinstance(parsed, ast.Call) or not isinstance(parsed.func, ast.Name):
            raise ValueError
        policy = _POLICIES[parsed.func.id]
        given = [ast.literal_eval(each) for each in parsed.args]
        named = {str(each.arg): ast.literal_eval(each.value) for each in parsed.keywords}
        return policy(*given, **named)
    except (SyntaxError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"a number of steps or one of {known} with its settings was expected, but {text!r} came", fix=_example(text)
        ) from error


def _example(text: str) -> str:
    name = text.partition("(")[0].strip().lower()
    examples = {
        "ramp": "Ramp(8, 128, over=5000)",
        "choice": "Choice([16, 256], weights=[9, 1])",
        "curriculum": "Curriculum([1, 2, 4], updates=1000, segment=64)",
        "randomlength": "RandomLength(70)",
    }
    return examples.get(name, "Adaptive(tolerance=0.1)")
