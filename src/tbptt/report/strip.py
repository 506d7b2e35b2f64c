"""A text whose characters are coloured by what each did to one prediction."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tbptt.errors import ShapeError
from tbptt.report.table import Table

__all__ = ["Strip", "strips_html", "strips_table"]

_SHOWN = {"\n": "⏎\n", "\t": "⇥\t", " ": "·"}  # white space that can be seen


@dataclass(frozen=True)
class Strip:
    """One prediction, and the influence of every character before it.

    Args:
        characters: the past; the last one is the input of the step that predicts.
        influence: of each, 0 or more, in any unit; NaN where it is not known.
        predicted: the character that was to be predicted.
        probability: that the model gave it; None where it is not known.

    Raises:
        ShapeError: not one influence for each character.
    """

    characters: str
    influence: Sequence[float]
    predicted: str
    probability: float | None = None

    def __post_init__(self) -> None:
        if len(self.characters) != len(self.influence):
            raise ShapeError(
                f"one influence for each of {len(self.characters)} characters was expected, but "
                f"{len(self.influence)} came",
                fix="Strip(text, influence=[...], predicted=...)",
            )

    def strength(self, influence: float) -> float:
        """Return how strongly a character is coloured, from 0 to 1: the root of its share of the largest influence."""
        largest = max((each for each in self.influence if math.isfinite(each)), default=0.0)
        return math.sqrt(min(max(influence / largest, 0.0), 1.0)) if largest > 0 and math.isfinite(influence) else 0.0


def strips_html(strips: Sequence[Strip]) -> str:
    """Return the strips with a button each; all of them are in sight where there is no JavaScript."""
    buttons = "".join(
        f'<button type="button" aria-pressed="false">{number}: {_visible(strip.predicted)}</button>'
        for number, strip in enumerate(strips, 1)
    )
    group = f'<div class="choices" role="group" aria-label="Predictions to choose from">{buttons}</div>'
    shown = "".join(_strip_html(strip, number) for number, strip in enumerate(strips, 1))
    scale = (
        '<p><small>no influence<span class="scale" role="img" aria-label="from pale to strong"></span>most</small></p>'
    )
    return f'<div class="strips">{group}{shown}</div>{scale}'


def strips_table(strips: Sequence[Strip]) -> Table:
    """Return all strips as one table, a row for each character."""
    columns: dict[str, list[object]] = {
        name: [] for name in ("strip", "predicted", "probability", "lag", "character", "influence")
    }
    for number, strip in enumerate(strips, 1):
        past = len(strip.characters)
        for place, (character, influence) in enumerate(zip(strip.characters, strip.influence, strict=True)):
            row = (number, strip.predicted, strip.probability, past - 1 - place, character, float(influence))
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value)
    return Table("strips", columns, "Influence of each character")


def _strip_html(strip: Strip, number: int) -> str:
    past = len(strip.characters)
    spans = "".join(
        _span(character, influence, strip.strength(influence), past - 1 - place)
        for place, (character, influence) in enumerate(zip(strip.characters, strip.influence, strict=True))
    )
    given = "" if strip.probability is None else f", which the model gave a probability of {strip.probability:.3g}"
    return (
        f'<div class="strip" id="strip-{number}"><p>What came before the prediction of <b>{_visible(strip.predicted)}'
        f'</b>{given}:</p><div class="text">{spans}<b>{_visible(strip.predicted)}</b></div></div>'
    )


def _span(character: str, influence: float, strength: float, lag: int) -> str:
    steps = "1 step" if lag == 1 else f"{lag} steps"
    title = html.escape(f"{character!r}, {steps} before: {influence:.4g}")
    kind = ' class="unknown"' if not math.isfinite(influence) else ""
    return f'<span{kind} style="--v:{strength:.3f}" title="{title}">{_visible(character)}</span>'


def _visible(text: str) -> str:
    return "".join(_visible_character(each) for each in text)


def _visible_character(character: str) -> str:
    if character in _SHOWN:
        return f'<i class="mark">{_SHOWN[character]}</i><wbr>'  # where a line may be broken
    return html.escape(character if character.isprintable() else repr(character)[1:-1])
