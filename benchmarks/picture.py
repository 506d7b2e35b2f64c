"""Pictures for the documents: drawn by plotly, taken by chromium."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

__all__ = ["lines", "parsed", "saved_runs", "take"]

STYLES = (("#0072B2", "solid"), ("#009E73", "dot"), ("#D55E00", "dash"), ("#AA4499", "longdash"))
"""Colours that the colour-blind tell apart, too (Okabe & Ito; Tol)."""

Line = tuple[Sequence[float], Sequence[float]]


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what was asked for, `picture` and `saved` among it: a file to draw, and one of runs to draw it from."""
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the runs, as PNG; needs chromium")
    parser.add_argument(
        "--from", dest="saved", type=Path, metavar="FILE", help="draw the runs of this JSON; train none"
    )
    options = parser.parse_args()
    if options.saved is not None and options.picture is None:
        parser.error("--from needs --picture: of runs that were saved, nothing else is made")
    return options


def saved_runs(path: Path) -> list[dict[str, Any]]:
    """Return the runs that `side_by_side.save` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))["samples"]["runs"]


def lines(sides: dict[str, list[Line]], *, markers: bool = False) -> go.Figure:
    """Draw lines, the x and y of each; those of one side look the same and have one name in the legend."""
    figure = go.Figure()
    for (name, its_own), (colour, dash) in zip(sides.items(), STYLES, strict=False):
        for number, (x, y) in enumerate(its_own):
            looks: dict[str, Any] = {"mode": "lines+markers" if markers else "lines", "marker": {"size": 5}}
            looks["line"] = {"color": colour, "dash": dash, "width": 1.5}
            figure.add_scatter(x=x, y=y, name=name, legendgroup=name, showlegend=number == 0, **looks)
    return figure


def take(figure: go.Figure, path: Path, *, height: int = 460) -> None:
    """Write a figure as PNG, 1800 pixels wide, on white."""
    figure.update_layout(template="plotly_white", width=900, height=height, margin={"l": 70, "r": 20, "t": 20, "b": 60})
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise SystemExit("--picture needs chromium, which was not found")
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "page.html"
        style = "<style>body{margin:0}</style>"
        page.write_text(style + figure.to_html(config={"displayModeBar": False}, full_html=False), encoding="utf-8")
        words = ["--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
        size = [f"--window-size=900,{height}", "--force-device-scale-factor=2", f"--screenshot={path.resolve()}"]
        subprocess.run([program, *words, *size, page.as_uri()], check=True, capture_output=True)
