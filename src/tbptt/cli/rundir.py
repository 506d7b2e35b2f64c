"""What lies in a run directory, besides what the trainer writes there.

config.toml    the whole configuration of the run, to be read and to start others from
run.json       what the run was started with, and what is known of its data
checkpoints/   metrics.jsonl   timing.jsonl   stability.jsonl   tensorboard/
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

import tbptt
from tbptt.cli.config import Config
from tbptt.cli.settings import did_you_mean, dotted, read_toml, validate
from tbptt.errors import CheckpointError, ConfigError, StreamError

__all__ = ["Facts", "Record", "RunDirectory", "fingerprint"]

_CONFIG, _RECORD = "config.toml", "run.json"
_MAY_CHANGE = {
    f"run.{key}"
    for key in ("updates", "passes", "threads", "validate_every", "save_every", "keep", "log_every", "tensorboard")
} | {"schedule.updates"}


class Facts(BaseModel):
    """What a model must know of the data it learned from, so that these need not be read again.

    Args:
        inputs: numbers at each step, or symbols.
        outputs: numbers, or scores, given out at each step.
        symbols: whether inputs are ids.
        loss: the loss by name.
        metrics: names of `tbptt.metrics.metric`, by the name they are shown under.
        vocabulary: the characters of a text, in the order of their ids; None for bytes and other data.
        mean: of each input, by which it was standardised; None where it was not.
        std: likewise.
        sha256: of the file; None where there is none.
        num_bytes: of the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: int
    outputs: int
    symbols: bool
    loss: str
    metrics: dict[str, str]
    vocabulary: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    sha256: str | None = None
    num_bytes: int | None = None

    def check_unchanged(self, path: Path) -> None:
        """Refuse a data file that is not the one the run began with.

        Raises:
            StreamError: it has changed, or is gone.
        """
        if self.sha256 is None:
            return
        sha256, num_bytes = fingerprint(path)
        if sha256 != self.sha256:
            raise StreamError(
                f"{path} was expected to be as it was when the run began ({self.num_bytes} bytes, sha256 "
                f"{self.sha256[:12]}...), but has changed ({num_bytes} bytes, sha256 {sha256[:12]}...): the run's "
                "place in it, and what was held out of it, would be another",
                fix="restore the file; or begin another run with tbptt train; "
                "tbptt evaluate RUN DATA measures on any file",
            )


class Record(BaseModel):
    """What a run was started with.

    Args:
        version: of tbptt.
        config: its configuration then.
        schedule_updates: the length of its learning-rate schedule, which a longer run does not stretch.
        facts: what is known of its data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    config: dict[str, dict[str, Any]]
    schedule_updates: int
    facts: Facts


class RunDirectory:
    """The directory of one run, and what is read from and written to it.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @staticmethod
    def create(out: str | None, name: str) -> RunDirectory:
        """Make a new directory: `out`, or the first free runs/<name>-<n>.

        Raises:
            ConfigError: `out` holds a run, or anything else.
        """
        if out is None:
            number = 1
            while True:
                run = RunDirectory(Path("runs") / f"{name}-{number}")
                try:
                    run.path.mkdir(parents=True)
                except FileExistsError:
                    number += 1
                else:
                    return run
        run = RunDirectory(out)
        run.refuse_used()
        run.path.mkdir(parents=True, exist_ok=True)
        return run

    def refuse_used(self) -> None:
        """Refuse a directory that something is in already: nothing is ever overwritten.

        Raises:
            ConfigError: it holds a run, or anything else, or is no directory.
        """
        if self.is_run():
            raise ConfigError(
                f"a new directory was expected for the run, but {self.path} holds one already: it would be lost",
                fix=f"tbptt resume {self.path}",
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(
                f"a new or empty directory was expected for the run, but {self.path} is neither",
                fix=f"--out {self.path}-1",
            )

    def is_run(self) -> bool:
        """Tell whether a run was started here."""
        return (self.path / _CONFIG).is_file() or self.checkpoints.is_dir()

    def write(self, config: Config, record: Record) -> None:
        """Write config.toml and run.json, each wholly or not at all; config.toml, which makes it a run, last."""
        _write_atomically(self.path / _RECORD, record.model_dump_json(indent=1) + "\n")
        self.write_config(config)

    def write_config(self, config: Config) -> None:
        """Write config.toml, wholly or not at all."""
        head = f"# the configuration of this run, as tbptt {tbptt.__version__} resolved it\n\n"
        _write_atomically(self.path / _CONFIG, head + tomli_w.dumps(config.to_tables()))

    def read(self) -> tuple[Config, Record]:
        """Return the configuration, and what the run was started with.

        Raises:
            ConfigError: this is no run, or its config.toml was changed where that has no effect any more.
            CheckpointError: run.json is damaged.
        """
        self._refuse_other()
        try:
            record = Record.model_validate_json((self.path / _RECORD).read_bytes())
        except (OSError, ValidationError) as error:
            raise CheckpointError(
                f"{self.path / _RECORD} was expected to say what the run was started with, but cannot be read: {error}",
                fix="restore it from a copy, or start anew in another directory",
            ) from error
        path = self.path / _CONFIG
        tables = read_toml(path)
        config = validate(tables, dict.fromkeys(dotted(tables), f"in {path}"))
        self._refuse_changes(_keys(record.config), _keys(config.to_tables()))
        return config, record

    def _refuse_other(self) -> None:
        if (self.path / _CONFIG).is_file():
            return
        parent = self.path.parent
        runs = [str(each.parent) for each in sorted(parent.glob(f"*/{_CONFIG}"))] if parent.is_dir() else []
        came = "there is no such directory" if not self.path.exists() else f"it has no {_CONFIG}"
        raise ConfigError(
            f"the directory of a run was expected, but {self.path} is none: {came}",
            fix=did_you_mean(str(self.path), runs) or "tbptt train --out RUN starts a run",
        )

    def _refuse_changes(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in sorted({*before, *now} - _MAY_CHANGE):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{key} in {self.path / _CONFIG} was expected to be {before.get(key)!r}, as when the run began, "
                    f"but is {now.get(key)!r}: going on with another value would not be going on",
                    fix=f"change it back, or tbptt train --config {self.path / _CONFIG} for another run",
                )


def fingerprint(path: Path) -> tuple[str, int]:
    """Return the sha256 of a file and its size in bytes.

    Raises:
        StreamError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    except OSError as error:
        raise StreamError(
            f"a readable file was expected, but {path} is none ({error.strerror}): there is nothing to learn from",
            fix=f"check the path; it is looked for at {path.absolute()}",
        ) from error


def _keys(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dotted(tables).items() if not isinstance(value, dict)}


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
