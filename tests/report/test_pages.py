"""Pages: well formed, self-contained, escaped, and figures that plotly accepts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly import graph_objects

from tbptt.comparison import Comparison
from tbptt.errors import ShapeError
from tbptt.horizon import Band, HorizonReport
from tbptt.horizon.costs import Costs
from tbptt.report import (
    Figure,
    Page,
    Section,
    Strip,
    Table,
    comparison_page,
    horizon_page,
    read_run,
    run_page,
)

VOID = {"meta", "br", "wbr", "img", "input", "hr", "link"}
PAGES = ("run", "horizon", "comparison")


def band(at: tuple[int, ...], values: list[float]) -> Band:
    return Band(at, tuple(values), tuple(0.9 * each for each in values), tuple(1.1 * each for each in values))


class Outline(HTMLParser):
    """What stands on a page; refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole(pages: dict[str, Page], name: str) -> None:
    html = pages[name].html()
    seen = Outline(html)
    assert html.count("* plotly.js v") == 1
    assert [each["lang"] for each in seen.all("html")] == ["en"]
    assert len(seen.all("title")) == len(seen.all("h1")) == 1
    assert {each.get("scope") for each in seen.all("th")} == {"col"}
    assert all(each["aria-label"] for each in seen.all("div") if each.get("class") == "plot")
    assert len(seen.all("caption")) == len(seen.all("table")) > 0
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched(pages: dict[str, Page], name: str) -> None:
    seen = Outline(pages[name].html())
    for _, attributes in seen.tags:
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes)
    policy = [each for each in seen.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy[0]["content"]).startswith("default-src 'none';")


@pytest.mark.parametrize("name", PAGES)
def test_strings_of_the_data_are_only_strings(pages: dict[str, Page], name: str) -> None:
    html = pages[name].html()
    seen = Outline(html)
    assert 'alert("1")' in seen.text
    assert len([each for each in seen.all("script") if each.get("type") is None]) == 2  # plotly.js and page.js
    assert seen.all("b") == [{}] * len(seen.all("b"))
    assert "<script>alert" not in html


@pytest.mark.parametrize("name", PAGES)
def test_plotly_accepts_every_figure_and_choice(pages: dict[str, Page], name: str) -> None:
    figures = [figure for section in pages[name].sections for figure in section.figures]
    assert len(figures) >= 4
    for figure in figures:
        drawn = graph_objects.Figure(data=list(figure.data), layout=dict(figure.layout))
        for choice in figure.choices:
            for values in choice.data.values():
                assert len(values) == len(figure.data)
            drawn.update_layout({key.replace(".", "_"): value for key, value in choice.layout.items()})
        for axis in ("xaxis", "yaxis"):
            assert drawn.layout[axis].title.text or not drawn.layout[axis].showticklabels  # rows have names instead


def test_plotly_refuses_what_is_no_figure() -> None:
    with pytest.raises(ValueError, match="Invalid property"):
        graph_objects.Figure(data=[{"type": "scatter", "nonsense": 1}])


def test_figures_hold_plain_json(pages: dict[str, Page]) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    for page in pages.values():
        packed = re.findall(r'<script type="application/json">(.*?)</script>', page.html(), re.DOTALL)
        assert len(packed) == sum(len(section.figures) for section in page.sections)
        for each in packed:
            assert json.loads(each, parse_constant=refuse)["data"]


def test_tables_lie_beside_the_page(pages: dict[str, Page], tmp_path: Path) -> None:
    path = pages["horizon"].write(tmp_path / "new" / "mine.html")
    assert path.read_text(encoding="utf-8") == pages["horizon"].html()
    written = {each.name for each in (tmp_path / "new" / "mine_tables").iterdir()}
    named = {table.file for section in pages["horizon"].sections for table in section.tables}
    assert written == named
    assert {"lags.parquet", "lookbacks.parquet", "strips.parquet"} < written
    assert {each.name for each in path.parent.iterdir()} == {"mine.html", "mine_tables"}


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page("a", "b", [])
    path = page.write(tmp_path / "page.html")
    before = path.read_bytes()

    def fail(self: Page) -> str:
        raise OSError("full")

    monkeypatch.setattr(Page, "html", fail)
    with pytest.raises(OSError, match="full"):
        Page("another", "b", []).write(path)
    assert path.read_bytes() == before


def test_a_page_without_figures_needs_no_plotly() -> None:
    page = Page("a", "b\n\nc", [Section("d", tables=[Table("t", {"x": [1]}, folded=False)])])
    html = page.html()
    assert len(html) < 20_000
    assert "<p>b</p><p>c</p>" in html


def test_lone_surrogates_do_not_stop_a_page(tmp_path: Path) -> None:
    assert Page("\ud800", "b", []).write(tmp_path / "a.html").stat().st_size > 0


def test_long_runs_make_no_long_pages(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for number in range(1, 30_001):
            loss = 99.5 if number == 12_345 else 1.0 / number
            file.write(json.dumps({"kind": "update", "update": number, "loss": loss, "gradient_norm": loss}) + "\n")
    page = run_page(read_run(tmp_path))
    figures: list[Figure] = [figure for section in page.sections for figure in section.figures]
    for figure in figures:
        assert max(len(trace["x"]) for trace in figure.data) <= 2000
    assert max(figures[0].data[0]["y"]) == 99.5  # the one spike
    assert any("30,000" in note for note in page.notes)
    assert len(page.html()) < 6e6


def figures_of(page: Page) -> dict[str, Figure]:
    return {figure.title: figure for section in page.sections for figure in section.figures}


def test_a_look_back_that_changes_now_and_then_is_drawn_in_steps(pages: dict[str, Page]) -> None:
    lengths = figures_of(pages["run"])["Lengths over time"]
    assert {trace["line"]["shape"] for trace in lengths.data if "line" in trace} == {"hv"}
    losses = figures_of(pages["run"])["Training and validation loss"]
    assert {trace["line"]["shape"] for trace in losses.data if "shape" in trace.get("line", {})} == {"linear"}


def test_axes_of_amounts_begin_at_zero(pages: dict[str, Page]) -> None:
    speed = figures_of(pages["run"])["Speed and memory"]
    assert speed.layout["yaxis"]["rangemode"] == "tozero"
    assert speed.choices[1].layout["yaxis.rangemode"] == "tozero"
    assert figures_of(pages["run"])["Training and validation loss"].layout["yaxis"]["rangemode"] == "normal"


def test_triangles_are_explained_where_there_are_any(pages: dict[str, Page], run: Path) -> None:
    title = "Training and validation loss"
    assert "is an alarm" in figures_of(pages["run"])[title].text
    (run / "stability.jsonl").unlink()
    assert figures_of(run_page(read_run(run)))[title].text == ""


def test_a_bias_that_is_not_measurable_is_not_called_one(horizon: HorizonReport) -> None:
    assert "Bias by look-back" in figures_of(horizon_page(horizon))
    unknown = replace(horizon, bias=band((1, 2, 4, 8), [math.nan] * 4))
    figures = figures_of(horizon_page(unknown))
    assert "is not measurable here" in figures["Share cut off by look-back"].text
    assert "Share cut off against cost" in figures
    assert not any("bias" in str(trace["name"]) for trace in figures["Share cut off by look-back"].data)


def test_a_refusal_is_said_first_and_no_look_back_is_marked(horizon: HorizonReport) -> None:
    page = horizon_page(horizon, refused="its curve <is> too short")
    assert page.summary.startswith("No k2 can be recommended: its curve <is> too short. ")
    assert "chosen k2" not in page.html()
    assert "recommended" not in horizon_page(horizon).summary


def test_labels_that_would_run_into_each_other_are_left_out(horizon: HorizonReport) -> None:
    at = tuple(range(1, 41))
    costs = Costs(at, tuple(0.1 + 0.01 * each for each in at), tuple(100 * each for each in at), 2)
    state, bias = band(at, [0.5**each for each in at]), band(at, [1.0 / each for each in at])
    dense = replace(horizon, state=state, bias=bias, costs=costs, context=None, max_lag=40)
    [points] = [each for each in figures_of(horizon_page(dense))["Bias against cost"].data if each.get("visible")]
    written = [label for label in points["text"] if label]
    assert 4 <= len(written) < 20
    assert {"1", "39"} <= set(written)  # 40 is the reference
    assert points["customdata"] == list(at[:-1])  # whichever it is, pointing at it tells


def test_names_in_figures_fit_a_telephone(comparison: Comparison) -> None:
    long = replace(comparison.rows[0], name="TBPTT(k1=RandomLength(mean=16), k2=Adaptive(max=256))")
    page = comparison_page(replace(comparison, rows=(long, *comparison.rows[1:])))
    names = [trace["name"] for figure in figures_of(page).values() for trace in figure.data if trace.get("name")]
    assert "1: TBPTT(k1=RandomLength(mean=16…" in names
    assert long.name in page.html()  # whole, with its number, in the table


def test_strips_need_one_influence_a_character() -> None:
    with pytest.raises(ShapeError, match="3 characters"):
        Strip("abc", [1.0], "d")


def test_strength_is_the_root_of_the_share() -> None:
    strip = Strip("abcd", [4.0, 1.0, 0.0, float("nan")], "e")
    assert [strip.strength(each) for each in strip.influence] == [1.0, 0.5, 0.0, 0.0]
    assert Strip("a", [0.0], "b").strength(0.0) == 0.0
