"""`tbptt sample`: let a model of text write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from tbptt.cli.build import use_threads
from tbptt.cli.data import vocabulary_of
from tbptt.cli.evaluate import load_model
from tbptt.cli.presets import kind_of
from tbptt.cli.rundir import RunDirectory
from tbptt.errors import ConfigError, StreamError
from tbptt.models import SequenceModel
from tbptt.streams import Vocabulary

__all__ = ["sample"]


def sample(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run that learned text.")],
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Symbols to write.")] = 400,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to go on from.")] = "",
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="Below 1 surer, above 1 wilder; 0: always the likeliest.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the choices.")] = 0,
) -> None:
    """Write text, symbol by symbol, the state carried all the way.

    The prompt and what follows go to stdout as they come.
    """
    directory = RunDirectory(run)
    config, record = directory.read()
    if kind_of(config.data.source) != "text":
        raise ConfigError(
            f"a run that learned text was expected, but {run} learned {config.data.source}: its outputs are no symbols",
            fix="tbptt train shakespeare",
        )
    use_threads(config)
    model, _ = load_model(directory, config, record.facts)
    vocabulary = vocabulary_of(record.facts)
    start = _encoded(prompt, vocabulary)
    typer.echo(prompt, nl=False)
    for symbol in _symbols(model, start, temperature, torch.Generator().manual_seed(seed), length):
        typer.echo(bytes([symbol]) if vocabulary is None else vocabulary.symbols[symbol], nl=False)
    if sys.stdout.isatty():
        typer.echo()


def _encoded(prompt: str, vocabulary: Vocabulary | None) -> list[int]:
    if not prompt:  # a line break, if there is one, is where a text may begin
        return [10] if vocabulary is None else [max(0, vocabulary.symbols.find("\n"))]
    if vocabulary is None:
        return list(prompt.encode())
    unknown = sorted(set(prompt) - set(vocabulary.symbols))
    if unknown:
        raise StreamError(
            f"only the {len(vocabulary)} characters that the run learned were expected in the prompt, but "
            f"{', '.join(map(repr, unknown))} came",
            fix=f"use some of {vocabulary.symbols!r}",
        )
    return vocabulary.encode(prompt).tolist()


@torch.no_grad()
def _symbols(
    model: SequenceModel, start: list[int], temperature: float, generator: torch.Generator, length: int
) -> Iterator[int]:
    outputs, state = model(torch.tensor(start)[:, None])
    for written in range(1, length + 1):
        symbol = _choose(outputs[-1, 0], temperature, generator)
        yield symbol
        if written < length:
            outputs, state = model(torch.tensor([[symbol]]), state)


def _choose(scores: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    scaled = scores.double() / temperature
    return int(torch.multinomial(torch.softmax(scaled, 0), 1, generator=generator))
