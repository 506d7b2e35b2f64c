"""The numbers beside the pictures: a table of a page, and a Parquet file."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

__all__ = ["Table"]

_MOST_ROWS = 60  # on a page; the file has all
_MOST_ITEMS = 6  # of a list in a cell
_SHORT = 24  # characters that are kept on one line


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of one length.

    Args:
        name: of the file, and above the table; what a file name cannot hold becomes an underscore.
        columns: by name: numbers, text, lists of them; None where there is nothing.
        caption: what a row is, in a few words.
        folded: whether the page shows it only when asked.
        digits: of numbers on the page that are not whole; the file has all.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    caption: str = ""
    folded: bool = True
    digits: int = 5

    def __len__(self) -> int:
        return max((len(values) for values in self.columns.values()), default=0)

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.name)[:80] or 'table'}.parquet"

    def html(self) -> str:
        """Return the table for a page: all rows of a short one, the first and last of a long one."""
        rows = len(self)
        shown = (
            list(range(rows)) if rows <= _MOST_ROWS else [*range(_MOST_ROWS // 2), *range(rows - _MOST_ROWS // 2, rows)]
        )
        head = "".join(
            f'<th scope="col"{_kind(values[row] for row in shown)}>{html.escape(name)}</th>'
            for name, values in self.columns.items()
        )
        body: list[str] = []
        for before, row in zip([-1, *shown], shown, strict=False):
            if row != before + 1:
                text = f"{row - before - 1:,} more rows in the file"
                body.append(f'<tr class="gap"><td colspan="{len(self.columns)}">{text}</td></tr>')
            body.append(f"<tr>{''.join(_cell(values[row], self.digits) for values in self.columns.values())}</tr>")
        title = html.escape(self.caption or self.name)
        table = (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table><caption>{title}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )
        if not self.folded:
            return table
        count = "1 row" if rows == 1 else f"{rows:,} rows"
        return f"<details><summary>{title} <small>{count}, {html.escape(self.file)}</small></summary>{table}</details>"

    def write(self, folder: Path) -> Path:
        """Write the Parquet file, wholly or not at all, and return its path.

        A column of numbers keeps NaN, infinities and None apart. One that no single type holds is text, in JSON.
        """
        import pyarrow
        from pyarrow import parquet

        folder.mkdir(parents=True, exist_ok=True)
        path, aside = folder / self.file, folder / f"{self.file}.writing"
        columns = {name: _column(values) for name, values in self.columns.items()}
        cast(Any, parquet).write_table(cast(Any, pyarrow).table(columns), aside)
        aside.replace(path)
        return path


def _column(values: Sequence[Any]) -> Any:
    import pyarrow

    arrow = cast(Any, pyarrow)
    if not any(isinstance(value, dict) for value in values):
        try:
            return arrow.array(values)
        except (arrow.ArrowException, OverflowError, TypeError, ValueError):
            pass  # no one type holds them
    return arrow.array([None if value is None else json.dumps(value, default=str) for value in values])


def _cell(value: Any, digits: int) -> str:
    text = _text(value, digits)
    kind = _kind([value]) or (' class="short"' if len(text) <= _SHORT else "")
    return f"<td{kind}>{html.escape(text)}</td>"


def _kind(values: Iterable[Any]) -> str:
    has_numbers = any(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return ' class="number"' if has_numbers else ""


def _text(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        more = f", … ({len(items)} in all)" if len(items) > _MOST_ITEMS else ""
        return ", ".join(_text(item, digits) for item in items[:_MOST_ITEMS]) + more
    return str(value)
