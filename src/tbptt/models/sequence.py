"""A recurrent model of sequences: numbers or symbols in, numbers or scores out.

Letters: T time, B lanes, D input, E embedding, H hidden, L layers, O output.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, final, get_args

from torch import Tensor, nn

from tbptt.errors import ConfigError
from tbptt.models.arguments import check_dropout, check_numbers, check_sizes, embedded
from tbptt.models.attentive import Attentive
from tbptt.models.elstm import ELSTM
from tbptt.models.lru import LRU
from tbptt.recurrence import Recurrence
from tbptt.tree import Tree

__all__ = ["SequenceModel"]

Core: TypeAlias = Literal["lstm", "gru", "rnn", "elstm", "lru", "attentive_lstm", "attentive_gru"]

_CORES: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}
_ATTENTIVE: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"attentive_lstm": nn.LSTM, "attentive_gru": nn.GRU}
_AnyCore: TypeAlias = nn.LSTM | nn.GRU | nn.RNN | ELSTM | LRU | Attentive


@final
class SequenceModel(nn.Module):
    """Put a linear read-out behind recurrent layers, torch's or ours, and an embedding before them for symbols.

    The usual model to start from, stateful as torch's own layers are: state None at the start, and the
    layers' own state afterwards: (L, B, H) tensors of torch's, a tuple of L tensors (B, H) of `ELSTM` and `LRU`, with
    its memory that of `Attentive`. Dropout acts on what enters the recurrent layers, between them and on what leaves
    them, never on the state.

    Args:
        inputs: the numbers at each step, D; with `embedding` the number of symbols.
        outputs: the numbers given out at each step, O. With 1 the outputs are (T, B), as targets of one
            number are; else (T, B, O).
        hidden: the units of each recurrent layer, H.
        embedding: None feeds numbers (T, B, D) to the recurrent layer as they are; a size E takes ids
            (T, B) and looks up E numbers for each.
        core: "lstm", "gru" or "rnn" (tanh); "elstm" or "lru" (with `glu=True`), whose recurrence is element-wise,
            for learning online; "attentive_lstm" or "attentive_gru", an `Attentive` layer, which looks up states of its
            past, for `SparseAttentiveBacktracking`. The read-out then reads 2 H numbers: the state, and what was found.
        layers: the recurrent layers, one above the other, L; an attentive core has one.
        dropout: the probability that a number is dropped in training; from 0 to below 1.
        tie_weights: use the embedding as the weights of the read-out; for symbols in and their scores
            out, with embedding == hidden (2 hidden with an attentive core).
        k_att: of an attentive core alone: steps from one stored state to the next; None: as `Attentive` has it.
        k_top: likewise: the memories looked up at a step.
        memory: likewise: the slots.

    Raises:
        ConfigError: settings that cannot be meant, alone or together.

    Exactness: `recurrences` is for online methods. They are exact only in the last recurrent layer: lower ones, and
        the embedding, reach the state also through the layers above.

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
        k_att: int | None = None,
        k_top: int | None = None,
        memory: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "outputs": outputs, "hidden": hidden, "layers": layers}
        check_sizes(**(sizes if embedding is None else sizes | {"embedding": embedding}))
        check_dropout(dropout)
        asked = {"k_att": k_att, "k_top": k_top, "memory": memory}
        memories = {name: value for name, value in asked.items() if value is not None}
        read = 2 * hidden if core in _ATTENTIVE else hidden
        if tie_weights and (embedding != read or inputs != outputs):
            raise ConfigError(
                f"tied weights need embedding == {'hidden' if read == hidden else '2 hidden'} and inputs == outputs, "
                f"but {embedding=}, {hidden=}, {inputs=} and {outputs=} came: one matrix cannot be both",
                fix=f"outputs={inputs}, embedding={read}, or tie_weights=False",
            )
        self.inputs = inputs
        self.outputs = outputs
        self.embedding = None if embedding is None else nn.Embedding(inputs, embedding)
        self.core = _core(core, embedding or inputs, hidden, layers, dropout, memories)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(read, outputs)
        if tie_weights and self.embedding is not None:
            # the read-out's scale: torch's embeddings, of variance 1, would make scores of size sqrt(H)
            nn.init.uniform_(self.embedding.weight, -(read**-0.5), read**-0.5)
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
            check_numbers(inputs, self.inputs, "; embedding=32 for ids")
            entered = inputs
        else:
            entered = embedded(inputs, self.embedding, type(self).__name__)
        hidden, state = self.core(self.dropout(entered), state)
        outputs = self.head(self.dropout(hidden))
        return outputs.squeeze(-1) if self.outputs == 1 else outputs, state

    def recurrences(self) -> tuple[Recurrence, ...]:
        """Return the element-wise recurrences: of each layer of "elstm" and "lru"; none of the others."""
        if not isinstance(self.core, (ELSTM, LRU)):
            return ()
        return tuple(
            Recurrence(each.leaf, tuple(f"core.{name}" for name in each.parameters)) for each in self.core.recurrences()
        )

    def memories(self) -> tuple[int, ...]:
        """Return the place of an attentive core's memory in the state; none of the others."""
        return self.core.memories() if isinstance(self.core, Attentive) else ()

    def pathways(self, state: Any) -> dict[str, Tree]:
        """Return by which ways the past comes to an attentive core; nothing of the others, which have one."""
        return self.core.pathways(state) if isinstance(self.core, Attentive) else {}


def _core(core: str, inputs: int, hidden: int, layers: int, dropout: float, memories: dict[str, int]) -> _AnyCore:
    if core not in get_args(Core):
        *most, last = get_args(Core)
        names = ", ".join(map(repr, most)) + f" or {last!r}"
        raise ConfigError(f"core {names} was expected, but {core!r} came", fix='core="lstm"')
    if core in _ATTENTIVE:
        return _attentive(core, inputs, hidden, layers, memories)
    if memories:
        raise ConfigError(
            f"a core with a memory was expected, as {', '.join(memories)} came, but core={core!r} has none: they "
            "would have no effect",
            fix='core="attentive_lstm", or leave it out',
        )
    between = dropout if layers > 1 else 0.0  # all of them refuse dropout between layers where there is only one
    if core == "elstm":
        return ELSTM(inputs, hidden, layers, dropout=between)
    if core == "lru":  # the read-out is linear, and a bare layer would be, too
        return LRU(inputs, hidden, hidden, layers=layers, glu=True, dropout=between)
    return _CORES[core](inputs, hidden, layers, dropout=between)


def _attentive(core: str, inputs: int, hidden: int, layers: int, memories: dict[str, int]) -> Attentive:
    if layers > 1:
        raise ConfigError(
            f"one layer was expected with core={core!r}, but {layers=} came: a layer looks up its own past alone",
            fix='layers=1, or core="lstm"',
        )
    return Attentive(_ATTENTIVE[core](inputs, hidden), **memories)
