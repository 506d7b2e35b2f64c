"""The pages in a real browser: every figure is drawn, every button works, all can be read, nothing fails unseen."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbptt.report import Figure, Page, Section
from tbptt.report.figure import Axis, axes

Browser = Callable[..., Any]

LOOK = Path(__file__).with_name("look.js")
PAPER = {False: "rgb(255, 255, 255)", True: "rgb(20, 24, 28)"}
both = pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)], ids=["telephone", "desk in the dark"])


def look(page: Page, path: Path, browse: Browser, width: int, dark: bool, fragment: str = "") -> tuple[str, list[str]]:
    """Press all buttons of a page so wide; return what became of it, and what a person would stumble over."""
    page.write(path)
    script = LOOK.read_text(encoding="utf-8").replace("WIDTH", str(width))
    source = path.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>")
    path.write_text(source, encoding="utf-8")
    size = f"--window-size={max(width, 500)},900"  # a window is not narrower, so the page in it is made so
    colours = ["--blink-settings=preferredColorScheme=0"] if dark else []
    seen = browse(path, "--dump-dom", size, *colours, fragment=fragment)
    assert seen.errors == []
    [told] = re.findall(r'<body[^>]* data-faults="([^"]*)" data-paper="([^"]*)"', seen.dom)
    assert told[1] == PAPER[dark]
    return seen.dom, json.loads(html.unescape(told[0]))


def opened(page: Page, path: Path, browse: Browser, width: int, dark: bool, fragment: str = "") -> str:
    """Look at a page, which must be drawn, change with its buttons, and be easy to read; return what became of it."""
    dom, faults = look(page, path, browse, width, dark, fragment)
    assert faults == []
    figures = [figure for section in page.sections for figure in section.figures]
    assert f'data-drawn="{len(figures)}"' in dom
    found = re.findall(r'<figure[^>]* data-seen="([^"]*)"', dom)
    assert len(found) == len(figures)
    for figure, told in zip(figures, found, strict=True):
        views = told.split(" | ")
        assert len(views) == max(len(figure.choices), 1)
        assert len(set(views)) == len(views), "a button changes nothing"
        assert all(each.startswith("true: ") for each in views[1:])
    assert dom.count('class="main-svg"') >= len(figures)
    assert "NaN" not in "".join(re.findall(r' d="([^"]*)"', dom))
    return dom


@both
def test_a_run(pages: dict[str, Page], tmp_path: Path, browse: Browser, width: int, dark: bool) -> None:
    dom = opened(pages["run"], tmp_path / "page.html", browse, width, dark)
    assert "updates; linear; loss; linear;" in dom
    assert "not a number (1)" in dom  # in the legend


@both
def test_a_horizon_and_its_strips(
    pages: dict[str, Page], tmp_path: Path, browse: Browser, width: int, dark: bool
) -> None:
    dom = opened(pages["horizon"], tmp_path / "page.html", browse, width, dark, fragment="#strip-2")
    assert re.search(r'id="strip-1"[^>]*hidden', dom)
    assert not re.search(r'id="strip-2"[^>]*hidden', dom)
    assert 'aria-pressed="true">2: &lt;<' in dom
    assert "chosen k2 = 5" in dom


@both
def test_a_comparison(pages: dict[str, Page], tmp_path: Path, browse: Browser, width: int, dark: bool) -> None:
    dom = opened(pages["comparison"], tmp_path / "page.html", browse, width, dark)
    assert "seconds of training; linear; validation loss; linear;" in dom
    legends = re.findall(r'class="legendtext"[^>]*>([^<]*)<', dom)
    assert any(each.startswith("2: &lt;script&gt;alert") for each in legends)  # drawn as it is written


def test_the_look_sees_what_is_hard_to_read(tmp_path: Path, browse: Browser) -> None:
    bad = {"showarrow": False, "x": 1, "font": {"color": "#dddddd"}}
    texts = [("one", 1), ("two", 1), ("a very long name " * 9, 2)]
    layout = axes(Axis("x"), Axis("y")) | {"annotations": [bad | {"text": text, "y": y} for text, y in texts]}
    figure = Figure("Bad", "Text.", [{"type": "scatter", "x": [0, 1], "y": [1, 2]}], layout, height=60)
    wide = '<div style="width: 600px; color: #ccc">wide</div>'
    page = Page("a", "b", [Section("c", figures=[figure], html=wide)])
    found = " ".join(look(page, tmp_path / "page.html", browse, 390, False)[1])
    for told in ("the page scrolls sideways", "beyond the edge: DIV wide", "pale: DIV wide", "squeezed: Bad"):
        assert told in found
    for told in ("cut off: Bad: a very long", "overlap: Bad: one / two", "pale: Bad: one"):
        assert told in found


def test_pictures_are_not_blank(pages: dict[str, Page], tmp_path: Path, browse: Browser) -> None:
    image = pytest.importorskip("PIL.Image")
    losses = next(section for section in pages["run"].sections if section.heading == "Loss")
    path = Page("a", "b", [losses]).write(tmp_path / "page.html")
    browse(path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1280,1000")
    with image.open(tmp_path / "page.png") as picture:
        colours = dict((colour, count) for count, colour in picture.convert("RGB").getcolors(1 << 24))
    assert colours[(0, 114, 178)] > 300  # the first line's own blue
    assert colours[(28, 33, 38)] > 300  # ink


def test_the_tests_see_what_goes_wrong(tmp_path: Path, browse: Browser) -> None:
    path = Page("a", "b", []).write(tmp_path / "page.html")
    source = path.read_text(encoding="utf-8")
    bad = '<img src="http://example.org/a.png"><script>nonsense()</script></body>'
    path.write_text(source.replace("</body>", bad), encoding="utf-8")
    errors = " ".join(browse(path).errors)
    assert "nonsense is not defined" in errors
    assert "example.org" in errors
    assert "Content Security Policy" in errors
