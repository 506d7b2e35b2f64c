"""Text streams: every symbol predicts the next, and what is wrong with a file is said with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tbptt.errors import ConfigError, EndOfStream, StreamError
from tbptt.streams import TextStream, Vocabulary
from tbptt.streams import text as module

ASCII = "The quick brown fox\njumps over the lazy dog.\n" * 40
WIDE = "Grüße, Ωmega — 你好 🙂\nnaïve café\n" * 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunk boundaries fall in the middle of everything, of characters too."""
    monkeypatch.setattr(module, "_CHUNK", 7)


def file_of(folder: Path, content: str | bytes) -> Path:
    path = folder / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("text", [ASCII, WIDE])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.0, 0.9), (0.9, 1.0), (0.25, 0.5)])
def test_one_lane_reads_the_text_and_predicts_the_next(tmp_path: Path, text: str, begin: float, end: float) -> None:
    stream = TextStream(file_of(tmp_path, text), lanes=1, begin=begin, end=end)
    part = text[round(begin * len(text)) : round(end * len(text))]
    assert stream.vocabulary is not None
    assert stream.vocabulary.symbols == "".join(sorted(set(text)))  # of the whole, whatever is read
    windows = list(stream.windows(13))
    assert stream.vocabulary.decode(torch.cat([window.inputs for window in windows])) == part[:-1]
    assert stream.vocabulary.decode(torch.cat([window.targets for window in windows])) == part[1:]
    assert windows[0].inputs.dtype == windows[0].targets.dtype == torch.int64
    assert stream.steps == len(part) - 1


@pytest.mark.parametrize("text", [ASCII, WIDE])
def test_lanes_cover_every_pair_once(tmp_path: Path, text: str) -> None:
    stream = TextStream(file_of(tmp_path, text), lanes=7)
    window = stream.read(10**6)
    assert stream.vocabulary is not None
    lanes = [window.inputs[window.mask[:, lane], lane] for lane in range(7)]
    assert stream.vocabulary.decode(torch.cat(lanes)) == text[:-1]
    last = [window.targets[window.mask[:, lane], lane] for lane in range(7)]
    assert stream.vocabulary.decode(torch.cat(last)) == text[1:]
    with pytest.raises(EndOfStream):
        stream.read(1)


def test_bytes_are_their_own_ids(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 3
    stream = TextStream(file_of(tmp_path, raw), lanes=1, unit="bytes")
    window = stream.read(10**6)
    assert bytes(window.inputs[:, 0].tolist()) == raw[:-1]
    assert bytes(window.targets[:, 0].tolist()) == raw[1:]
    assert (stream.vocabulary, stream.num_symbols) == (None, 256)


def test_text_in_memory_equals_the_file(tmp_path: Path) -> None:
    file, memory = TextStream(file_of(tmp_path, WIDE), lanes=2), TextStream(WIDE.encode(), lanes=2)
    assert file.read(50).inputs.equal(memory.read(50).inputs)


def test_a_state_resumes_in_mid_pass(tmp_path: Path) -> None:
    path = file_of(tmp_path, ASCII)
    first, second = TextStream(path, lanes=3), TextStream(path, lanes=3)
    first.read(11)
    second.load_state_dict(first.state_dict())
    assert second.read(5).inputs.equal(first.read(5).inputs)
    with pytest.raises(StreamError, match="another row"):
        TextStream(path, lanes=2).load_state_dict(first.state_dict())


def test_a_given_vocabulary_numbers_the_symbols(tmp_path: Path) -> None:
    vocabulary = Vocabulary("".join(sorted(set(ASCII), reverse=True)) + "é")
    window = TextStream(file_of(tmp_path, ASCII), lanes=1, vocabulary=vocabulary).read(100)
    assert window.inputs[:, 0].tolist() == [vocabulary.symbols.index(symbol) for symbol in ASCII[:100]]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("abc\nab#c\n", "line 2, column 3"),
        ("#", "line 1, column 1"),
        ("ab\n\nabcabcabc#", "line 3, column 10"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "ä"])
def test_a_character_outside_the_vocabulary_is_named_with_its_place(
    tmp_path: Path, text: str, place: str, prefix: str
) -> None:
    if prefix:  # the same, on the way that decodes
        text = prefix + "\n" + text
        place = place.replace(f"line {place[5]}", f"line {int(place[5]) + 1}")
    vocabulary = Vocabulary("abc\nä")
    with pytest.raises(StreamError) as caught:
        TextStream(file_of(tmp_path, text), lanes=1, vocabulary=vocabulary)
    assert "'#' (U+0023)" in str(caught.value)
    assert place in str(caught.value)
    assert "hint: Vocabulary(vocabulary.symbols + '#')" in str(caught.value)
    with pytest.raises(StreamError, match=place):
        vocabulary.encode(text)


def test_only_the_part_that_is_read_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    for text in ("ab" * 45 + "#" * 10, "äb" * 45 + "#" * 10):
        path, vocabulary = file_of(tmp_path, text), Vocabulary("abä")
        assert TextStream(path, lanes=1, vocabulary=vocabulary, end=0.9).steps == 89
        with pytest.raises(StreamError, match="'#'"):
            TextStream(path, lanes=1, vocabulary=vocabulary, begin=0.85)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"No such file or directory.*nowhere\.txt"):
        TextStream(tmp_path / "nowhere.txt", lanes=1)
    with pytest.raises(StreamError, match="Is a directory"):
        TextStream(tmp_path, lanes=1)
    with pytest.raises(StreamError, match="but is empty"):
        TextStream(file_of(tmp_path, ""), lanes=1)
    with pytest.raises(StreamError, match="at least two symbols"):
        TextStream(file_of(tmp_path, "a"), lanes=1)
    with pytest.raises(StreamError, match="each of the 9 lanes"):
        TextStream(file_of(tmp_path, "abc"), lanes=9)


@pytest.mark.parametrize("offset", [0, 6, 7, 23])
def test_invalid_utf8_is_placed_by_its_byte(tmp_path: Path, offset: int) -> None:
    raw = ("ä" * 40).encode()[: 2 * (offset // 2)] + b"x" * (offset % 2) + b"\xff" + b"abc"
    with pytest.raises(StreamError, match=f"0xff at offset {offset} "):
        TextStream(file_of(tmp_path, raw), lanes=1)
    cut = "ä".encode()[:1]
    with pytest.raises(StreamError, match=f"0xc3 at offset {offset} .*unexpected end"):
        TextStream(file_of(tmp_path, b"x" * offset + cut), lanes=1)


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, ASCII)
    for begin, end in ((0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="0 <= begin < end <= 1"):
            TextStream(path, lanes=1, begin=begin, end=end)
    with pytest.raises(ConfigError, match="unit='words'"):
        TextStream(path, lanes=1, unit="words")
    with pytest.raises(ConfigError, match="with a vocabulary"):
        TextStream(path, lanes=1, unit="bytes", vocabulary=Vocabulary("a"))


def test_a_vocabulary_goes_there_and_back() -> None:
    vocabulary = Vocabulary.of(WIDE)
    assert vocabulary.decode(vocabulary.encode(WIDE)) == WIDE
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    assert vocabulary.encode("").tolist() == []
    assert vocabulary.encode(WIDE).dtype == np.int64
    with pytest.raises(StreamError, match="stands for no character"):
        vocabulary.decode([len(vocabulary)])
    with pytest.raises(ConfigError, match="'a' is in it twice"):
        Vocabulary("aba")
    with pytest.raises(ConfigError, match="none came"):
        Vocabulary("")
    with pytest.raises(ConfigError, match="key 'symbols'"):
        Vocabulary.from_dict({"letters": "abc"})


def test_an_ascii_file_stays_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 1 << 20)
    stream = TextStream(file_of(tmp_path, b"abcdefgh" * 200_000), lanes=2)
    ids = stream._rows._inputs.all[0].array
    assert isinstance(ids, np.memmap)  # not an array of ids, eight times as large
