"""`tbptt report`: the page of a run."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from tbptt.cli.launch import tell
from tbptt.errors import ConfigError
from tbptt.report import brief, read_run, run_page

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory, or that of a Trainer.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; else RUN/report.html.", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write a page about a run: loss, lengths, gradients, state, speed, alarms. The run may be going on.

    The page works offline; its numbers lie beside it as Parquet, in <page>_tables. Its path goes to stdout, a few
    lines about the run to stderr.
    """
    page = run / "report.html" if out is None else out
    if page.is_dir():
        raise ConfigError(
            f"a file was expected for the page, but {page} is a directory", fix=f"--out {page / 'report.html'}"
        )
    log = read_run(run)
    run_page(log).write(page)
    blocks = (sys.stderr.encoding or "").lower().startswith("utf")
    tell("\n".join(brief(log, blocks=blocks)))
    print(page)
    if show:
        webbrowser.open(page.absolute().as_uri())
