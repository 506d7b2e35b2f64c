"""One self-contained page: nothing is fetched, and its numbers lie beside it as Parquet."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tbptt
from tbptt.report.figure import Figure
from tbptt.report.table import Table

__all__ = ["Page", "Section"]

# The browser itself refuses every request that the page might make.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a page.

    Args:
        heading: above it.
        text: what it says, in a paragraph; blank lines part paragraphs.
        figures: in order.
        tables: after them; each is written to a file, too.
        html: after the text, as it is: whoever gives it has escaped it.
    """

    heading: str
    text: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    html: str = ""

    def to_html(self) -> str:
        """Return the section for a page."""
        parts = [f"<h2>{html.escape(self.heading)}</h2>", _paragraphs(self.text), self.html]
        parts += [figure.html() for figure in self.figures]
        parts += [table.html() for table in self.tables]
        return f"<section>{''.join(parts)}</section>"


@dataclass(frozen=True, eq=False)
class Page:
    """A page about one question.

    Args:
        title: of the page.
        summary: the answer first, in plain words.
        sections: in order.
        notes: what a reader must know before trusting a number: what is missing, what is thinned out.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    def html(self) -> str:
        """Return the whole page; plotly.js is in it, once."""
        from plotly.offline import get_plotlyjs

        assets = resources.files("tbptt.report")
        style, script = (assets.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        title = html.escape(self.title)
        items = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        notes = f'<ul class="notes">{items}</ul>' if items else ""
        library = f"<script>{get_plotlyjs()}</script>" if any(section.figures for section in self.sections) else ""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f'<meta name="generator" content="tbptt {tbptt.__version__}">'
            f"<title>{title}</title><style>{style}</style></head><body><main><header><h1>{title}</h1>"
            f'<div class="summary">{_paragraphs(self.summary)}</div>'
            f"{notes}</header>"
            "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
            f"{''.join(section.to_html() for section in self.sections)}"
            f"<footer>Written by tbptt {tbptt.__version__}. Nothing on this page is fetched from anywhere.</footer>"
            f"</main>{library}<script>{script}</script></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, and its tables to the folder <stem>_tables beside it; each file wholly or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for section in self.sections:
            for table in section.tables:
                table.write(path.with_name(f"{path.stem}_tables"))
        aside = path.with_name(f"{path.name}.writing")
        with aside.open("w", encoding="utf-8", errors="replace") as file:  # lone surrogates cannot be written
            file.write(self.html())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        return path


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(each)}</p>" for each in text.split("\n\n") if each)
