"""Text, symbol by symbol: read one, predict the next.

Letters: N symbols of the part that is read, T time, B lanes.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

from tbptt.errors import ConfigError, StreamError
from tbptt.streams.arrays import ArrayStream
from tbptt.streams.base import Stream
from tbptt.streams.leaves import Mapped, mapped_files, release
from tbptt.window import Window

__all__ = ["TextStream", "Vocabulary"]

Ids: TypeAlias = npt.NDArray[np.int64]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_CHUNK = 1 << 20
"""Bytes looked at in one go when a file is scanned."""


@final
@dataclass(frozen=True)
class Vocabulary:
    """The characters that a model knows, each with a number.

    Args:
        symbols: the characters, each once; the id of a character is its place.

    Raises:
        ConfigError: no character, or one twice.

    Example:
        >>> vocabulary = Vocabulary.of("banana")
        >>> vocabulary.symbols, vocabulary.encode("nab").tolist(), vocabulary.decode([1, 0, 2])
        ('abn', [2, 0, 1], 'ban')
    """

    symbols: str

    def __post_init__(self) -> None:
        twice = [symbol for symbol, count in Counter(self.symbols).items() if count > 1]
        if not self.symbols or twice:
            raise ConfigError(
                "a vocabulary of characters, each once, was expected, "
                + (f"but {twice[0]!r} is in it twice: its id is not defined" if twice else "but none came"),
                fix="Vocabulary.of(text)",
            )

    @staticmethod
    def of(text: str) -> Vocabulary:
        """Return the characters of `text`, sorted."""
        return Vocabulary("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def _table(self) -> Ids:
        """The id of each code point, -1 for none; the last entry stands for all that are larger."""
        points = _code_points(self.symbols)
        table = np.full(int(points.max()) + 2, -1, dtype=np.int64)
        table[points] = np.arange(len(points))
        return table

    def ids_of(self, points: npt.NDArray[Any]) -> Ids:
        """Return the id of each code point, -1 where it has none; for those who decode by themselves."""
        return self._table[np.minimum(points, len(self._table) - 1)]

    def encode(self, text: str) -> Ids:
        """Return the id of each character. Shape (len(text),), int64.

        Raises:
            StreamError: a character is not in the vocabulary; says which, and where.
        """
        ids = self.ids_of(_code_points(text))
        if len(ids) and ids.min() < 0:
            at = int(ids.argmin())
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise _unknown(self, text[at], line, column, "the text")
        return ids

    def decode(self, ids: Any) -> str:
        """Return the text of a sequence, array or CPU tensor of ids.

        Raises:
            StreamError: a number that is no id of this vocabulary.
        """
        numbers = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            wrong = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise StreamError(
                f"ids from 0 to {len(self) - 1} were expected, but {wrong} came: it stands for no character",
                fix="decode with the vocabulary that encoded",
            )
        return "".join(self.symbols[number] for number in numbers)

    def to_dict(self) -> dict[str, str]:
        """Return the vocabulary as plain values, for a configuration or JSON."""
        return {"symbols": self.symbols}

    @staticmethod
    def from_dict(plain: dict[str, str]) -> Vocabulary:
        """Return the vocabulary that `to_dict` wrote.

        Raises:
            ConfigError: it did not write this.
        """
        if set(plain) != {"symbols"}:
            raise ConfigError(f"the key 'symbols' was expected, but {sorted(plain)} came", fix="Vocabulary.of(text)")
        return Vocabulary(plain["symbols"])


@final
class TextStream(Stream):
    """Read a text as `lanes` pieces side by side, the next symbol being the target.

    Inputs and targets are ids, (T, B) int64. Nothing is translated: a carriage return or a byte order
    mark is a symbol like any other. A file that is read as bytes, or is ASCII throughout, stays mapped and
    costs no memory; any other is decoded once, into one to four bytes a character.

    Args:
        source: the path of a file, or the encoded text itself as `bytes`; UTF-8 unless read as bytes.
        lanes: the number of pieces, B.
        unit: "characters", or "bytes" with the byte itself as its id.
        vocabulary: the characters and their ids; None: those of the whole text, sorted, whatever part of
            it is read. With unit="bytes" there is none.
        begin: where the part that is read begins, as a fraction of the text's symbols.
        end: where it ends. Train with end=0.9 and test with begin=0.9.

    Attributes:
        vocabulary: the characters and their ids; None for bytes.
        num_symbols: the number of ids that can come.

    Raises:
        ConfigError: a setting that cannot be meant.
        StreamError: no file, an empty one, invalid UTF-8, a character outside the vocabulary, or too
            few symbols for the lanes.

    Example:
        >>> stream = TextStream(b"to be or not", lanes=1)
        >>> window = stream.read(4)
        >>> stream.vocabulary.decode(window.inputs), stream.vocabulary.decode(window.targets)
        ('to b', 'o be')
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        lanes: int,
        unit: Literal["characters", "bytes"] = "characters",
        vocabulary: Vocabulary | None = None,
        begin: float = 0.0,
        end: float = 1.0,
    ) -> None:
        if unit not in ("characters", "bytes") or (unit == "bytes" and vocabulary is not None):
            came = f"unit={unit!r}" + ("" if vocabulary is None else " with a vocabulary of characters")
            raise ConfigError(f"unit 'characters' or 'bytes' was expected, but {came} came", fix='unit="characters"')
        if not 0.0 <= begin < end <= 1.0:
            raise ConfigError(
                f"0 <= begin < end <= 1 was expected, as fractions of the text, but {begin=} and {end=} came",
                fix="end=0.9 to train, begin=0.9 to test",
            )
        name = "the text" if isinstance(source, bytes) else str(source)
        raw = np.frombuffer(source, dtype=np.uint8) if isinstance(source, bytes) else _map(Path(source))
        if not len(raw):
            raise StreamError(f"{name} was expected to hold text, but is empty", fix="look at how it was written")
        if unit == "bytes":
            symbols = _Symbols(raw[slice(*_part(len(raw), begin, end))])
        else:
            symbols = _characters(raw, name, vocabulary, (begin, end))
        if len(symbols.ids) < 2:
            raise StreamError(
                f"at least two symbols were expected in the part of {name} that is read, but it has "
                f"{len(symbols.ids)}: none has a next one to predict",
                fix="widen begin and end",
            )
        self.vocabulary = symbols.vocabulary
        self.num_symbols = 256 if symbols.vocabulary is None else len(symbols.vocabulary)
        self._rows = ArrayStream(symbols.rows(0, -1), symbols.rows(1, None), lanes=lanes)
        self.lanes = lanes

    @property
    def steps(self) -> int:
        """The steps of one pass: the length of the longest lane."""
        return self._rows.steps

    def read(self, steps: int) -> Window:
        """Return the next `steps` steps, fewer at the end of a pass.

        Raises:
            EndOfStream: the pass is over.
        """
        return self._rows.read(steps)

    def rewind(self) -> None:
        """Go back to the first symbol: the next pass over the same text."""
        self._rows.rewind()

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, and what it is a cursor into."""
        return self._rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the cursor where `state_dict` found it.

        Raises:
            StreamError: the state belongs to a text of another length or cut.
        """
        self._rows.load_state_dict(state)


@dataclass(frozen=True, eq=False)
class _Symbols:
    """The part of a text that is read: ids, or bytes that a table turns into ids."""

    ids: npt.NDArray[Any]
    vocabulary: Vocabulary | None = None
    table: Ids | None = None

    def rows(self, first: int, last: int | None) -> npt.NDArray[Any] | Mapped:
        ids = self.ids[first:last]
        return ids if self.table is None else Mapped(ids, self.table.__getitem__)


def _characters(raw: Bytes, name: str, vocabulary: Vocabulary | None, fractions: tuple[float, float]) -> _Symbols:
    used = _used_bytes(raw)
    if not used[128:].any():  # ASCII: a character is a byte, so that the file may stay where it is
        found = vocabulary or Vocabulary("".join(map(chr, np.flatnonzero(used).tolist())))
        first, last = _part(len(raw), *fractions)
        table = found.ids_of(np.arange(256))
        unknown = np.flatnonzero(_used_bytes(raw[first:last]) & (table < 0))
        if len(unknown):
            at = min(_find(raw, byte, first) for byte in unknown.tolist())
            raise _unknown(found, chr(raw[at]), *_line_and_column(raw, name, at), name)
        return _Symbols(raw[first:last], found, table)
    characters: set[str] = set()
    total = 0
    for text in _decoded(raw, name):
        characters.update(text)
        total += len(text)
    found = vocabulary or Vocabulary("".join(sorted(characters)))
    first, last = _part(total, *fractions)
    ids = np.empty(last - first, dtype=np.min_scalar_type(len(found)))
    at = 0
    for text in _decoded(raw, name):
        begin, end = max(first - at, 0), min(last - at, len(text))
        if begin < end:
            chunk = found.ids_of(_code_points(text[begin:end]))
            if chunk.min() < 0:
                wrong = begin + int((chunk < 0).argmax())
                raise _unknown(found, text[wrong], *_line_and_column(raw, name, at + wrong), name)
            ids[at + begin - first : at + end - first] = chunk
        at += len(text)
    return _Symbols(ids, found)


def _part(total: int, begin: float, end: float) -> tuple[int, int]:
    return round(begin * total), round(end * total)


def _map(path: Path) -> Bytes:
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                return np.empty(0, dtype=np.uint8)  # which cannot be mapped
            return np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise StreamError(
            f"a readable file was expected, but {path} is none ({error}): there is no text to learn from",
            fix=f"check the path; it is looked for at {path.absolute()}",
        ) from error


def _chunks(raw: Bytes) -> Iterator[Bytes]:
    files = mapped_files([raw])
    for begin in range(0, len(raw), _CHUNK):
        yield raw[begin : begin + _CHUNK].view(np.ndarray)
        release(files)


def _used_bytes(raw: Bytes) -> npt.NDArray[np.bool_]:
    used = np.zeros(256, dtype=np.bool_)
    for chunk in _chunks(raw):
        used |= np.bincount(chunk, minlength=256) > 0
    return used


def _find(raw: Bytes, byte: int, begin: int) -> int:
    """Return where `byte` first stands, at or after `begin`; it is known to be there."""
    for chunk in _chunks(raw[begin:]):
        here = np.flatnonzero(chunk == byte)
        if len(here):
            return begin + int(here[0])
        begin += len(chunk)
    return begin


def _decoded(raw: Bytes, name: str) -> Iterator[str]:
    """Yield the text in pieces.

    Raises:
        StreamError: with the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for chunk in _chunks(raw):
        kept = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut in two
        try:
            text = decoder.decode(chunk.tobytes(), final=offset + len(chunk) == len(raw))
        except UnicodeDecodeError as error:
            raise StreamError(
                f"UTF-8 text was expected, but {name} has byte 0x{error.object[error.start]:02x} at offset "
                f"{offset - kept + error.start} ({error.reason}): it stands for no character",
                fix='unit="bytes", or convert the file: iconv -f latin1 -t utf-8',
            ) from error
        offset += len(chunk)
        yield text


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _line_and_column(raw: Bytes, name: str, at: int) -> tuple[int, int]:
    """Return where the character number `at` stands, both counted from 1."""
    line, column = 1, 1
    for text in _decoded(raw, name):
        before = text[:at]
        line += before.count("\n")
        newline = before.rfind("\n")
        column = column + len(before) if newline < 0 else len(before) - newline
        at -= len(before)
        if at == 0:
            break
    return line, column


def _unknown(vocabulary: Vocabulary, symbol: str, line: int, column: int, name: str) -> StreamError:
    return StreamError(
        f"only the {len(vocabulary)} characters of the vocabulary were expected, but {symbol!r} "
        f"(U+{ord(symbol):04X}) stands in line {line}, column {column} of {name}: it has no id",
        fix=f"Vocabulary(vocabulary.symbols + {symbol!r}), or replace the character in the text",
    )
