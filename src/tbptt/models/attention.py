"""Attention over one segment, what is remembered of the steps before it, and memory tokens.

The rows of a segment stand on a line, in this order, and only their distances count:

    read tokens (K) | remembered steps (M) | steps (T) | write tokens (K)

Letters: T time, B lanes, W width, D width of a head, H heads, K tokens, M remembered steps, N = K + T + K rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

__all__ = ["Block", "Layout"]

_BASE = 10_000.0
"""Of the wavelengths of the rotation, as in the paper."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Who sees whom in a segment, and how far apart they stand.

    What asks are the N rows: read tokens, steps, write tokens. What is asked are the remembered steps and then these.

    Args:
        sees: whether a row sees what is asked. Shape (1 or B, 1, N, M + N), bool.
        cos: of the angles by which the place of what is asked turns it. Shape (M + N, D / 2).
        sin: the same.
    """

    sees: Tensor
    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(
        steps: int, tokens: int, memory: int, filled: Tensor | None, *, sliding: bool, size: int, like: Tensor
    ) -> Layout:
        """Lay out a segment.

        Args:
            steps: of the segment, T.
            tokens: read, and written, K.
            memory: remembered steps there is room for, M.
            filled: how many there are in each lane, shape (B,); None with no room.
            sliding: whether a step sees the M steps before itself, instead of its segment and the M before that.
            size: of a head, D.
            like: a tensor of the device and type of the hidden states.
        """
        first = memory + tokens  # of what is asked, the first step
        sees = torch.zeros(2 * tokens + steps, memory + 2 * tokens + steps, dtype=torch.bool, device=like.device)
        sees[:tokens, memory:first] = True  # read tokens see each other: what they are is known before the segment
        sees[tokens:, : first + steps] = True  # of the steps, those that come later are taken away below
        sees[tokens + steps :, first + steps :] = True
        place = torch.arange(steps, device=like.device)
        sees[tokens : tokens + steps, first : first + steps] = place[:, None] >= place
        spans = ((-memory, 0), (-first, -memory), (0, steps + tokens))
        line = torch.cat([torch.arange(*span, device=like.device) for span in spans])
        if sliding:
            sees &= line[memory:, None] - line <= memory
        sees = sees[None, None]
        if filled is not None:
            empty = torch.arange(memory, device=like.device) < memory - filled[:, None]
            sees = sees & ~nn.functional.pad(empty, (0, 2 * tokens + steps))[:, None, None]
        exact = torch.promote_types(like.dtype, torch.float32)  # half precision cannot tell far places apart
        rate = _BASE ** -(torch.arange(0, size, 2, device=like.device, dtype=exact) / size)
        angles = line.to(exact)[:, None] * rate
        return Layout(sees, angles.cos().to(like.dtype), angles.sin().to(like.dtype))

    def turned(self, rows: Tensor) -> Tensor:
        """Turn queries, or what is asked, by their places: the last ones of the line. Shape (B, H, N or M + N, D)."""
        cos, sin = self.cos[-rows.shape[2] :], self.sin[-rows.shape[2] :]
        left, right = rows.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Block(nn.Module):
    """One layer: attention and two linear maps, each behind a norm and added to what came in.

    What is added starts small, `scale` times what torch's layers start with: rows pass almost as they are, so that what
    tokens hold is not overwritten by every segment before anything is learned.
    """

    def __init__(self, width: int, heads: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)
        self.linear_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            for added in (self.merge, self.contract):
                added.weight.mul_(scale)
                added.bias.zero_()

    def forward(self, rows: Tensor, memory: Tensor | None, layout: Layout) -> Tensor:
        """Return the rows of the layer above.

        Args:
            rows: what came in, shape (B, N, W).
            memory: what came in at the steps before the segment, shape (B, M, W); None for no room.
            layout: of both.
        """
        asked = self.attention_norm(rows if memory is None else torch.cat([memory, rows], 1))
        query = layout.turned(self._by_head(self.query(asked[:, -rows.shape[1] :])))
        key, value = (self._by_head(each) for each in self.key_value(asked).chunk(2, -1))
        dropped = self.dropout.p if self.training else 0.0
        found = scaled_dot_product_attention(query, layout.turned(key), value, attn_mask=layout.sees, dropout_p=dropped)
        rows = rows + self.dropout(self.merge(found.transpose(1, 2).flatten(2)))
        return rows + self.dropout(self.contract(gelu(self.expand(self.linear_norm(rows)))))

    def _by_head(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
