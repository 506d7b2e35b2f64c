"""Tables: what is read back is what was given, and the page shows it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tbptt.report import Table


def read_back(table: Table, folder: Path) -> dict[str, list[Any]]:
    return parquet.read_table(table.write(folder)).to_pydict()


def test_values_and_types_survive(tmp_path: Path) -> None:
    columns = {
        "whole": [1, 2, None],
        "real": [1.5, math.nan, None],
        "infinite": [math.inf, -math.inf, 0.0],
        "mixed": [1, 2.5, None],
        "text": ["<a>", "é\n", None],
        "flag": [True, False, None],
        "lists": [[1.0, math.nan], [], None],
        "nothing": [None, None, None],
    }
    back = read_back(Table("t", columns), tmp_path)
    assert math.isnan(back["real"][1])
    assert back["real"][2] is None  # and that is something else
    assert math.isnan(back["lists"][0][1])
    for name in ("whole", "infinite", "mixed", "text", "flag", "nothing"):
        assert back[name] == columns[name]
    assert [type(back[name][0]) for name in ("whole", "real", "flag", "text")] == [int, float, bool, str]


@pytest.mark.parametrize("values", [[1, "a"], [{"a": 1}, {}], [[1], 2], [True, 2.5], [2**80, 1]])
def test_what_no_type_holds_is_json(values: list[Any], tmp_path: Path) -> None:
    import json

    back = read_back(Table("t", {"x": [*values, None]}), tmp_path)["x"]
    assert [json.loads(each) for each in back[:-1]] == values
    assert back[-1] is None


def test_a_table_without_rows_or_columns_is_written(tmp_path: Path) -> None:
    assert read_back(Table("t", {"x": []}), tmp_path) == {"x": []}
    assert read_back(Table("u", {}), tmp_path) == {}


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    path = Table("../../<b>", {"x": [1]}).write(tmp_path / "tables")
    assert path.parent == tmp_path / "tables"
    assert path.exists()
    assert Table("", {}).file == "table.parquet"


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    Table("t", {"x": [1]}).write(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_long_tables_show_both_ends_and_say_what_is_between() -> None:
    html = Table("t", {"x": list(range(1000, 2000))}).html()
    assert '<td class="number">1000</td>' in html
    assert '<td class="number">1999</td>' in html
    assert "940 more rows in the file" in html
    assert "1,000 rows, t.parquet" in html
    assert "more rows" not in Table("t", {"x": list(range(60))}).html()


def test_digits_are_for_the_page_only(tmp_path: Path) -> None:
    table = Table("t", {"x": [0.123456789, 1234567.0], "y": [[0.123456789], 7]}, digits=3)
    html = table.html()
    assert [text for text in (">0.123<", ">1.23e+06<", ">7<") if text not in html] == []
    assert read_back(table, tmp_path)["x"] == [0.123456789, 1234567.0]


def test_cells_are_legible() -> None:
    html = Table("t", {"x<y": [math.nan, 0.123456789, None, [1.0] * 8, "<i>"]}).html()
    for text in (
        '<th scope="col" class="number">x&lt;y</th>',
        ">nan<",
        ">0.12346<",
        ">-<",
        "… (8 in all)",
        "&lt;i&gt;",
    ):
        assert text in html
    assert "<i>" not in html
