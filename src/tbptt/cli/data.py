"""From the name of a source to streams, and to what a model must know of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tbptt.cli import arrays
from tbptt.cli.config import Config, Data
from tbptt.cli.presets import NAMES, TASKS, Kind, kind_of
from tbptt.cli.rundir import Facts, fingerprint
from tbptt.cli.settings import did_you_mean
from tbptt.errors import ConfigError, StreamError, TbpttError
from tbptt.streams import ArrayStream, Stream, TextStream, Vocabulary, ecg
from tbptt.streams.tasks import SyntheticStream

__all__ = ["Opened", "open_other", "open_source", "vocabulary_of"]

_Sized = ArrayStream | TextStream | SyntheticStream


@dataclass(frozen=True, eq=False)
class Opened:
    """The data of a run.

    Args:
        train: what is learned from.
        steps: the length of one pass over it.
        held_out: what is validated on; None for nothing.
        facts: what a model must know of them.
    """

    train: Stream
    steps: int
    held_out: Stream | None
    facts: Facts


def open_source(config: Config, facts: Facts | None = None) -> Opened:
    """Return the data of a run.

    Args:
        facts: what is known of them, if the run has begun before; they must be the same.

    Raises:
        StreamError: no such file, an empty one, one too short for the lanes, or one that has changed.
        TbpttError: whatever else is wrong with the data.
    """
    functions: dict[Kind, Callable[[Data, int], Opened]] = {
        "ecg": _open_ecg,
        "text": _open_text,
        "array": _open_array,
        "task": _open_task,
    }
    if facts is not None and facts.sha256 is not None:
        facts.check_unchanged(path_of(config.data.source))
    return functions[kind_of(config.data.source)](config.data, config.run.seed)


def open_other(config: Config, facts: Facts, source: str, lanes: int) -> Stream:
    """Return all of another source, seen as the run saw its own: its vocabulary, its standardisation.

    Raises:
        ConfigError: another kind of data than the run's.
        TbpttError: whatever else is wrong with it.
    """
    kind, mine = kind_of(source), kind_of(config.data.source)
    if kind != mine or (kind == "task" and source != config.data.source):
        raise ConfigError(
            f"data like {config.data.source} were expected, which the run learned from, but {source} came",
            fix="text for a run of text, .npy or .npz for one of arrays",
        )
    if kind == "ecg":
        return ecg(lanes=lanes, split="all")
    if kind == "task":
        return TASKS[source](lanes=lanes, seed=config.run.seed, **(config.data.task or {}))
    if kind == "text":
        path, unit = path_of(source), config.data.unit or "characters"
        return TextStream(path, lanes=lanes, unit=unit, vocabulary=vocabulary_of(facts))
    return arrays.stream_of(arrays.load(path_of(source)), facts, lanes)


def vocabulary_of(facts: Facts) -> Vocabulary | None:
    """Return the characters that a run knows; None for bytes."""
    return None if facts.vocabulary is None else Vocabulary(facts.vocabulary)


def path_of(source: str) -> Path:
    """Return where a file is.

    Raises:
        StreamError: nowhere.
    """
    if source == "shakespeare":
        return Path(str(files("tbptt.data") / "shakespeare.txt"))
    path = Path(source).expanduser()
    if not path.is_file():
        near = did_you_mean(path.name, NAMES)
        raise StreamError(
            f"a file was expected, or one of {', '.join(NAMES)}, but {path} is "
            + ("a directory" if path.is_dir() else "not there"),
            fix=near or f"check the path; it is looked for at {path.absolute()}",
        )
    return path


def _opened(facts: Facts, train: _Sized, held_out: Callable[[], Stream] | None) -> Opened:
    if held_out is None:
        return Opened(train, train.steps, None, facts)
    try:
        return Opened(train, train.steps, held_out(), facts)
    except TbpttError as error:
        raise type(error)(f"in the held-out part: {error.message}", fix=error.fix) from error


def _open_ecg(data: Data, seed: int) -> Opened:
    del seed  # nothing is drawn
    facts = Facts(inputs=2, outputs=1, symbols=False, loss="bce", metrics={"auc": "auc"})
    return _opened(facts, ecg(lanes=data.lanes), lambda: ecg(lanes=data.lanes_held_out, split="test"))


def _open_text(data: Data, seed: int) -> Opened:
    del seed  # nothing is drawn
    path, unit, cut = path_of(data.source), data.unit or "characters", 1.0 - data.held_out
    train = TextStream(path, lanes=data.lanes, unit=unit, end=cut)
    sha256, num_bytes = fingerprint(path)
    symbol = "character" if unit == "characters" else "byte"
    facts = Facts(
        inputs=train.num_symbols,
        outputs=train.num_symbols,
        symbols=True,
        loss="cross_entropy",
        metrics={f"bits_per_{symbol}": "bits"},
        vocabulary=None if train.vocabulary is None else train.vocabulary.symbols,
        sha256=sha256,
        num_bytes=num_bytes,
    )
    if not data.held_out:
        return _opened(facts, train, None)
    held_out = lambda: TextStream(path, lanes=data.lanes_held_out, unit=unit, vocabulary=train.vocabulary, begin=cut)  # noqa: E731
    return _opened(facts, train, held_out)


def _open_array(data: Data, seed: int) -> Opened:
    del seed  # nothing is drawn
    path = path_of(data.source)
    whole = arrays.load(path)
    train, rest = arrays.split(whole, data.held_out)
    facts = arrays.facts_of(train, path, bool(data.standardize), whole)
    held_out = None if rest is None else lambda: arrays.stream_of(rest, facts, data.lanes_held_out)
    return _opened(facts, arrays.stream_of(train, facts, data.lanes), held_out)


def _open_task(data: Data, seed: int) -> Opened:
    kind, arguments = TASKS[data.source], data.task or {}
    train = kind(lanes=data.lanes, seed=seed, **arguments)
    if data.source == "adding":
        facts = Facts(inputs=2, outputs=1, symbols=False, loss="mse", metrics={})
    else:
        symbols = int(getattr(train, "num_symbols"))  # noqa: B009 - of both tasks that have symbols
        facts = Facts(
            inputs=symbols, outputs=symbols, symbols=True, loss="cross_entropy", metrics={"accuracy": "accuracy"}
        )
    held_out = (lambda: kind(lanes=data.lanes_held_out, seed=seed + 1, **arguments)) if data.held_out else None
    return _opened(facts, train, held_out)
