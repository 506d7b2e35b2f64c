"""What a run wrote down, read as it lies there: whole or in part, finished or going on."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tbptt.errors import ConfigError
from tbptt.report.series import Series, paired

__all__ = ["Columns", "RunLog", "read_run"]

_METRICS, _TIMING, _STABILITY = "metrics.jsonl", "timing.jsonl", "stability.jsonl"
_NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


class Columns:
    """Lines of one kind, by column; None where a line does not have it."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}
        self._rows = 0
        self._series: dict[tuple[str, str], Series] = {}

    def __len__(self) -> int:
        return self._rows

    def append(self, line: dict[str, Any]) -> None:
        """Add one line, whatever keys it has."""
        for name in line:
            if name not in self.columns:
                self.columns[name] = [None] * self._rows
        for name, values in self.columns.items():
            value = line.get(name)
            # Equal numbers are one object: most columns of a long run repeat themselves.
            repeats = values and type(value) is type(values[-1]) and value == values[-1]
            values.append(values[-1] if repeats else value)
        self._rows += 1

    def finish(self) -> None:
        """Turn the names of NaN and the infinities into numbers, in columns that have nothing else but numbers."""
        for name, values in self.columns.items():
            if any(isinstance(value, str) for value in values):
                if all(_is_number(value) or value is None for value in values):
                    self.columns[name] = [_number(value) for value in values]
            elif any(isinstance(value, list) for value in values):
                self.columns[name] = [_numbers(value) for value in values]

    def series(self, x: str, y: str) -> Series:
        """Return one column against another, where both have numbers; for when all lines are there."""
        if (x, y) not in self._series:
            nothing: list[Any] = [None] * self._rows
            self._series[x, y] = paired(self.columns.get(x, nothing), self.columns.get(y, nothing))
        return self._series[x, y]

    def last(self, name: str) -> Any:
        """Return the newest value of a column that is not None; None if there is none."""
        return next((value for value in reversed(self.columns.get(name, [])) if value is not None), None)


@dataclass(frozen=True, eq=False)
class RunLog:
    """A run, as far as it is written down.

    Args:
        path: its directory.
        kinds: the lines of all files by their kind, in the order of the files.
        settings: the keys of config.toml, dotted, with their values.
        version: of tbptt, that the run was started with; empty if not known.
        notes: what is missing or damaged, in sentences.
    """

    path: Path
    kinds: dict[str, Columns]
    settings: dict[str, Any]
    version: str
    notes: list[str]

    def lines(self, kind: str) -> Columns:
        """Return the lines of a kind; none if there are none."""
        return self.kinds.get(kind, Columns())


def read_run(path: str | Path) -> RunLog:
    """Read the directory of a run; of what the trainer wrote only metrics.jsonl must be there.

    Raises:
        ConfigError: this is no directory of a run.
    """
    run = Path(path)
    if not (run / _METRICS).is_file():
        came = "it has none" if run.is_dir() else "there is no such directory"
        raise ConfigError(
            f"the directory of a run was expected, with {_METRICS} in it, but of {run} {came}: there is nothing to "
            "report",
            fix="tbptt train --out RUN, or Trainer(..., directory=RUN), writes one",
        )
    kinds: dict[str, Columns] = {}
    notes: list[str] = []
    for name, told in ((_METRICS, "no losses"), (_TIMING, "no times, speed or memory"), (_STABILITY, "no stability")):
        if not (run / name).is_file():
            notes.append(f"{name} is not there: {told} can be shown.")
            continue
        notes += _read_lines(run / name, kinds)
    for path in sorted(run.glob("*.jsonl")):  # of LagCurves, wherever it was told to write, and a program's own
        if path.name not in (_METRICS, _TIMING, _STABILITY):
            notes += _read_lines(path, kinds)
    for columns in kinds.values():
        columns.finish()
    settings = _settings(run, notes)
    return RunLog(run, kinds, settings, _version(run, notes), notes)


def _read_lines(path: Path, kinds: dict[str, Columns]) -> list[str]:
    """Add the lines of a file to `kinds`; return what to say of it."""
    damaged, unfinished, rows = 0, False, 0
    with path.open("rb") as file:
        for text in file:
            if not text.strip():
                continue
            line = _parsed(text)
            if line is None:
                unfinished, damaged = not text.endswith(b"\n"), damaged + text.endswith(b"\n")
                continue
            kind = line.get("kind", path.stem)
            kinds.setdefault(kind if isinstance(kind, str) else path.stem, Columns()).append(line)
            rows += 1
    notes = [] if rows else [f"{path.name} has no lines yet."]
    if unfinished:
        notes.append(f"{path.name} ends in half a line: the run is going on, or was killed.")
    if damaged:
        notes.append(f"{path.name} has {damaged:,} {'line' if damaged == 1 else 'lines'} that cannot be read.")
    return notes


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", line) if isinstance(line, dict) else None


def _settings(run: Path, notes: list[str]) -> dict[str, Any]:
    path = run / "config.toml"
    if not path.is_file():
        notes.append("config.toml is not there: the run was made from Python, or by something else than tbptt train.")
        return {}
    try:
        return dict(_dotted(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        notes.append(f"config.toml cannot be read: {error}")
        return {}


def _version(run: Path, notes: list[str]) -> str:
    path = run / "run.json"
    if not path.is_file():
        return ""
    try:
        return str(json.loads(path.read_bytes())["version"])
    except (OSError, ValueError, TypeError, KeyError):
        notes.append("run.json cannot be read.")
        return ""


def _dotted(tables: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _dotted(cast("dict[str, Any]", value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in _NOT_FINITE
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float | None:
    return None if value is None else _NOT_FINITE[value] if isinstance(value, str) else float(value)


def _numbers(value: Any) -> Any:
    items = cast("list[Any]", value) if isinstance(value, list) else []
    if any(isinstance(item, str) for item in items) and all(_is_number(item) or item is None for item in items):
        return [_number(item) for item in items]
    return value
