"""What a model carries from chunk to chunk, measured against its own pass over the whole sequence.

Plain loops, which share no code with `tbptt.check`. Everything is a relative error, the largest difference
over the largest number, in double precision wherever the model can compute in it; many compute parts in single.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from zoo import Entry

EXACT, WRONG = 1e-4, 1e-3
CUTS = {"aligned": (8, 8, 8), "uneven": (5, 10, 9), "single": (1,) * 12}

Run = Callable[[Tensor, Any], tuple[Tensor, Any]]


def table(entry: Entry, adapted: bool) -> str:
    """Return a mark for each of value, gradient and detached, each with aligned, uneven and single steps.

    "+" exact, "-" wrong, "!" "modified by an inplace operation", "x" another error or a wrong shape;
    anything between exact and wrong is shown as its number.
    """
    found = [[mark(measure(entry, adapted, kind, cuts)) for cuts in CUTS] for kind in KINDS]
    return " ".join("".join(each) for each in found)


def mark(error: float | Exception) -> str:
    if isinstance(error, Exception):
        return "!" if "modified by an inplace operation" in str(error) else "x"
    return "+" if error < EXACT else "-" if error > WRONG else f"({error:.0e})"


def measure(entry: Entry, adapted: bool, kind: str, cuts: str) -> float | Exception:
    """Return the relative error of one kind of carry, or what was raised."""
    module = entry.build().to(entry.dtype).train()
    sizes = [size * entry.unit if cuts == "aligned" else size for size in CUTS[cuts]]
    inputs = entry.inputs(sum(sizes))
    inputs = inputs.to(entry.dtype) if inputs.is_floating_point() else inputs
    pieces = list(pairwise(accumulate(sizes, initial=0)))
    run: Run = entry.adapt(module) if adapted else lambda x, state: entry.by_hand(module, x, state)
    try:
        return KINDS[kind](entry, module, run, inputs, pieces)
    except (RuntimeError, AssertionError, ValueError) as error:
        return error


def value(entry: Entry, module: nn.Module, run: Run, inputs: Tensor, pieces: list[tuple[int, int]]) -> float:
    outputs, state = [], None
    with torch.no_grad():
        for begin, end in pieces:
            output, state = run(inputs[begin:end], state)
            outputs.append(output)
        return relative(torch.cat(outputs), entry.whole(module, inputs))


def gradient(entry: Entry, module: nn.Module, run: Run, inputs: Tensor, pieces: list[tuple[int, int]]) -> float:
    """The gradient of the last chunk's loss with respect to the inputs of all chunks before it."""
    state, last = None, pieces[-1]
    inputs, leaf = differentiated(module, inputs)
    for begin, end in pieces:
        outputs, state = run(inputs[begin:end], state)
    (found,) = torch.autograd.grad((outputs * weights(outputs)).sum(), leaf)
    expected = reference(entry, module, inputs, leaf, [last])[0]
    return relative(steps(found, inputs, 0, last[0]), steps(expected, inputs, 0, last[0]))


def detached(entry: Entry, module: nn.Module, run: Run, inputs: Tensor, pieces: list[tuple[int, int]]) -> float:
    """The gradient of each chunk's loss with respect to its own inputs, the state detached in between."""
    found, state = [], None
    inputs, leaf = differentiated(module, inputs)
    for begin, end in pieces:
        outputs, state = run(inputs[begin:end], state)
        found.append(torch.autograd.grad((outputs * weights(outputs)).sum(), leaf)[0])
        state = entry.detach(module, state)
    expected = reference(entry, module, inputs, leaf, pieces)
    errors = [
        relative(steps(a, inputs, *piece), steps(b, inputs, *piece))
        for a, b, piece in zip(found, expected, pieces, strict=True)
    ]
    return float(torch.tensor(errors).max())  # one that is not a number stays one


KINDS = {"value": value, "gradient": gradient, "detached": detached}


def reference(
    entry: Entry, module: nn.Module, inputs: Tensor, leaf: Tensor, pieces: list[tuple[int, int]]
) -> list[Tensor]:
    outputs = entry.whole(module, inputs)
    losses = [(outputs[begin:end] * weights(outputs[begin:end])).sum() for begin, end in pieces]
    return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]


def differentiated(module: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs, and what stands for them in the gradient: themselves, or the embedding of token ids."""
    if inputs.is_floating_point():
        inputs = inputs.clone().requires_grad_()
        return inputs, inputs
    return inputs, next(each.weight for each in module.modules() if isinstance(each, nn.Embedding))


def steps(gradient: Tensor, inputs: Tensor, begin: int, end: int) -> Tensor:
    """Return the gradient of these steps; a token id is used only once, so that its row is one step's."""
    return gradient[begin:end] if inputs.is_floating_point() else gradient[inputs[begin:end]]


def weights(outputs: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"{tuple(expected.shape)} expected, {tuple(found.shape)} found")
    return float((found - expected).abs().max() / expected.abs().max())
