"""The course of `tbptt learn`: line after line, in step with what is printed and what is saved."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tbptt.checkpoint import Checkpoints, Loaded
from tbptt.cli.config import Config
from tbptt.cli.launch import tell
from tbptt.cli.rowlearner import RowLearner, target_of
from tbptt.cli.rows import BadRow, Lines, Table
from tbptt.errors import CheckpointError, ConfigError, StreamError

__all__ = ["SECTIONS", "RowCourse", "Settings"]

SECTIONS = ("model", "estimator", "optimizer", "guards")
"""Of a configuration, those that have a meaning for a live stream."""


@dataclass(frozen=True)
class Settings:
    """What was asked for, but where from and where to."""

    config: Config
    target: str
    classes: tuple[str, ...] | None
    max_classes: int
    ignored: tuple[str, ...]
    on_bad_row: Literal["stop", "skip"]
    save_every: int
    report_every: int
    drift: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what must be the same for going on to be going on."""
        tables = self.config.to_tables()
        kept = {name: tables.get(name) for name in SECTIONS} | {"seed": self.config.run.seed}
        names = ("target", "classes", "max_classes", "ignored", "drift")
        return kept | {name: getattr(self, name) for name in names}


class RowCourse:
    """The course of a stream: line after line, in step with what is printed and what is saved.

    Args:
        settings: what was asked for.
        lines: where the rows come from.
        checkpoints: where they go to; None for nowhere.
        loaded: the checkpoint to go on from; None to begin.
        predictions: the file that predictions go to; None for stdout.
        skip: lines to pass over instead of those that were read before, in an input without a header.
    """

    def __init__(
        self,
        settings: Settings,
        lines: Lines,
        checkpoints: Checkpoints | None,
        loaded: Loaded | None,
        predictions: Path | None,
        skip: int | None,
    ) -> None:
        self.settings, self.lines, self.checkpoints = settings, lines, checkpoints
        self.learner: RowLearner | None = None
        self.skipped = 0
        self._saved = -1
        self._to_file = predictions is not None
        self._done = {"number": 0, "num_bytes": 0, "checksum": 0}  # of the lines learned from or skipped
        if loaded is None:
            header = lines.peek()
            if header is None and not lines.stopped():
                raise StreamError("a first line that names the columns was expected, but the input is empty")
            self.table = None if header is None else Table.of_line(header, settings.target, settings.ignored)
            self.sink = _new_sink(predictions)
            if header is not None:
                lines.take(header)
                self._done = self._place()
            return
        self._restore(loaded, skip)
        self.sink = _sink_again(predictions, loaded.state["written"])

    def run(self, limit: int | None) -> None:
        """Go through the lines until there are no more, or so many rows in all, or a signal came.

        Raises:
            BadRow: a malformed row that is not to be skipped; what came before it is saved.
            TbpttError: whatever ended the learning; it goes on from the last checkpoint.
        """
        try:
            try:
                self._go(limit)
            except (BadRow, BrokenPipeError):  # the learner is as it was after the row before
                self._save()
                raise
            self._save()
        finally:
            if self._to_file:
                self.sink.close()
        if self.learner is not None and self.learner.has_news:
            tell(self.learner.report())
        skipped = f", {self.skipped} malformed lines skipped" if self.skipped else ""
        saved = "" if self.checkpoints is None else f"; saved in {self.checkpoints.directory}"
        tell(f"{self._rows} rows predicted{skipped}{saved}")

    @property
    def _rows(self) -> int:
        return 0 if self.learner is None else self.learner.rows

    def _go(self, limit: int | None) -> None:
        table = self.table
        while table is not None and (limit is None or self._rows + self.skipped < limit):
            line = self.lines.peek()
            if line is None:
                return
            number = self.lines.number + 1
            try:
                self._row(table, line, number)
            except BadRow as error:
                if self.settings.on_bad_row == "stop":
                    raise
                tell(f"warning: {error.message}; skipped")
                self._write("")
                self.skipped += 1
            self.lines.take(line)
            self._done = self._place()
            if (self._rows + self.skipped) % self.settings.save_every == 0:
                self._save()

    def _row(self, table: Table, line: bytes, number: int) -> None:
        row = table.row(line, number)
        learner = self.learner or self._begin(table, row.label)
        if row.label:
            learner.target.check(row.label, number)
        predicted = learner.predict(row)
        self._write(predicted)
        learner.learn(row, predicted)
        if learner.rows % self.settings.report_every == 0:
            tell(learner.report())

    def _begin(self, table: Table, label: str) -> RowLearner:
        settings = self.settings
        target, why = target_of(table, label, settings.classes, settings.max_classes)
        names = [table.header[index] for index in table.features]
        tell(f"{why}; inputs: {', '.join(names)}")
        self.learner = RowLearner(settings.config, table, target, _detector(settings.drift))
        self._label = label
        self._save()  # so that there is something to resume from, and what cannot be saved is found at once
        return self.learner

    def _place(self) -> dict[str, int]:
        return {name: getattr(self.lines, name) for name in self._done}

    def _write(self, text: str) -> None:
        self.sink.write(f"{text}\n".encode())
        self.sink.flush()

    def _save(self) -> None:
        if self.checkpoints is None or self.learner is None or self._saved == self._done["number"]:
            return
        written = None
        if self._to_file:
            os.fsync(self.sink.fileno())
            written = self.sink.tell()
        state = {
            "settings": self.settings.state_dict(),
            "header": self.table.header if self.table is not None else (),
            "label": self._label,
            "done": self._done,
            "skipped": self.skipped,
            "written": written,
            "learner": self.learner.state_dict(),
        }
        self.checkpoints.save(self._done["number"], state, self.learner.online.model.state_dict())
        self._saved = self._done["number"]

    def _restore(self, loaded: Loaded, skip: int | None) -> None:
        state, here = loaded.state, self.settings.state_dict()
        for name, there in state["settings"].items():
            if here[name] != there:
                raise ConfigError(
                    f"{name} was expected to be {there}, as when it began, but is {here[name]}: going on with another "
                    "would not be going on",
                    fix="the same command, with --resume behind it",
                )
        self._label, self._done, self.skipped = state["label"], state["done"], state["skipped"]
        self.table = Table(tuple(state["header"]), self.settings.target, self.settings.ignored)
        target, _ = target_of(self.table, self._label, self.settings.classes, self.settings.max_classes)
        self.learner = RowLearner(self.settings.config, self.table, target, _detector(self.settings.drift))
        self.learner.load_state_dict(state["learner"], loaded.model_state)
        self._saved = self._done["number"]
        self._pass_over(skip)
        tell(f"goes on after {self.learner.rows} rows, at line {self.lines.number + 1}")

    def _pass_over(self, skip: int | None) -> None:
        """Read what was read before, and see that it is the same; or the lines that the user says."""
        count = self._done["number"] if skip is None else skip
        for _ in range(count):
            if self.lines.next() is None and not self.lines.stopped():
                raise StreamError(
                    f"{count} lines to pass over were expected, which were learned from before, but the input "
                    f"has {self.lines.number}",
                    fix="give the input again from its beginning; or --skip 0 for one that goes on where it ended",
                )
        if skip is not None:  # from here on places are counted as if the lines in between had been there
            self.lines.number, self.lines.num_bytes = self._done["number"], self._done["num_bytes"]
            self.lines.checksum = self._done["checksum"]
        elif not self.lines.stopped() and self._place() != self._done:
            raise StreamError(
                f"the {count} lines that were learned from were expected again at the beginning of the input, but "
                "others stand there: predictions would follow from rows that never came",
                fix="give the same input; or --skip 0 for one that goes on where it ended",
            )


def _detector(name: str | None) -> Any:
    """Return a drift detector of river by its name; None for none."""
    if name is None:
        return None
    try:
        from tbptt.integrations.river import detector
    except ImportError as error:
        raise ConfigError(
            f"river was expected for --drift {name}, but cannot be imported: {error}", fix="pip install 'tbptt[river]'"
        ) from error
    return detector(name)


def _new_sink(path: Path | None) -> BinaryIO:
    if path is None:
        return sys.stdout.buffer
    if path.exists() and (not path.is_file() or path.stat().st_size):
        raise ConfigError(
            f"a new file was expected for --predictions, but {path} holds something already: it would be lost",
            fix="another name; or --resume with the --out that it belongs to",
        )
    return path.open("wb")


def _sink_again(path: Path | None, written: int | None) -> BinaryIO:
    """Return where predictions go on: a file is cut to what it held at the checkpoint."""
    if (path is None) != (written is None):
        expected = "--predictions FILE was" if written is not None else "no --predictions was"
        raise ConfigError(
            f"{expected} expected, as when it began: the predictions of one stream belong together",
            fix="the same command, with --resume behind it",
        )
    if path is None or written is None:
        return sys.stdout.buffer
    size = path.stat().st_size if path.is_file() else 0
    if size < written:
        raise CheckpointError(
            f"{path} was expected to hold the {written} bytes of predictions that were there at the checkpoint, but "
            f"has {size}: it is another file, or was cut",
            fix="restore it; or begin anew with another --out",
        )
    file = path.open("r+b")
    file.truncate(written)
    file.seek(written)
    return file
