"""`tbptt resume`: go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tbptt.cli.build import build, use_threads
from tbptt.cli.launch import launch, longer, newest_update, tell
from tbptt.cli.rundir import RunDirectory
from tbptt.errors import ConfigError

__all__ = ["resume"]


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's directory.")],
    updates: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Go on to so many updates in all.", show_default=False)
    ] = None,
    passes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Go on to so many passes in all.", show_default=False)
    ] = None,
    schedule_updates: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Let the learning rate's schedule end there.", show_default=False),
    ] = None,
) -> None:
    """Go on with a run where it stopped, as if it never had.

    A new end is recorded in the run's config.toml. A learning-rate schedule keeps the length it began with, unless
    --schedule-updates gives it another; where the rate would be 0 after it, a later end is refused.
    """
    directory = RunDirectory(run)
    config, record = directory.read()
    until: dict[str, Any] = {"updates": updates, "passes": passes}
    longest = config.changed("run", **until) if any(until.values()) else config
    if schedule_updates is not None:
        if config.schedule.name != "cosine":
            raise ConfigError(
                f"a schedule that ends was expected for --schedule-updates {schedule_updates}, but that of {run} is "
                f"{config.schedule.name}: there would be no effect",
                fix="leave --schedule-updates out",
            )
        longest = longest.changed("schedule", updates=schedule_updates)
    parts = build(use_threads(longest), record)
    if longest != config:
        directory.write_config(longest)
    made = newest_update(directory)
    if made is None:
        tell(f"{run} has no checkpoint yet: it starts from the beginning, with the same seed")
    else:
        tell(f"{run}: goes on after update {made} of {parts.updates}")
    if made is not None and made >= parts.updates:
        tell(f"nothing is left to do\nhint: {longer(directory, longest, parts, made)}")
    elif config.schedule.name == "cosine" and parts.updates > parts.schedule_updates:
        tell(
            f"note: the learning-rate schedule ends at update {parts.schedule_updates}; after that the rate stays "
            f"{config.optimizer.lr * config.schedule.final:g}"
        )
    launch(directory, longest, parts)
