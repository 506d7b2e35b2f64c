"""The program `tbptt`: its sub-commands, and how it fails."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn, TextIO

import typer

import tbptt
from tbptt.cli.check import check
from tbptt.cli.compare import compare
from tbptt.cli.evaluate import evaluate
from tbptt.cli.horizon import horizon
from tbptt.cli.learn import learn
from tbptt.cli.report import report
from tbptt.cli.resume import resume
from tbptt.cli.sample import sample
from tbptt.cli.train import train
from tbptt.distributed import refuse_ranks
from tbptt.errors import AlarmWarning, CheckpointWarning, ConfigError, TbpttError

__all__ = ["main"]

app = typer.Typer(
    name="tbptt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # of errors, see main(); the help stays plain text, legible anywhere
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_TRAINING = frozenset({"train", "resume", "learn", "compare"})
"""The sub-commands that update weights, in one process."""

for command in (train, resume, evaluate, sample, learn, check, report, horizon, compare):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"tbptt {tbptt.__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Train stateful sequence models on sequences that never end, by truncated backpropagation through time."""
    del version, debug  # the first acts by itself, the second in main()
    if context.invoked_subcommand in _TRAINING:
        refuse_ranks(f"tbptt {context.invoked_subcommand}")  # before any data are read, or anything is written


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program, and exit: 0 well, 1 failed, 2 called wrongly, 128 + n stopped by signal n.

    Errors go to stderr, a message and a hint; a traceback only with --debug.

    Args:
        arguments: left out: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(given, prog_name="tbptt")
        except Exception as error:
            if _debug_is_on(given):
                traceback.print_exc()
            _report(error)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
    sys.exit(0)


def _debug_is_on(arguments: list[str]) -> bool:
    """Tell whether --debug stands where it counts, before the sub-command."""
    for argument in arguments:
        if not argument.startswith("-"):
            return False
        if argument == "--debug":
            return True
    return False


def _report(error: Exception) -> None:
    message, fix = f"{type(error).__name__}: {error}", "tbptt --debug ... shows where it happened"
    if isinstance(error, TbpttError):
        message, fix = error.message, error.fix
    elif isinstance(error, MemoryError):
        message, fix = (
            "the memory of this machine is not enough",
            "fewer --lanes, a smaller --hidden, or a shorter --k2",
        )
    elif isinstance(error, OSError):
        about = f" ({error.filename})" if error.filename else ""
        message, fix = f"the system refused: {error.strerror or error}{about}", ""
    print(f"error: {message}", file=sys.stderr)
    if fix:
        print(f"hint: {fix}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    ours = issubclass(category, CheckpointWarning | AlarmWarning)
    text = f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
