"""An LSTM whose units have a memory each, and no other unit's.

Letters: T time, B lanes, M inputs, N units, L layers.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tbptt.errors import ConfigError
from tbptt.models.arguments import check_dropout, check_numbers, check_sizes, states_of_layers
from tbptt.recurrence import Recurrence

__all__ = ["ELSTM"]

_DRIVING = ("F", "Z", "w_f", "w_z", "b_f", "b_z")


@final
class ELSTM(nn.Module):
    """Run the element-wise LSTM: gated, and made for learning online.

    Each unit remembers by itself, and the units meet in the output gate and in the layer above. So the influence of
    the parameters on the state has as many numbers as the parameters, and an online method can carry it exactly, over
    any number of steps. Of one layer:

        f = σ(F x + w_f ⊙ c + b_f),  z = tanh(Z x + w_z ⊙ c + b_z),  c' = f ⊙ c + (1 - f) ⊙ z,
        o = σ(O x + W_o c' + b_o),   output = o ⊙ c'

    The state is a tuple of one tensor c a layer, (B, N). A layer above reads what the one below puts out.

    Args:
        inputs: the numbers at each step, M.
        hidden: the units of each layer, N; as many are put out.
        layers: one above the other, L.
        dropout: the probability that a number is dropped between two layers, in training; from 0 to below 1.

    Raises:
        ConfigError: sizes that cannot be meant, or dropout with nothing between layers.

    Exactness: `recurrences` declares every layer, but across layers an online method that carries the influence layer
        by layer is exact only in the last: the lower ones, and an embedding before them, reach the state also through
        the layers above. With one layer all parameters are exact.

    Cost: a step at a time; what does not depend on the state is computed for the whole window at once.

    Reference: Irie, Gopalakrishnan & Schmidhuber (2023), "Exploring the promise and limits of real-time recurrent
        learning", arXiv:2305.19044. The equations are theirs; fresh weights are not: the matrices are as torch's
        linear layers start, w_f and w_z normal with deviation 0.1, and b_f = 1, to remember at first.

    Example:
        >>> model = ELSTM(3, 5)
        >>> outputs, state = model(torch.zeros(7, 2, 3))
        >>> outputs.shape, [leaf.shape for leaf in state]
        (torch.Size([7, 2, 5]), [torch.Size([2, 5])])
        >>> model.recurrences()[0].parameters[:2]
        ('layers.0.F', 'layers.0.Z')
    """

    def __init__(self, inputs: int, hidden: int, layers: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_sizes(inputs=inputs, hidden=hidden, layers=layers)
        check_dropout(dropout)
        if dropout and layers == 1:
            raise ConfigError(
                f"more than one layer was expected with dropout, which acts between them, but {dropout=} came with "
                "one: it would have no effect",
                fix="layers=2, or dropout=0.0",
            )
        self.inputs = inputs
        self.hidden = hidden
        self.layers = nn.ModuleList([_Layer(hidden if layer else inputs, hidden) for layer in range(layers)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run over a window.

        Args:
            inputs: shape (T, B, M).
            state: what the last call returned; None: zeros.

        Returns:
            The outputs, (T, B, N), and the state, a tuple of L tensors (B, N).

        Raises:
            ShapeError: inputs of another shape, or a state of other lanes.
        """
        check_numbers(inputs, self.inputs)
        first = self.layers[0]
        assert isinstance(first, _Layer)
        size = (inputs.shape[1], self.hidden)
        before = states_of_layers(state, len(self.layers), size, first.w_f.dtype, inputs)
        after: list[Tensor] = []
        outputs = inputs
        for number, (layer, own) in enumerate(zip(self.layers, before, strict=True)):
            outputs, own = layer(self.dropout(outputs) if number else outputs, own)
            after.append(own)
        return outputs, tuple(after)

    def recurrences(self) -> tuple[Recurrence, ...]:
        """Return the recurrence of each layer, which is element-wise."""
        return tuple(
            Recurrence(layer, tuple(f"layers.{layer}.{name}" for name in _DRIVING)) for layer in range(len(self.layers))
        )


class _Layer(nn.Module):
    """One layer; `F`, `Z`, `O` and the others are the equations' letters."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.F, self.Z, self.O = (nn.Parameter(_uniform(units, inputs)) for _ in range(3))
        self.W_o = nn.Parameter(_uniform(units, units))
        self.w_f, self.w_z = (nn.Parameter(0.1 * torch.randn(units)) for _ in range(2))
        self.b_f = nn.Parameter(torch.ones(units))
        self.b_z, self.b_o = (nn.Parameter(torch.zeros(units)) for _ in range(2))

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, (T, B, N), and the state after the last step."""
        driven = zip(linear(inputs, self.F, self.b_f).unbind(), linear(inputs, self.Z, self.b_z).unbind(), strict=True)
        states: list[Tensor] = []
        for forget, candidate in driven:
            f = torch.sigmoid(torch.addcmul(forget, self.w_f, state))
            z = torch.tanh(torch.addcmul(candidate, self.w_z, state))
            state = torch.lerp(z, state, f)  # f ⊙ c + (1 - f) ⊙ z, in one operation
            states.append(state)
        cells = torch.stack(states)
        gate = torch.sigmoid(linear(inputs, self.O, self.b_o) + linear(cells, self.W_o))
        return gate * cells, state


def _uniform(rows: int, columns: int) -> Tensor:
    """Return weights as torch's layers start with: even, within 1 / sqrt(columns)."""
    return (2.0 * torch.rand(rows, columns) - 1.0) * columns**-0.5
