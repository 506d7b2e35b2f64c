"""Rows of numbers from a stream of CSV, line by line as they arrive.

Letters: D numbers of a row.
"""

from __future__ import annotations

import csv
import math
import os
import select
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tbptt.cli.settings import did_you_mean
from tbptt.errors import ConfigError, StreamError

__all__ = ["BadRow", "Lines", "Row", "Table", "open_input"]

_CHUNK = 1 << 16
_WAIT_S = 0.1
_LONGEST = 1 << 24
"""Bytes of a line: beyond it there is no line, and memory would fill up with what is something else."""


class BadRow(StreamError):
    """A line is no row of the table: it can be skipped, or be the end."""


def open_input(source: str) -> int:
    """Return the file descriptor of `csv:-`, standard input, or `csv:PATH`.

    Raises:
        ConfigError: neither.
        StreamError: no such file.
    """
    kind, colon, place = source.partition(":")
    if kind != "csv" or not colon or not place:
        raise ConfigError(
            f"--input csv:- for standard input, or csv:PATH, was expected, but {source!r} came",
            fix=f"--input csv:{source}" if not colon else "--input csv:-",
        )
    if place == "-":
        return sys.stdin.fileno()
    path = Path(place).expanduser()
    if not path.is_file() and not path.is_fifo():
        raise StreamError(
            f"a file of rows was expected, but {path} is " + ("a directory" if path.is_dir() else "not there"),
            fix=f"check the path; it is looked for at {path.absolute()}",
        )
    return os.open(path, os.O_RDONLY)


class Lines:
    """The lines of a file or a pipe, each as soon as it is complete; memory holds one chunk.

    Args:
        descriptor: where they come from.
        follow: whether to wait for more at the end.
        stopped: asked while waiting; once true, there is no next line.

    Attributes:
        number: of lines read.
        num_bytes: of these.
        checksum: CRC-32 of these.
    """

    def __init__(self, descriptor: int, *, follow: bool, stopped: Callable[[], bool]) -> None:
        self.descriptor, self.follow, self.stopped = descriptor, follow, stopped
        self.number = self.num_bytes = self.checksum = 0
        self._rest = b""
        self._arrived = 0

    def next(self) -> bytes | None:
        """Return the next line with its end; None when there is no more, or it was stopped."""
        line = self.peek()
        if line is not None:
            self.take(line)
        return line

    def peek(self) -> bytes | None:
        """Return the next line, which stays the next."""
        while not self.stopped():
            end = self._rest.find(b"\n")
            if end >= 0:
                return self._rest[: end + 1]
            if len(self._rest) > _LONGEST:
                raise StreamError(
                    f"lines were expected, but after line {self.number} there is none within {_LONGEST} bytes",
                    fix="is it text? one row a line, each ended by a newline",
                )
            if not self._ready():
                continue
            chunk = os.read(self.descriptor, _CHUNK)
            self._rest += chunk
            self._arrived += len(chunk)
            if not chunk and self.follow:
                self._wait_for_more()
            elif not chunk:
                return self._rest or None  # the last line may lack its end
        return None

    def take(self, line: bytes) -> None:
        """Count the line that `peek` has returned as read."""
        self._rest = self._rest[len(line) :]
        self.number += 1
        self.num_bytes += len(line)
        self.checksum = zlib.crc32(line, self.checksum)

    def _ready(self) -> bool:
        """Wait a little for something to read, so that a signal is noticed even where nothing arrives."""
        return os.name == "nt" or bool(select.select([self.descriptor], [], [], _WAIT_S)[0])

    def _wait_for_more(self) -> None:
        size = os.fstat(self.descriptor).st_size
        if size < self._arrived:
            raise StreamError(
                f"a file that grows was expected, but it was {self._arrived} bytes long and has {size} now: its rows "
                "are others",
                fix="start anew on the new file; let what writes it append",
            )
        time.sleep(_WAIT_S)


@dataclass(frozen=True, eq=False)
class Row:
    """One row.

    Args:
        numbers: of the columns that are learned from. Shape (D,), float64.
        label: the text in the target's column, empty for none.
    """

    numbers: npt.NDArray[np.float64]
    label: str


@dataclass(frozen=True)
class Table:
    """The columns of the rows, as the first line names them.

    Args:
        header: the names, in order.
        target: the column that is predicted.
        ignored: columns that are left out.

    Raises:
        ConfigError: a column that is not there, one that is there twice, or none to learn from.
    """

    header: tuple[str, ...]
    target: str
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, name in (("--target", self.target), *(("--ignore", each) for each in self.ignored)):
            if name not in self.header:
                raise ConfigError(
                    f"{option} was expected to be one of the columns {', '.join(self.header)}, but is {name!r}",
                    fix=did_you_mean(name, self.header) or "the first line names the columns",
                )
        twice = sorted({name for name in self.header if self.header.count(name) > 1})
        if twice:
            raise ConfigError(
                f"a name for each column was expected, but {', '.join(twice)} stands there twice in the first line",
                fix="give each column a name of its own; the first line is the header",
            )
        if self.target in self.ignored:
            raise ConfigError(f"the target {self.target!r} was expected to be used, but --ignore leaves it out")
        if not self.features:
            raise ConfigError(
                f"a column besides the target {self.target!r} was expected, but there is none to learn from",
                fix="rows with columns of inputs; --ignore leaves columns out",
            )

    @staticmethod
    def of_line(line: bytes, target: str, ignored: Sequence[str]) -> Table:
        """Return the columns that the first line names."""
        fields = _fields(line.decode("utf-8-sig"), 1)
        return Table(tuple(field.strip() for field in fields), target, tuple(ignored))

    @cached_property
    def features(self) -> tuple[int, ...]:
        """The places of the columns that are learned from."""
        left_out = {self.target, *self.ignored}
        return tuple(index for index, name in enumerate(self.header) if name not in left_out)

    def row(self, line: bytes, number: int) -> Row:
        """Return the row of a line.

        Args:
            line: the line.
            number: its number, from 1, for messages.

        Raises:
            BadRow: it is none.
        """
        try:
            fields = _fields(line.decode("utf-8"), number)
        except UnicodeDecodeError as error:
            raise BadRow(f"line {number} was expected to be text in UTF-8, but is not: {error}") from error
        if len(fields) != len(self.header):
            raise BadRow(
                f"line {number} was expected to have {len(self.header)} fields, as the first line has, but has "
                f"{len(fields) if line.strip() else 'none'}",
                fix="--on-bad-row skip passes over such lines",
            )
        numbers = [_number(fields[index], self.header[index], number) for index in self.features]
        return Row(np.array(numbers), fields[self.header.index(self.target)].strip())

    def number(self, label: str, line: int) -> float:
        """Return a label as a number.

        Raises:
            BadRow: it is none.
        """
        return _number(label, self.target, line)


def _fields(text: str, number: int) -> list[str]:
    try:
        return next(csv.reader([text.rstrip("\r\n")], strict=True), [])
    except csv.Error as error:
        raise BadRow(
            f"line {number} was expected to be one row of CSV, but is not: {error}",
            fix="quotes end in the line in which they begin; --on-bad-row skip passes over such lines",
        ) from error


def _number(field: str, column: str, line: int) -> float:
    try:
        value = math.nan if "_" in field else float(field)  # Python's own spelling 1_000 is nobody's data
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    raise BadRow(
        f"column {column!r} of line {line} was expected to be a finite number, but is {field.strip()!r}"
        + ("" if field.strip() else ", empty"),
        fix=f"--ignore {column} leaves the column out; --on-bad-row skip passes over such lines",
    )
