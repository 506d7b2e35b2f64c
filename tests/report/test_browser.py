"""The pages in a real browser: every figure is drawn, every button works, nothing goes wrong unseen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tbptt.report import Page

Browser = Callable[..., Any]

CLICK = """<script>(async () => {
  const drawn = () => document.documentElement.dataset.drawn;
  while (!drawn()) await new Promise((done) => setTimeout(done, 50));
  for (const holder of document.querySelectorAll("figure")) {
    const plot = holder.querySelector(".plot");
    const titles = () => [plot.layout.xaxis.title.text, plot.layout.xaxis.type, plot.layout.yaxis.title.text,
                          plot.layout.yaxis.type, plot.querySelectorAll("g.trace").length].join("; ");
    const seen = [titles()];
    for (const button of [...holder.querySelectorAll("button")].slice(1)) {
      button.click();
      await new Promise((done) => setTimeout(done, 50));
      seen.push(`${button.getAttribute("aria-pressed")}: ${titles()}`);
    }
    holder.dataset.seen = seen.join(" | ");
  }
})()</script>"""


def opened(page: Page, path: Path, browse: Browser, fragment: str = "") -> str:
    """Write the page with a script that presses all buttons, look at it, and return what became of it."""
    page.write(path)
    html = path.read_text(encoding="utf-8").replace("</body>", f"{CLICK}</body>")
    path.write_text(html, encoding="utf-8")
    seen = browse(path, fragment=fragment)
    assert seen.errors == []
    figures = [figure for section in page.sections for figure in section.figures]
    assert f'data-drawn="{len(figures)}"' in seen.dom
    found = re.findall(r'<figure[^>]* data-seen="([^"]*)"', seen.dom)
    assert len(found) == len(figures)
    for figure, told in zip(figures, found, strict=True):
        views = told.split(" | ")
        assert len(views) == max(len(figure.choices), 1)
        assert len(set(views)) == len(views), "a button changes nothing"
        assert all(each.startswith("true: ") for each in views[1:])
    assert seen.dom.count('class="main-svg"') >= len(figures)
    assert "NaN" not in "".join(re.findall(r' d="([^"]*)"', seen.dom))
    return seen.dom


def test_a_run(pages: dict[str, Page], tmp_path: Path, browse: Browser) -> None:
    dom = opened(pages["run"], tmp_path / "page.html", browse)
    assert "updates; linear; loss; linear;" in dom
    assert "not a number (1)" in dom  # in the legend


def test_a_horizon_and_its_strips(pages: dict[str, Page], tmp_path: Path, browse: Browser) -> None:
    dom = opened(pages["horizon"], tmp_path / "page.html", browse, fragment="#strip-2")
    assert re.search(r'id="strip-1"[^>]*hidden', dom)
    assert not re.search(r'id="strip-2"[^>]*hidden', dom)
    assert 'aria-pressed="true">2: &lt;<' in dom
    assert "chosen k2 = 5" in dom


def test_a_comparison(pages: dict[str, Page], tmp_path: Path, browse: Browser) -> None:
    dom = opened(pages["comparison"], tmp_path / "page.html", browse)
    assert "seconds of training; linear; validation loss; linear;" in dom
    legends = re.findall(r'class="legendtext"[^>]*>([^<]*)<', dom)
    assert any(each.startswith("&lt;script&gt;alert") for each in legends)  # drawn as it is written


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
    html = path.read_text(encoding="utf-8")
    bad = '<img src="http://example.org/a.png"><script>nonsense()</script></body>'
    path.write_text(html.replace("</body>", bad), encoding="utf-8")
    errors = " ".join(browse(path).errors)
    assert "nonsense is not defined" in errors
    assert "example.org" in errors
    assert "Content Security Policy" in errors
