"""What a measurement is about: a run's trained model on its data, or fresh weights on any data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tbptt.cli.build import Parts, build, use_threads
from tbptt.cli.config import Config
from tbptt.cli.evaluate import load_model
from tbptt.cli.rundir import RunDirectory
from tbptt.cli.settings import Given, resolve
from tbptt.errors import ConfigError

__all__ = ["Subject", "check_page", "open_subject"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its data, and all that trains it.

    Args:
        config: the run's configuration.
        parts: what it is made of; the model in training mode.
        update: at which the weights were saved; None for fresh ones.
    """

    config: Config
    parts: Parts
    update: int | None

    @property
    def is_trained(self) -> bool:
        """Whether the weights are those of a run."""
        return self.update is not None


def open_subject(source: str, seed: int | None, assignments: list[str] | None) -> Subject:
    """Return the run in a directory, or a fresh model on what `tbptt train` takes.

    Args:
        seed: in place of the run's own.
        assignments: `section.key=value`, for data only.

    Raises:
        TbpttError: settings that cannot be meant, data that cannot be read, a run without a checkpoint.
    """
    if RunDirectory(source).is_run():
        return _of_run(source, seed, assignments)
    given = Given()
    given.add_assignments(assignments or [])
    given.add_source(source)
    if seed is not None:
        given.add("run.seed", str(seed), "--seed")
    config = use_threads(resolve(given))
    return Subject(config, build(config), None)


def _of_run(path: str, seed: int | None, assignments: list[str] | None) -> Subject:
    if assignments:
        raise ConfigError(
            f"--set is for DATA, but {path} is a run: its model and data are what they were trained as",
            fix=f"leave --set out, or give DATA instead of the run, with --set {assignments[0]}",
        )
    run = RunDirectory(path)
    config, record = run.read()
    config = use_threads(config)
    parts = build(config, record)
    model, loaded = load_model(run, config, record.facts)
    config = config if seed is None else config.changed("run", seed=seed)
    return Subject(config, replace(parts, model=model.train()), loaded.update)


def check_page(out: Path, name: str) -> None:
    """Refuse a directory where a page was to be written.

    Raises:
        ConfigError: it is one.
    """
    if out.is_dir():
        raise ConfigError(f"a file was expected for the page, but {out} is a directory", fix=f"--out {out / name}")
