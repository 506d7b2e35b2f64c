"""`tbptt sample`: let a model of text write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from tbptt.cli.build import use_threads
from tbptt.cli.data import vocabulary_of
from tbptt.cli.evaluate import load_model
from tbptt.cli.presets import kind_of
from tbptt.cli.rundir import RunDirectory
from tbptt.errors import ConfigError, StreamError
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
    start, generator = _encoded(prompt, vocabulary), torch.Generator().manual_seed(seed)
    typer.echo(prompt, nl=False)
    for symbol in _symbols(model, start, temperature, generator, length, config.model.segment or 1):
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
    model: nn.Module, start: list[int], temperature: float, generator: torch.Generator, length: int, segment: int
) -> Iterator[int]:
    """Yield what the model writes; `segment` is the steps that a state to go on from is a multiple of."""
    begun, state = start, None
    for _ in range(length):
        scores, begun, state = _read(model, begun, state, segment)
        symbol = _choose(scores, temperature, generator)
        yield symbol
        begun.append(symbol)


def _read(model: nn.Module, symbols: list[int], state: Any, segment: int) -> tuple[Tensor, list[int], Any]:
    """Return the scores after symbols, those of a segment that is not complete, and the state where it began.

    That segment is read anew with each symbol: a model of segments gives out no state to go on from in the middle.
    """
    cut = len(symbols) - len(symbols) % segment
    begun = symbols[cut:]
    if cut:
        outputs, state = model(torch.tensor(symbols[:cut])[:, None], state)
        if not begun:
            return outputs[-1, 0], begun, state
    outputs, _ = model(torch.tensor(begun)[:, None], state)
    return outputs[-1, 0], begun, state


def _choose(scores: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    scaled = scores.double() / temperature
    return int(torch.multinomial(torch.softmax(scaled, 0), 1, generator=generator))
