"""A transformer that goes on from segment to segment, by remembered steps, by memory tokens, or by both.

Letters: T time, B lanes, I inputs, E embedding, W width, H heads, L layers, M remembered steps, K memory tokens,
S steps of a segment, O outputs.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from tbptt.codec import registered_class
from tbptt.errors import ConfigError, ShapeError
from tbptt.models.arguments import check_dropout, check_numbers, check_sizes, embedded
from tbptt.models.attention import Block, Layout
from tbptt.tree import Tree, tensors

__all__ = ["SegmentState", "SegmentTransformer"]


@registered_class
class SegmentState(NamedTuple):
    """What is carried from segment to segment. Sizes stay, so that single lanes can start anew.

    Args:
        memory: for each layer what came into it at the last M steps, the newest last, zeros where there was none yet.
            Shape (B, M, W) each; no layer with M = 0.
        filled: how many of the M there are. Shape (B,), int64; None with M = 0.
        tokens: what was written at the end of the last segment. Shape (B, K, W); None with K = 0.
        place: steps of a segment that is not complete. Shape (B,), int64; None without segments.
    """

    memory: tuple[Tensor, ...]
    filled: Tensor | None
    tokens: Tensor | None
    place: Tensor | None


@final
class SegmentTransformer(nn.Module):
    """Attend within a segment, and carry on: what layers saw before (Transformer-XL), tokens (RMT), or both.

    A model like any other, `model(inputs, state)`: how many segments back the gradient goes through its memory is what
    the estimator says, as in `TBPTT(k1=S, k2=3 * S)`. Nothing is detached here, but with `memory_gradient=False`.

    With `segment`: a step sees the steps of its segment up to itself, the M steps before the segment, and the tokens
    read. Read tokens see each other and nothing else; write tokens, which enter as what was read, see everything. What
    they become behind the last layer, normalised, is read by the next segment. So no output depends on a later input.
    A window is cut into its segments; it may end with a shorter one, as at the end of a stream, but nothing can go on
    from there, as where a segment ends decides what is seen and what is written.

    Without `segment`: a step sees the M steps before itself, wherever the sequence is cut, so that windows may have any
    length, and a lane may start anew at any step. M only, no tokens.

    Places enter as rotations of queries and keys (RoPE), which tell distances only: a remembered hidden state has no
    place of its own and is turned when it is asked, and there is no table that ends at some length.

    Args:
        inputs: the numbers at each step, I; with `embedding` the number of symbols.
        outputs: the numbers given out at each step, O. With 1 the outputs are (T, B); else (T, B, O).
        width: of the hidden states, W; a multiple of 2 H.
        heads: of each layer, H.
        layers: one above the other, L.
        memory: remembered steps of each layer, M; 0: none. L layers see up to L M steps back.
        memory_tokens: K; 0: none.
        memory_gradient: whether gradients may go into remembered steps; False stops them at each segment, whatever the
            estimator says, which is Transformer-XL's own rule.
        segment: S; None: no segments.
        embedding: None takes numbers (T, B, I); a size E takes ids (T, B) and looks up E numbers for each.
        dropout: the probability that a number is dropped in training; from 0 to below 1.

    Raises:
        ConfigError: settings that cannot be meant, alone or together.

    Exactness: gradients through both memories are those of plain autograd, and exactly zero beyond the look-back
        (tests/models/test_segments_estimators.py).
    Cost: a segment attends over (S + 2 K) (M + S + 2 K) pairs a layer and head; without segments a window over
        T (M + T), so that a long one is better cut. The state has B (L M + K) W numbers.
    Reference: Dai et al. (2019), "Transformer-XL", arXiv:1901.02860; `same_length` in its code: without segments.
        Bulatov, Kuratov & Burtsev (2022), "Recurrent memory transformer", arXiv:2207.06881. Su et al. (2021),
        arXiv:2104.09864, for places. Layers are pre-norm and start close to the identity; what is written is
        normalised, to stay of one size for ever.

    Example:
        >>> model = SegmentTransformer(65, 65, 32, heads=4, layers=2, memory_tokens=4, segment=16, embedding=16)
        >>> outputs, state = model(torch.zeros(32, 8, dtype=torch.int64))
        >>> outputs.shape, state.tokens.shape
        (torch.Size([32, 8, 65]), torch.Size([8, 4, 32]))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        width: int,
        *,
        heads: int,
        layers: int,
        memory: int = 0,
        memory_tokens: int = 0,
        memory_gradient: bool = True,
        segment: int | None = None,
        embedding: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "outputs": outputs, "width": width, "heads": heads, "layers": layers}
        asked = {"segment": segment, "embedding": embedding}
        asked |= {"memory": memory or None, "memory_tokens": memory_tokens or None}
        check_sizes(**sizes, **{name: value for name, value in asked.items() if value is not None})
        check_dropout(dropout)
        _check_heads(width, heads)
        _check_memory(memory, memory_tokens, segment, memory_gradient=memory_gradient)
        self.inputs, self.outputs, self.width, self.head_size = inputs, outputs, width, width // heads
        self.memory, self.memory_tokens, self.segment = memory, memory_tokens, segment
        self.memory_gradient = memory_gradient
        self.embedding = None if embedding is None else nn.Embedding(inputs, embedding)
        self.enter = nn.Linear(embedding or inputs, width)
        self.blocks = nn.ModuleList([Block(width, heads, dropout, 0.3 * layers**-0.5) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.dropout = nn.Dropout(dropout)
        if memory_tokens:
            self.first_tokens = nn.Parameter(0.02 * torch.randn(memory_tokens, width))  # little, beside what is read
            self.token_norm = nn.LayerNorm(width)

    def initial_state(self, lanes: int) -> SegmentState:
        """Return the state before the first segment: nothing remembered, and tokens that are learned."""
        like = self.enter.weight
        memory = [like.new_zeros(lanes, self.memory, self.width) for _ in self.blocks if self.memory]
        none_yet = torch.zeros(lanes, dtype=torch.int64, device=like.device)
        return SegmentState(
            tuple(memory),
            none_yet if self.memory else None,
            self.first_tokens.expand(lanes, -1, -1) if self.memory_tokens else None,
            None if self.segment is None else none_yet.clone(),
        )

    def pathways(self, state: SegmentState) -> dict[str, Tree]:
        """Return by which ways the past comes: see `tbptt.pathways.HasPathways`."""
        return {"attention": state.memory, "memory": state.tokens}

    def segment_steps(self) -> int | None:
        """Return S, which windows and look-backs are multiples of; see `tbptt.pathways.HasSegments`."""
        return self.segment

    def forward(self, inputs: Tensor, state: SegmentState | None = None) -> tuple[Tensor, SegmentState]:
        """Run over a window.

        Args:
            inputs: numbers (T, B, I), or ids (T, B).
            state: what the last call returned; None: `initial_state`.

        Returns:
            The outputs, (T, B, O), or (T, B) with one output; and the state.

        Raises:
            ShapeError: inputs of another shape or kind, a state of other lanes or another model, or one that a window
                left in mid-segment.
            StreamError: an id that is none of the model's symbols (on the CPU; a GPU has torch's own error).
        """
        if self.embedding is None:
            check_numbers(inputs, self.inputs, "; embedding=32 for ids")
            entered = inputs
        else:
            entered = embedded(inputs, self.embedding, type(self).__name__)
        rows = self.dropout(self.enter(entered)).transpose(0, 1)
        fresh = self.initial_state(len(rows))
        state = fresh if state is None else self._sound(state, fresh)
        pieces: list[Tensor] = []
        for part in rows.split(self.segment or rows.shape[1], 1):
            piece, state = self._run(part, state)
            pieces.append(piece)
        outputs = self.head(self.norm(torch.cat(pieces, 1))).transpose(0, 1)
        return outputs.squeeze(-1) if self.outputs == 1 else outputs, state

    def _run(self, steps: Tensor, state: SegmentState) -> tuple[Tensor, SegmentState]:
        """Run over one segment, shape (B, T, W); return the hidden states and the state after it."""
        num_steps, tokens, read = steps.shape[1], self.memory_tokens, state.tokens
        layout = Layout.of(
            num_steps,
            tokens,
            self.memory,
            state.filled,
            sliding=self.segment is None,
            size=self.head_size,
            like=steps,
        )
        rows = steps if read is None else torch.cat([read.to(steps.dtype), steps, read.to(steps.dtype)], 1)
        memory: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            before = state.memory[index] if self.memory else None
            if before is not None:
                before = before if self.memory_gradient else before.detach()
                came = torch.cat([before, rows[:, tokens : tokens + num_steps]], 1)
                memory.append(came[:, -self.memory :].to(before.dtype))
            rows = block(rows, before, layout)
        after = SegmentState(
            tuple(memory),
            None if state.filled is None else (state.filled + num_steps).clamp(max=self.memory),
            None if read is None else self.token_norm(rows[:, tokens + num_steps :]).to(read.dtype),
            None if state.place is None else torch.full_like(state.place, num_steps % (self.segment or 1)),
        )
        return rows[:, tokens : tokens + num_steps], after

    def _sound(self, state: SegmentState, fresh: SegmentState) -> SegmentState:
        """Return a state that was given, looked at against one of the same lanes.

        Raises:
            ShapeError: it belongs to other lanes or another model, or stands in mid-segment.
        """
        shapes = [[tuple(leaf.shape) for leaf in tensors(each)] for each in (state, fresh)]
        if not isinstance(state, SegmentState) or shapes[0] != shapes[1]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ShapeError(
                f"a SegmentState of tensors {shapes[1]} was expected, but {type(state).__name__} of {shapes[0]} came: "
                "it belongs to other lanes, or to another model",
                fix="state=None at the start, and then what the model returned for the same lanes",
            )
        if state.place is not None and bool(state.place.any()):
            lane = int(state.place.nonzero()[0])
            raise ShapeError(
                f"a state at the end of a segment was expected, but that of lane {lane} stands after step "
                f"{int(state.place[lane])} of a segment of {self.segment}: what is seen, and what is written, depends "
                "on where segments end",
                fix=f"windows, look-backs, sequences, and an estimator's own segment= or block= that are multiples of "
                f"segment={self.segment}; or memory=... with segment=None, which takes any length",
            )
        return state


def _check_heads(width: int, heads: int) -> None:
    if width % (2 * heads):
        raise ConfigError(
            f"a width that is a multiple of 2 heads was expected, but {width=} and {heads=} came: numbers are turned "
            "in pairs, in each head",
            fix=f"width={2 * heads * max(1, round(width / 2 / heads))}",
        )


def _check_memory(memory: int, memory_tokens: int, segment: int | None, *, memory_gradient: bool) -> None:
    if not memory and not memory_tokens:
        raise ConfigError(
            "memory or memory_tokens was expected, but both are 0: nothing would be carried from segment to segment",
            fix="memory=64, or memory_tokens=4 with segment=64",
        )
    if memory_tokens and segment is None:
        raise ConfigError(
            f"segment was expected together with {memory_tokens=}, but is None: tokens are written where a segment "
            "ends, so that the model would be another one for each length of the windows",
            fix="segment=64, and windows that are multiples of it",
        )
    if not memory_gradient and (not memory or segment is None):
        raise ConfigError(
            f"memory and segment were expected together with memory_gradient=False, but {memory=} and {segment=} came: "
            "it stops the gradient into remembered steps where a segment begins",
            fix="memory=64, segment=64; or memory_gradient=True",
        )
