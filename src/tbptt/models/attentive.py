"""A recurrent layer that looks up states of its own past.

Letters: T time, B lanes, D input, H hidden, M slots of memory.
"""

from __future__ import annotations

from typing import TypeAlias, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tbptt.errors import CapabilityError, ConfigError, ShapeError
from tbptt.models.arguments import check_numbers, check_sizes
from tbptt.tree import Tree

__all__ = ["Attentive"]

State: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

_MEMORY = 2
"""The place of the memory in the state."""

_FIX = "Attentive(nn.LSTM(inputs, hidden), k_att=2, k_top=5, memory=64)"


@final
class Attentive(nn.Module):
    """Let an LSTM or GRU attend to a few of its own past states: for `SparseAttentiveBacktracking`.

    Every k_att steps the state goes into a memory; at every step the k_top memories that score best are looked up:

        ĥ = core(x, h),  e_i = wᵀ tanh(Q ĥ + K m_i),  a = softmax(e) over the k_top largest e_i, 0 elsewhere,
        s = Σ_i a_i m_i,  h' = ĥ + s,  output = [h', s];  every k_att steps ĥ is stored

    Of a GRU the gates and the candidate read h, and what they let through is ĥ: (1 - z) n + z ĥ. Else it would double
    at each step. An LSTM lets c through, which is not added to.

    Choose it where what matters lies long ago and little in between does: one look-up is one step for the gradient,
    however old the memory. Plain recurrent layers are cheaper wherever a look-back of all steps can be paid for.

    The state is a plain tuple: two tensors (B, H), h and c of an LSTM, ĥ and s of a GRU; the memory, (B, M, H); and
    how many steps a lane has run, (B,), which says what is stored next, where, and which slots are filled. A lane that
    starts anew starts with an empty memory. When all slots are taken the oldest state is overwritten.

    Args:
        core: an `nn.LSTM` or `nn.GRU` of one layer, one direction, time first and without a projection. It is run step
            by step.
        k_att: steps from one stored state to the next, at least 1.
        k_top: the memories looked up at a step, at least 1. With 1 its weight is always 1, so that nothing is learned
            about which one to take.
        memory: the slots, M. What lies more than about M k_att steps back is forgotten.

    Raises:
        ConfigError: a size below 1, or more to be chosen than there are slots.
        CapabilityError: a core of another kind.

    Exactness: what is stored stays in the graph; see `SparseAttentiveBacktracking` for what becomes of its gradient.
    Cost: a step is that of the core, H² for the query, M H for the scores; time and memory of a window T M H for each
        lane. A stored state costs H² for its key and a copy of the memory. At the start of a call all M keys are
        computed anew, with the weights of today.
    Reference: Ke et al. (2018), "Sparse attentive backtracking", arXiv:1809.03702. Four things differ from their
        released code. There the score is wᵀ tanh([h; m_i]), in which the part of h is the same for all memories and
        drops out once the threshold is subtracted: what is chosen could not depend on what is asked. Here Q and K mix
        them before the tanh. There the k_top-th largest score is subtracted, so that k_top - 1 memories are chosen, the
        rest divided by their sum: for memories that are alike nearly 0 / 0, and gradients as large as they are alike.
        Here it is a softmax, also while there are no more than k_top, where theirs are raw scores. There h' is stored,
        so that what is looked up is added to what will be: it grows with the length of the stream. Here ĥ is stored.
        And theirs holds all states, and a zero one; here they are bounded.

    Example:
        >>> model = Attentive(nn.LSTM(3, 5), k_att=2, k_top=2, memory=4)
        >>> outputs, state = model(torch.zeros(7, 2, 3))
        >>> outputs.shape, [tuple(leaf.shape) for leaf in state]
        (torch.Size([7, 2, 10]), [(2, 5), (2, 5), (2, 4, 5), (2,)])
        >>> model.memories()
        (2,)
    """

    def __init__(self, core: nn.LSTM | nn.GRU, *, k_att: int = 2, k_top: int = 5, memory: int = 64) -> None:
        super().__init__()
        check_sizes(k_att=k_att, k_top=k_top, memory=memory)
        if k_top > memory:
            raise ConfigError(
                f"at least as many slots as are looked up were expected, but {k_top=} and {memory=} came: there would "
                "never be so many to choose from",
                fix=f"memory={k_top}, or k_top={memory}",
            )
        _check_core(core)
        self.core = core
        self.k_att, self.k_top, self.memory = k_att, k_top, memory
        hidden = core.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def memories(self) -> tuple[int, ...]:
        """Return the place of the memory among the state's tensors; see `tbptt.recurrence.HasMemories`."""
        return (_MEMORY,)

    def pathways(self, state: State) -> dict[str, Tree]:
        """Return by which ways the past comes: see `tbptt.pathways.HasPathways`."""
        return {"recurrence": state[:_MEMORY], "attention": state[_MEMORY]}

    def forward(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over a window.

        Args:
            inputs: shape (T, B, D).
            state: what the last call returned; None: zeros, and an empty memory.

        Returns:
            The outputs [h'; s], (T, B, 2 H), and the state.

        Raises:
            ShapeError: inputs of another shape, or a state of other lanes.
        """
        check_numbers(inputs, self.core.input_size)
        first, second, memory, steps = self._start(inputs, state)
        keys = self.key(memory)
        places, stored = self._schedule(steps, len(inputs))
        slots = torch.arange(self.memory, device=inputs.device)
        outputs: list[Tensor] = []
        for step, entered in enumerate(inputs):
            now, cell = self._step(entered, first, second)
            filled = slots < (steps + step).div(self.k_att, rounding_mode="floor")[:, None]
            found = self._looked_up(now, memory, keys, filled)
            if stored[step]:
                here = (places[step][:, None] == slots)[..., None]  # in no slot where the lane stores nothing now
                memory = torch.where(here, now[:, None], memory)
                keys = torch.where(here, self.key(now)[:, None], keys)
            first, second = (now, found) if cell is None else (now + found, cell)
            outputs.append(torch.cat([now + found, found], 1))
        return torch.stack(outputs), (first, second, memory, steps + len(inputs))

    def _start(self, inputs: Tensor, state: State | None) -> State:
        lanes, hidden = inputs.shape[1], self.core.hidden_size
        like = self.key.weight
        sizes = [(lanes, hidden), (lanes, hidden), (lanes, self.memory, hidden), (lanes,)]
        if state is None:
            first, second, memory = (like.new_zeros(size) for size in sizes[:-1])
            return first, second, memory, torch.zeros(lanes, dtype=torch.int64, device=like.device)
        came = [tuple(leaf.shape) for leaf in state]
        if came != sizes:
            raise ShapeError(
                f"a state of tensors of shapes {sizes} was expected, but {came} came: it belongs to other lanes, or to "
                "another model",
                fix="state=None at the start, and then what the model returned for the same lanes",
            )
        return state

    def _schedule(self, steps: Tensor, length: int) -> tuple[Tensor, list[bool]]:
        """Return the slot that each lane stores in at each step, (T, B), -1 for none, and whether any lane does."""
        done = steps + torch.arange(1, length + 1, device=steps.device)[:, None]
        slot = (done.div(self.k_att, rounding_mode="floor") - 1) % self.memory
        places = torch.where(done % self.k_att == 0, slot, -1)
        return places, (places >= 0).any(1).tolist()

    def _step(self, entered: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ĥ, and c of an LSTM."""
        core = self.core
        weights, biases = core.all_weights[0][:2], core.all_weights[0][2:]  # without biases there are two
        if isinstance(core, nn.LSTM):
            return torch.lstm_cell(entered, [first, second], *weights, *biases)
        r_in, z_in, n_in = linear(entered, weights[0], *biases[:1]).chunk(3, 1)
        r_again, z_again, n_again = linear(first + second, weights[1], *biases[1:]).chunk(3, 1)
        z = torch.sigmoid(z_in + z_again)
        candidate = torch.tanh(n_in + torch.sigmoid(r_in + r_again) * n_again)
        return (1 - z) * candidate + z * first, None

    def _looked_up(self, now: Tensor, memory: Tensor, keys: Tensor, filled: Tensor) -> Tensor:
        """Return the weighted sum of the best memories, zero where a lane has none. Shape (B, H)."""
        scores = self.score(torch.tanh(self.query(now)[:, None] + keys)).squeeze(-1)
        lowest = torch.finfo(scores.dtype).min  # not -inf, whose softmax would be NaN in a lane with nothing stored
        best, chosen = scores.masked_fill(~filled, lowest).topk(self.k_top, dim=1)
        # what was never written is not looked up: with a weight, its zeros would change no value, but get a gradient
        weights = torch.softmax(best, 1).masked_fill(~filled.gather(1, chosen), 0.0)
        values = memory.gather(1, chosen[..., None].expand(-1, -1, memory.shape[-1]))
        return (weights[..., None] * values).sum(1)


def _check_core(core: nn.Module) -> None:
    if not isinstance(core, nn.LSTM | nn.GRU):
        raise CapabilityError(f"an nn.LSTM or nn.GRU was expected, but a {type(core).__name__} came", fix=_FIX)
    wrong = {
        "num_layers": core.num_layers != 1,
        "bidirectional": core.bidirectional,
        "batch_first": core.batch_first,
        "proj_size": core.proj_size != 0,
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise CapabilityError(
            f"a core of one layer, one direction, time first and without a projection was expected, but one with "
            f"{name}={getattr(core, name)} came: it is run step by step, its output being its state",
            fix=_FIX,
        )
