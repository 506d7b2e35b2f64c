"""`tbptt check`: does a model carry its state?"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn

from tbptt.checks import check as run_check
from tbptt.cli.settings import did_you_mean
from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators import TBPTT
from tbptt.tree import Tree
from tbptt.window import Window

__all__ = ["check"]

_TOKENS = re.compile(r"tokens:(\d+)x(\d+)(?::(\d+))?")
_FLOATS = re.compile(r"floats:(\d+)x(\d+)x(\d+)")
_SYNTAX = "tokens:LANESxSTEPS[:VOCABULARY] or floats:LANESxSTEPSxFEATURES"


def check(
    model: Annotated[str, typer.Option(metavar="MODULE:BUILD", help="A function that returns the model.")],
    example: Annotated[
        str, typer.Option("--input", metavar="SPEC", help=f"{_SYNTAX}. Not needed if BUILD returns (model, inputs).")
    ] = "",
    chunks: Annotated[
        str, typer.Option(metavar="N,N,...", help="Lengths to cut the inputs into; left out: three of a third each.")
    ] = "",
    k1: Annotated[int | None, typer.Option(min=1, metavar="N", help="Measure TBPTT's reach with this k1.")] = None,
    k2: Annotated[int | None, typer.Option(min=1, metavar="N", help="And this k2; either stands for both.")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(metavar="ITEM", help="An item whose failure is accepted; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Find out by experiment whether a model carries its state, and how far gradients reach.

    Exits with 0 for a model that passes, 1 for one that fails. Inputs are random, time first; VOCABULARY is by
    default that of the model's embedding. The current directory is searched for MODULE.
    """
    sizes = _sizes(chunks)
    steps = k1 or k2
    estimator = None if steps is None else TBPTT(k1=k1 or steps, k2=k2 or steps)
    spec = _parsed(example)
    built, inputs = _built(model)
    if spec is not None:
        inputs = _inputs(spec, built)
    elif inputs is None:
        raise ConfigError(
            f"inputs to try the model with were expected, but {model} returns the model alone",
            fix="--input floats:2x24x8, or return (model, inputs)",
        )
    report = run_check(built, inputs, estimator, chunks=sizes, accept=accept or ())
    if as_json:
        print(report.to_json())
    else:
        page = Text(str(report))
        for word, style in (("OK", "green"), ("NOTE", "yellow"), ("FAIL", "bold red")):
            page.highlight_regex(rf"(?m)^  {word}\b", style)
        Console(soft_wrap=True).print(page)  # plain text where there is no terminal, or NO_COLOR is set
    raise typer.Exit(0 if report else 1)


def _parsed(spec: str) -> re.Match[str] | None:
    if not spec:
        return None
    match = _TOKENS.fullmatch(spec) or _FLOATS.fullmatch(spec)
    if match is None or "0" in [str(int(number)) for number in match.groups() if number]:
        raise ConfigError(
            f"--input was expected to be {_SYNTAX}, in whole numbers from 1, but {spec!r} came",
            fix="--input tokens:2x24, or --input floats:2x24x8",
        )
    return match


def _sizes(chunks: str) -> list[int] | None:
    if not chunks:
        return None
    if re.fullmatch(r"\d+(,\d+)*", chunks) is None:
        raise ConfigError(
            f"--chunks was expected to be lengths in steps, with commas between, but {chunks!r} came",
            fix="--chunks 32,32,32",
        )
    return [int(size) for size in chunks.split(",")]


def _built(reference: str) -> tuple[nn.Module, Tree | None]:
    found = _found(reference)
    made = found() if callable(found) and not isinstance(found, nn.Module) else found
    inputs: Tree | None = None
    if isinstance(made, tuple) and len(cast("tuple[Any, ...]", made)) == 2:
        made, inputs = cast("tuple[Any, Tree]", made)
    if not isinstance(made, nn.Module):
        raise CapabilityError(
            f"{reference} was expected to return an nn.Module, or (module, inputs), but returned a "
            f"{type(made).__name__}",
            fix="def build(): return MyModel()",
        )
    return made, inputs if inputs is None or isinstance(inputs, Window) else Window(inputs)


def _found(reference: str) -> Any:
    name, colon, attribute = reference.partition(":")
    if not colon or not name or not attribute:
        raise ConfigError(
            f"--model was expected to be package.module:build, but {reference!r} came",
            fix=f"--model {name or 'package.module'}:build",
        )
    sys.path.insert(0, os.getcwd())
    try:
        module: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # it is there, and what it imports is not
        raise ConfigError(
            f"a module {name} was expected, but there is none: looked for in {os.getcwd()} and on Python's path",
            fix=f"check that {name.replace('.', '/')}.py is there, or PYTHONPATH",
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    for part in attribute.split("."):
        if part not in dir(module):
            raise ConfigError(
                f"{attribute} was expected in {name}, but there is none",
                fix=did_you_mean(part, [each for each in dir(module) if not each.startswith("_")])
                or f"def {part}(): return MyModel()",
            )
        module = getattr(module, part)
    return module


def _inputs(spec: re.Match[str], model: nn.Module) -> Window:
    numbers = [int(number) for number in spec.groups() if number]
    lanes, steps = numbers[:2]
    generator = torch.Generator().manual_seed(0)
    if spec.re is _FLOATS:
        return Window(torch.randn(steps, lanes, numbers[2], generator=generator))
    sizes = [each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)]
    vocabulary = numbers[2] if len(numbers) > 2 else min(sizes, default=256)
    return Window(torch.randint(vocabulary, (steps, lanes), generator=generator))
