"""Recall over segments: a symbol is marked in the first segment, and asked for at the end of the last.

A sequence has S segments of 12 steps, each a random order of 4 symbols, every one of them once and 8 more drawn evenly.
In the first segment one symbol, drawn evenly, is marked at one of its places. At the last step of the last segment it
is asked for, and only there is a loss. How often a symbol comes says nothing about the mark, and hides most of what a
net that was never taught to write says of it by chance. Without that, where each symbol comes once, a look-back of
S - 1 learns to read this little: it is no proof that a gradient went back to where the mark was.
"""

from __future__ import annotations

import torch
from torch import nn

import tbptt
from tbptt.models import SegmentTransformer

SYMBOLS, STEPS = 4, 12


def made() -> SegmentTransformer:
    """Return the model: one layer, two memory tokens."""
    return SegmentTransformer(SYMBOLS + 2, SYMBOLS, 32, heads=2, layers=1, memory_tokens=2, segment=STEPS)


def sequences(segments: int, lanes: int, generator: torch.Generator) -> tbptt.Window:
    """Return one sequence in each lane: a one-hot symbol, whether it is the marked one, whether it is asked for."""
    drawn = torch.randint(SYMBOLS, (segments, lanes, STEPS), generator=generator)
    drawn[..., :SYMBOLS] = torch.arange(SYMBOLS)  # so that each comes, and the marked one may be any
    order = torch.rand(segments, lanes, STEPS, generator=generator).argsort(-1)
    ids = drawn.gather(-1, order).transpose(1, 2).flatten(0, 1)  # (T, B)
    marked = torch.randint(SYMBOLS, (lanes,), generator=generator)
    where = (ids[:STEPS] == marked) * torch.rand(STEPS, lanes, generator=generator)  # any of its places
    marks = torch.zeros(len(ids), lanes, 2)
    marks[where.argmax(0), torch.arange(lanes), 0] = 1.0
    marks[-1, :, 1] = 1.0
    inputs = torch.cat([nn.functional.one_hot(ids, SYMBOLS).float(), marks], -1)
    first, last = torch.zeros(2, len(ids), lanes, dtype=torch.bool)
    first[0], last[-1] = True, True
    return tbptt.Window(inputs, marked.expand(len(ids), lanes), last, first)


def accuracy(model: SegmentTransformer, segments: int, seed: int) -> float:
    window = sequences(segments, 2048, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        outputs, _ = model(window.inputs)
    return float((outputs[-1].argmax(-1) == window.targets[-1]).float().mean())
