"""Synthetic streams whose horizon is known: what a truncation must reach, by construction.

What a stream holds depends on the seed, the pass, the lane and the position only, so that windows of any
sizes, in any number of lanes, give the same data, and a cursor is all there is to save. Every pass has fresh
data of its own: `rewind` goes on to the next pass (before the first read it does nothing).

Letters: T time, B lanes, S symbols.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tbptt.errors import ConfigError, EndOfStream, StreamError
from tbptt.streams.arrays import check_whole
from tbptt.streams.base import Stream, check_steps
from tbptt.window import Window

__all__ = ["Adding", "CopyTask", "DelayedRecall", "InfluenceBalancing", "SyntheticStream"]

Array: TypeAlias = npt.NDArray[Any]

_BLOCK = 1024
"""Steps drawn at a time, about: seeding a generator costs as much as drawing some hundred steps."""


class SyntheticStream(Stream, ABC):
    """A stream that draws its steps in blocks, each from a generator of its own.

    To add a task, say what a block of one lane is (`_draw`) and what a window is made of (`_window`).

    Args:
        lanes: the number of sequences, B.
        steps: the length of one pass.
        seed: of the data; another seed, other data. At least 0.
        horizon: the look-back that a model needs, its own step included.
        block: the steps drawn together.

    Attributes:
        lanes: the number of sequences, B.
        steps: the length of one pass.
        horizon: the look-back that a model needs, its own step included.
    """

    def __init__(self, lanes: int, *, steps: int, seed: int, horizon: int, block: int) -> None:
        self.lanes = check_whole("lanes", lanes, 1)
        self.steps = check_whole("steps", steps, 1)
        self.seed = check_whole("seed", seed, 0)
        self.horizon = horizon
        self._block = block
        self._pass = 0
        self._position = 0
        self._drawn: dict[tuple[int, int], Array] = {}  # the newest blocks of all lanes

    @abstractmethod
    def _draw(self, generator: np.random.Generator) -> Array:
        """Return one block of one lane. Shape (block, ...)."""

    @abstractmethod
    def _window(self, begin: int, end: int) -> Window:
        """Return the steps from `begin` to `end`, with no reset for the start of the pass."""

    def _rows(self, begin: int, end: int) -> Array:
        """Return what was drawn for the steps from `begin` to `end`. Shape (end - begin, B, ...)."""
        first, last = begin // self._block, (end - 1) // self._block
        blocks = [self._all_lanes(number) for number in range(first, last + 1)]
        rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return rows[begin - first * self._block : end - first * self._block]

    def _now_and_before(self, begin: int, end: int, lag: int, blank: int) -> tuple[Tensor, Tensor]:
        """Return the symbols from `begin` to `end`, and those `lag` steps earlier, `blank` before step 0."""
        rows = torch.from_numpy(self._rows(max(begin - lag, 0), end))
        steps = end - begin
        missing = rows.new_full((max(0, min(lag - begin, steps)), self.lanes), blank)
        return rows[-steps:].clone(), torch.cat([missing, rows[: steps - len(missing)]])

    def _all_lanes(self, number: int) -> Array:
        key = (self._pass, number)
        if key not in self._drawn:
            seeds = [(self.seed, self._pass, lane, number) for lane in range(self.lanes)]
            drawn = np.stack([self._draw(np.random.default_rng(seed)) for seed in seeds], axis=1)
            # windows move forward, so that the last few blocks are all that can be asked for again
            keep = 2 + self.horizon // self._block
            for old in sorted(self._drawn)[: max(0, len(self._drawn) - keep)]:
                del self._drawn[old]
            self._drawn[key] = drawn
        return self._drawn[key]

    def read(self, steps: int) -> Window:
        """Return the next `steps` steps, fewer at the end of a pass.

        Raises:
            EndOfStream: the pass is over.
        """
        check_steps(steps)
        if self._position >= self.steps:
            raise EndOfStream(f"the pass of {self.steps} steps is over", fix="stream.rewind()")
        begin, end = self._position, min(self._position + steps, self.steps)
        window = self._window(begin, end)
        if begin == 0:
            reset = window.reset.clone()
            reset[0] = True
            window = replace(window, reset=reset)
        self._position = end
        return window

    def rewind(self) -> None:
        """Go on to the next pass, which has data of its own; at its first step there is nothing to do."""
        if self._position:
            self._pass, self._position = self._pass + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, the pass, and what they are a place in."""
        return {
            "position": self._position,
            "pass": self._pass,
            "seed": self.seed,
            "lanes": self.lanes,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the cursor where `state_dict` found it.

        Raises:
            StreamError: the state belongs to a stream with other data.
        """
        mine = self.state_dict()
        for name in ("seed", "lanes", "steps"):
            if state.get(name) != mine[name]:
                raise StreamError(
                    f"a place in a stream with {name}={mine[name]} was expected, but the state has "
                    f"{name}={state.get(name)}: its data are others",
                    fix="resume with the stream that the run began with",
                )
        position, number = state.get("position"), state.get("pass")
        if not isinstance(position, int) or not 0 <= position <= self.steps or not isinstance(number, int):
            raise StreamError(f"a position from 0 to {self.steps} of a pass was expected, but {state} came")
        self._position, self._pass = position, number


@final
class CopyTask(SyntheticStream):
    """Repeat what was read: Aicher's fixed copy task, the plainest test of memory.

    Periods of 2*length + delay steps. A period reads '#', then length - 1 letters drawn evenly, then blanks.
    The targets are blank for the first length + delay steps, then '#' and the same letters: each target is
    the input of `length + delay` steps ago. All lanes keep step. Ids: the letters come first, then
    '#' (`letters`), then the blank (`letters + 1`).

    With delay=0 a model that knows all but the letters has a perplexity of
    exp((length - 1) / (2*length) * ln(letters)): 1.866 for length 10 and 4 letters.

    Args:
        lanes: the number of sequences, B.
        length: the symbols to repeat, '#' included; at least 2.
        delay: further blanks between reading and repeating.
        letters: the number of letters.
        one_hot: give inputs as (T, B, S) numbers, for models without an embedding, instead of (T, B) ids.
        steps: the length of one pass.
        seed: of the data.

    Reference: Aicher, Foti & Fox (2019), section 5.2; the released code counts '#' as one of the `length`
        symbols and puts it first, which is followed here.

    Example:
        >>> window = CopyTask(lanes=1, length=3).read(6)
        >>> window.inputs[0].item(), window.targets[:4, 0].tolist()
        (4, [5, 5, 5, 4])
        >>> window.targets[3:].equal(window.inputs[:3])
        True
    """

    def __init__(
        self,
        lanes: int,
        length: int = 10,
        *,
        delay: int = 0,
        letters: int = 4,
        one_hot: bool = False,
        steps: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.length = check_whole("length", length, 2)
        self.delay = check_whole("delay", delay, 0)
        self.letters = check_whole("letters", letters, 1)
        self.num_symbols = letters + 2
        self._one_hot = one_hot
        self._lag = length + delay
        self._period = 2 * length + delay
        block = self._period * max(1, _BLOCK // self._period)
        super().__init__(lanes, steps=steps, seed=seed, horizon=self._lag + 1, block=block)

    def _draw(self, generator: np.random.Generator) -> Array:
        periods = np.full((self._block // self._period, self._period), self.letters + 1)
        periods[:, 0] = self.letters
        periods[:, 1 : self.length] = generator.integers(self.letters, size=(len(periods), self.length - 1))
        return periods.reshape(-1)

    def _window(self, begin: int, end: int) -> Window:
        inputs, targets = self._now_and_before(begin, end, self._lag, blank=self.letters + 1)
        return Window(_one_hot(inputs, self.num_symbols) if self._one_hot else inputs, targets, start=begin)


@final
class DelayedRecall(SyntheticStream):
    """Say what was read exactly `lag` steps ago, among symbols that are drawn evenly at every step.

    Nothing in between tells anything about the target: a gradient that does not reach `lag` steps back learns
    nothing at all. The first `lag` steps of a pass have no target.

    Args:
        lag: how many steps ago; 0 asks for the symbol just read.
        lanes: the number of sequences, B.
        symbols: the number of symbols.
        one_hot: give inputs as (T, B, S) numbers, for models without an embedding, instead of (T, B) ids.
        steps: the length of one pass.
        seed: of the data.

    Example:
        >>> window = DelayedRecall(2, 1).read(5)
        >>> window.targets[2:].equal(window.inputs[:-2]), window.mask[:, 0].tolist()
        (True, [False, False, True, True, True])
    """

    def __init__(
        self,
        lag: int,
        lanes: int,
        *,
        symbols: int = 4,
        one_hot: bool = False,
        steps: int = 10_000,
        seed: int = 0,
    ) -> None:
        self.lag = check_whole("lag", lag, 0)
        self.num_symbols = check_whole("symbols", symbols, 2)
        self._one_hot = one_hot
        super().__init__(lanes, steps=steps, seed=seed, horizon=lag + 1, block=_BLOCK)

    def _draw(self, generator: np.random.Generator) -> Array:
        return generator.integers(self.num_symbols, size=self._block)

    def _window(self, begin: int, end: int) -> Window:
        inputs, targets = self._now_and_before(begin, end, self.lag, blank=0)
        mask = (torch.arange(begin, end) >= self.lag)[:, None].expand(-1, self.lanes).contiguous()
        return Window(_one_hot(inputs, self.num_symbols) if self._one_hot else inputs, targets, mask, start=begin)


@final
class Adding(SyntheticStream):
    """Add the two marked numbers of a sequence, and say so at its last step only.

    Each sequence has `length` steps of (number in [0, 1), mark); one mark stands in its first half, one in
    its second. The target, at the last step, is their sum; no other counts. Every sequence begins with a
    reset of all lanes. A sequence that the end of a pass cuts short has no target.

    Always saying 1 has a mean squared error of 1/6.

    Args:
        lanes: the number of sequences side by side, B.
        length: the steps of a sequence; at least 2.
        steps: the length of one pass.
        seed: of the data.
        dtype: of the numbers; None: torch.get_default_dtype().

    Reference: Hochreiter & Schmidhuber (1997), section 5.4; here of fixed length, with targets and
        numbers in [0, 1) as is usual since Le, Jaitly & Hinton (2015).

    Example:
        >>> window = Adding(1, 4).read(4)
        >>> number, mark = window.inputs.unbind(-1)
        >>> window.targets[3].allclose((number * mark).sum(0)), window.mask[:, 0].tolist()
        (True, [False, False, False, True])
    """

    def __init__(
        self,
        lanes: int,
        length: int,
        *,
        steps: int = 10_000,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.length = check_whole("length", length, 2)
        self.dtype = _floating(dtype)
        block = length * max(1, _BLOCK // length)
        super().__init__(lanes, steps=steps, seed=seed, horizon=length, block=block)

    def _draw(self, generator: np.random.Generator) -> Array:
        count, half = self._block // self.length, self.length // 2
        columns = np.zeros((count, self.length, 3))  # number, mark, target
        columns[..., 0] = generator.random((count, self.length))
        every = np.arange(count)
        columns[every, generator.integers(half, size=count), 1] = 1.0
        columns[every, generator.integers(half, self.length, size=count), 1] = 1.0
        columns[:, -1, 2] = (columns[..., 0] * columns[..., 1]).sum(1)
        return columns.reshape(-1, 3)

    def _window(self, begin: int, end: int) -> Window:
        rows = torch.from_numpy(self._rows(begin, end)).to(self.dtype)
        place = (torch.arange(begin, end) % self.length)[:, None].expand(-1, self.lanes)
        inputs, targets = rows[..., :2].contiguous(), rows[..., 2].contiguous()
        return Window(inputs, targets, place == self.length - 1, place == 0, begin)


@final
class InfluenceBalancing(SyntheticStream):
    """Drive the influence-balancing system: nothing goes in, and 1 should come out.

    Inputs are zeros (T, B, 1) and targets ones (T, B); with the loss ½(s - 1)² the gradient of a short
    look-back has the wrong sign, and the parameter runs away. All there is to learn is in the model,
    `tbptt.models.InfluenceBalancingModel`.

    The horizon, 41, is the smallest look-back k2 whose gradient has the right sign at k1 = 1.

    Args:
        lanes: the number of sequences, B; all alike.
        steps: the length of one pass.
        dtype: of the numbers; None: torch.get_default_dtype().
    """

    def __init__(self, lanes: int = 1, *, steps: int = 10_000, dtype: torch.dtype | None = None) -> None:
        self.dtype = _floating(dtype)
        super().__init__(lanes, steps=steps, seed=0, horizon=41, block=_BLOCK)

    def _draw(self, generator: np.random.Generator) -> Array:
        del generator  # nothing is random here
        return np.zeros(self._block)

    def _window(self, begin: int, end: int) -> Window:
        size = (end - begin, self.lanes)
        return Window(torch.zeros(*size, 1, dtype=self.dtype), torch.ones(size, dtype=self.dtype), start=begin)


def _one_hot(ids: Tensor, symbols: int) -> Tensor:
    return torch.nn.functional.one_hot(ids, symbols).to(torch.get_default_dtype())


def _floating(dtype: torch.dtype | None) -> torch.dtype:
    found = dtype or torch.get_default_dtype()
    if not found.is_floating_point:
        raise ConfigError(f"a floating dtype was expected, but {found} came", fix="dtype=torch.float64")
    return found
