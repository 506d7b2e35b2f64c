"""Steps that are read from their stream again whenever they are needed, instead of being held.

Letters: T time, B lanes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from tbptt.errors import EndOfStream
from tbptt.window import Window

__all__ = ["Readable", "Rereading"]

_HELD = 2
"""Pieces that are held: the one in use and the one after it, which was read to find out whether there is one."""


class Readable(Protocol):
    """What is needed of a stream to read from it, and to come back to a place in it."""

    lanes: int

    def read(self, steps: int, /) -> Window:
        """Return the next steps, fewer at the end of a pass, where it raises EndOfStream."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the cursor."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Put the cursor where `state_dict` found it."""
        ...


class Rereading:
    """The rest of a pass over a stream, in pieces of equal length; memory of two of them.

    Stands in the place of a window that would not fit into memory. Between two calls the cursor of the stream is
    behind the last piece that was read for the first time; when all have been, it is at the end of the pass.

    Args:
        stream: what to read, from where it is.
        size: steps of a piece; the last may have fewer.

    Attributes:
        lanes: the number of sequences side by side, B.
        start: the index of its first step in the stream.
        steps: those read for the first time so far; all of them once the end has been reached.

    Raises:
        EndOfStream: the pass is over.
    """

    def __init__(self, stream: Readable, size: int) -> None:
        self.stream, self.size = stream, size
        self._places = [stream.state_dict()]
        self._held: dict[int, Window] = {}
        self._over = False
        self._device: torch.device | str = "cpu"
        self.steps = 0
        first = self._read_on()
        self.lanes, self.start = first.lanes, first.start

    @property
    def first(self) -> Window:
        """The first piece."""
        found = self.piece(0)
        assert found is not None
        return found

    def piece(self, index: int) -> Window | None:
        """Return a piece, read again unless it is still held; None behind the end of the pass.

        Args:
            index: its number, at most one more than that of the last piece that was read.
        """
        known = len(self._places) - 1
        if index == known and not self._over:
            try:
                self._read_on()
            except EndOfStream:
                self._over = True
        if index >= len(self._places) - 1:
            return None
        if index not in self._held:
            self.stream.load_state_dict(self._places[index])
            self._hold(index, self.stream.read(self.size))
            self.stream.load_state_dict(self._places[-1])
        return self._held[index].to(self._device)

    def to(self, device: torch.device | str) -> Rereading:
        """Return it, its pieces on `device` from now on."""
        self._device = device
        return self

    def _read_on(self) -> Window:
        window = self.stream.read(self.size)
        self._places.append(self.stream.state_dict())
        self.steps += window.steps
        self._hold(len(self._places) - 2, window)
        return window

    def _hold(self, index: int, window: Window) -> None:
        while len(self._held) >= _HELD:
            del self._held[next(iter(self._held))]
        self._held[index] = window
