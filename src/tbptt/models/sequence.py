"""A recurrent model of sequences: numbers or symbols in, numbers or scores out.

Letters: T time, B lanes, D input, E embedding, H hidden, L layers, O output.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError, ShapeError, StreamError

__all__ = ["SequenceModel"]

Core: TypeAlias = Literal["lstm", "gru", "rnn"]

_CORES: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


@final
class SequenceModel(nn.Module):
    """Put a linear read-out behind one of torch's recurrent layers, and an embedding before it for symbols.

    The usual model to start from, stateful as torch's own layers are: state None at the start, and the
    layer's own state afterwards, (L, B, H) tensors. Dropout acts on what enters the recurrent layers,
    between them and on what leaves them, never on the state.

    Args:
        inputs: the numbers at each step, D; with `embedding` the number of symbols.
        outputs: the numbers given out at each step, O. With 1 the outputs are (T, B), as targets of one
            number are; else (T, B, O).
        hidden: the units of each recurrent layer, H.
        embedding: None feeds numbers (T, B, D) to the recurrent layer as they are; a size E takes ids
            (T, B) and looks up E numbers for each.
        core: "lstm", "gru" or "rnn" (tanh).
        layers: the recurrent layers, one above the other, L.
        dropout: the probability that a number is dropped in training; from 0 to below 1.
        tie_weights: use the embedding as the weights of the read-out; for symbols in and their scores
            out, with embedding == hidden.

    Raises:
        ConfigError: settings that cannot be meant, alone or together.

    Example:
        >>> model = SequenceModel(65, 65, hidden=128, embedding=32)
        >>> outputs, state = model(torch.zeros(10, 4, dtype=torch.int64))
        >>> outputs, state = model(torch.zeros(10, 4, dtype=torch.int64), state)
        >>> tuple(outputs.shape)
        (10, 4, 65)
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        hidden: int,
        embedding: int | None = None,
        core: Core = "lstm",
        layers: int = 1,
        dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "outputs": outputs, "hidden": hidden, "layers": layers}
        _check(sizes if embedding is None else sizes | {"embedding": embedding}, core, dropout)
        if tie_weights and (embedding != hidden or inputs != outputs):
            raise ConfigError(
                f"tied weights need embedding == hidden and inputs == outputs, but {embedding=}, {hidden=}, "
                f"{inputs=} and {outputs=} came: one matrix cannot be both",
                fix=f"outputs={inputs}, embedding={hidden}, or tie_weights=False",
            )
        self.inputs = inputs
        self.outputs = outputs
        self.embedding = None if embedding is None else nn.Embedding(inputs, embedding)
        # torch warns of dropout between layers where there is only one
        between = dropout if layers > 1 else 0.0
        self.core = _CORES[core](embedding or inputs, hidden, layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, outputs)
        if tie_weights and self.embedding is not None:
            # the read-out's scale: torch's embeddings, of variance 1, would make scores of size sqrt(H)
            nn.init.uniform_(self.embedding.weight, -(hidden**-0.5), hidden**-0.5)
            self.head.weight = self.embedding.weight

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Run over a window.

        Args:
            inputs: numbers (T, B, D), or ids (T, B).
            state: what the last call returned; None: zeros.

        Returns:
            The outputs, (T, B, O), or (T, B) with one output; and the state.

        Raises:
            ShapeError: inputs of another shape or kind.
            StreamError: an id that is none of the model's symbols (on the CPU; a GPU has torch's own error).
        """
        if self.embedding is None:
            if inputs.ndim != 3 or inputs.shape[-1] != self.inputs:
                raise ShapeError(
                    f"numbers of shape (T, B, {self.inputs}) were expected, time first, but {tuple(inputs.shape)} came",
                    fix="inputs.unsqueeze(-1) for one number a step; embedding=32 for ids",
                )
            entered = inputs
        else:
            entered = self._embedded(inputs, self.embedding)
        hidden, state = self.core(self.dropout(entered), state)
        outputs = self.head(self.dropout(hidden))
        return outputs.squeeze(-1) if self.outputs == 1 else outputs, state

    def _embedded(self, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ShapeError(
                f"ids of shape (T, B) were expected, int64, but {ids.dtype} of shape {tuple(ids.shape)} came",
                fix="SequenceModel(..., embedding=None) for numbers; inputs.long() for ids kept as numbers",
            )
        try:
            return embedding(ids)
        except IndexError as error:  # looked into only now: good windows pay nothing
            wrong = (ids < 0) | (ids >= self.inputs)
            step, lane = wrong.nonzero()[0].tolist()
            first = int(ids[step, lane])
            raise StreamError(
                f"ids from 0 to {self.inputs - 1} were expected, but {first} came at step {step} of the "
                f"window, lane {lane}: the model has {self.inputs} symbols",
                fix=f"SequenceModel({int(ids.max()) + 1}, ...), or encode with the vocabulary of the model",
            ) from error


def _check(sizes: dict[str, int], core: str, dropout: float) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                f"{name} was expected to be a whole number, at least 1, but {value!r} came", fix=f"{name}=1"
            )
    if core not in _CORES:
        raise ConfigError(f"core 'lstm', 'gru' or 'rnn' was expected, but {core!r} came", fix='core="lstm"')
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(
            f"a dropout from 0 to below 1 was expected, but {dropout} came: nothing would be left",
            fix="dropout=0.2",
        )
