"""The linear recurrent unit: a state-space layer that takes a window in one pass, and a step as fast as an RNN.

Letters: T time, B lanes, M inputs, N units, O outputs, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from tbptt.errors import ConfigError
from tbptt.models.arguments import check_dropout, check_numbers, check_sizes, states_of_layers
from tbptt.models.linear_scan import Scan, linear_scan
from tbptt.recurrence import Recurrence

__all__ = ["LRU"]

_DRIVING = ("nu_log", "theta_log", "gamma_log", "B_real", "B_imag")


@final
class LRU(nn.Module):
    """Run a linear recurrence of complex numbers, each unit with a decay and a frequency of its own.

        h' = λ ⊙ h + γ ⊙ (B x),  y = Re(C h') + D x,  λ = exp(-exp(ν) + i exp(θ))

    Units that remember long from the start make it learn what lies far back, and |λ| < 1 whatever is learned. The
    recurrence is element-wise, so that an online method can carry the parameters' influence on the state exactly. The
    state is a tuple of one complex tensor h a layer, (B, N). All parameters are real: B and C have two parts.

    One layer is the equations above and nothing else: linear in its inputs. `glu=True` passes what it gives through
    GELU and a gated linear unit, GLU(y) = (W_1 y + b_1) ⊙ σ(W_2 y + b_2). Each further layer is the published block,
    normalised first, x + dropout(GLU(dropout(GELU(LRU(LayerNorm(x)))))), on what the one below gives.

    Args:
        inputs: the numbers at each step, M.
        hidden: the units of each layer, N; a unit is one complex number.
        outputs: the numbers given out at each step, and from layer to layer, O; None: as many as inputs.
        layers: one above the other, L.
        glu: whether the first layer, too, ends with GELU and the gated linear unit.
        dropout: the probability that a number is dropped, in training: after GELU and after the gated linear unit.
        r_min: the smallest |λ| at first; at least 0.
        r_max: the largest |λ| at first; below 1. |λ|² is even between, so that λ is even on the ring. With the
            defaults the units remember over 10 to 1000 steps at first; that is ours, as the published ones are set
            for each task.
        max_phase: the largest phase of λ at first, from 0 to 2π; a small one for slow signals.
        scan: how the recurrence runs over a window: "parallel", "sequential", or "auto", the faster one on a CPU by
            measurement (see `benchmarks/speed/scan.py`). Nothing but rounding changes.

    Raises:
        ConfigError: sizes, a ring or a scan that cannot be meant, or dropout with nothing to act on.

    Exactness: `recurrences` declares every layer, but across layers an online method that carries the influence layer
        by layer is exact only in the last: the lower ones, the norms between, and an embedding before them, reach the
        state also through the layers above. With one layer all parameters are exact.

    Cost: T steps of O(B N), in T calls, or in parallel in about 16 log_16(T) calls with twice the arithmetic.

    Reference: Orvieto et al. (2023), "Resurrecting recurrent neural networks for long sequences", arXiv:2303.06349,
        section 3 and appendix A; online: Zucchet et al. (2023), arXiv:2305.15947. B and C start as in the code of
        the latter's authors. Deviations: the first layer reads the inputs itself, in place of a linear encoder before
        it, which an online method would not be exact for; D is a matrix, as there may be other outputs than inputs;
        layer normalisation, as that of a batch would mix lanes and steps.

    Example:
        >>> model = LRU(3, 8, outputs=2)
        >>> outputs, state = model(torch.zeros(7, 4, 3))
        >>> outputs.shape, [(leaf.shape, leaf.dtype) for leaf in state]
        (torch.Size([7, 4, 2]), [(torch.Size([4, 8]), torch.complex64)])
        >>> model.recurrences()[0].parameters[0]
        'layers.0.lru.nu_log'
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int | None = None,
        *,
        layers: int = 1,
        glu: bool = False,
        dropout: float = 0.0,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        scan: Scan = "auto",
    ) -> None:
        super().__init__()
        width = inputs if outputs is None else outputs
        check_sizes(inputs=inputs, hidden=hidden, outputs=width, layers=layers)
        _check(layers, glu, dropout, scan)
        ring = _Ring(r_min, r_max, max_phase)
        self.inputs = inputs
        self.hidden = hidden
        self.layers = nn.ModuleList()
        for layer in range(layers):
            recurrence = _Recurrent(width if layer else inputs, hidden, width, ring, scan)
            self.layers.append(_Block(recurrence, width, residual=layer > 0, glu=glu or layer > 0, dropout=dropout))

    def forward(self, inputs: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run over a window.

        Args:
            inputs: shape (T, B, M).
            state: what the last call returned; None: zeros.

        Returns:
            The outputs, (T, B, O), and the state, a tuple of L complex tensors (B, N).

        Raises:
            ShapeError: inputs of another shape, or a state of other lanes.
        """
        check_numbers(inputs, self.inputs)
        first = self.layers[0]
        assert isinstance(first, _Block)
        dtype, size = _single(first.lru.nu_log).dtype.to_complex(), (inputs.shape[1], self.hidden)
        before = states_of_layers(state, len(self.layers), size, dtype, inputs)
        after: list[Tensor] = []
        outputs = inputs
        for layer, own in zip(self.layers, before, strict=True):
            outputs, own = layer(outputs, own)
            after.append(own)
        return outputs, tuple(after)

    def recurrences(self) -> tuple[Recurrence, ...]:
        """Return the recurrence of each layer, which is element-wise."""
        return tuple(
            Recurrence(layer, tuple(f"layers.{layer}.lru.{name}" for name in _DRIVING))
            for layer in range(len(self.layers))
        )


@dataclass(frozen=True)
class _Ring:
    """Where the λ of a fresh layer lie: even on a ring of the complex plane, or a part of it."""

    r_min: float
    r_max: float
    max_phase: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.r_min <= self.r_max < 1.0 or self.r_max == 0.0:
            raise ConfigError(
                f"0 <= r_min <= r_max < 1 was expected, with r_max above 0, but r_min={self.r_min} and "
                f"r_max={self.r_max} came: a unit would grow without end, or remember nothing",
                fix="r_min=0.9, r_max=0.999",
            )
        if not 0.0 < self.max_phase <= 2 * math.pi:
            raise ConfigError(
                f"a max_phase above 0 and up to 2π was expected, but {self.max_phase} came: phases repeat beyond",
                fix="max_phase=math.pi / 10",
            )

    def draw(self, units: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ν, θ and log γ, in float64: near 1 few digits of |λ| are left for γ = sqrt(1 - |λ|²)."""
        place, phase = 1.0 - torch.rand(2, units, dtype=torch.float64)  # above 0: the logarithm of 0 is infinite
        squared = self.r_min**2 + place * (self.r_max**2 - self.r_min**2)
        nu = (-0.5 * squared.log()).log()
        return nu, (self.max_phase * phase).log(), 0.5 * (-squared).log1p()


class _Recurrent(nn.Module):
    """The recurrence and its read-out; `B`, `C`, `D` and the others are the equations' letters."""

    def __init__(self, inputs: int, units: int, outputs: int, ring: _Ring, scan: Scan) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(each.to(dtype)) for each in ring.draw(units))
        self.B_real, self.B_imag = (nn.Parameter(torch.randn(units, inputs) * (2 * inputs) ** -0.5) for _ in range(2))
        self.C_real, self.C_imag = (nn.Parameter(torch.randn(outputs, units) * units**-0.5) for _ in range(2))
        self.D = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.scan: Scan = scan

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, (T, B, O), and the state after the last step."""
        log_decay = torch.complex(-_single(self.nu_log).exp(), _single(self.theta_log).exp())
        states = linear_scan(self._driven(inputs), log_decay, state, self.scan)
        # Re(C h) as one real product: half the arithmetic of a complex one, whose imaginary part nobody wants
        shown = torch.stack([self.C_real, -self.C_imag], 2).flatten(1)
        read = torch.view_as_real(states).flatten(-2).to(shown.dtype)
        return linear(read, shown) + linear(inputs, self.D), states[-1]

    def _driven(self, inputs: Tensor) -> Tensor:
        """Return γ ⊙ (B x), (T, B, N): of the two ways the one that scales fewer numbers by γ."""
        gamma = _single(self.gamma_log).exp()
        if inputs.shape[0] * inputs.shape[1] < inputs.shape[2]:
            return torch.complex(gamma * linear(inputs, self.B_real), gamma * linear(inputs, self.B_imag))
        weight = gamma[:, None, None] * torch.stack([self.B_real, self.B_imag], 1)
        parts = linear(inputs, weight.flatten(0, 1).to(self.B_real.dtype)).unflatten(-1, (-1, 2))
        return torch.view_as_complex(parts.to(gamma.dtype))  # of autocast's narrower ones there are no complex ones


def _single(value: Tensor) -> Tensor:
    """Return a tensor in single precision at least: torch has no complex bfloat16, and hardly any complex half."""
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


class _Block(nn.Module):
    """A recurrence, with what is around it in a stack."""

    def __init__(self, recurrent: _Recurrent, width: int, *, residual: bool, glu: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if residual else None
        self.lru = recurrent
        self.glu = nn.Linear(width, 2 * width) if glu else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs, (T, B, O), and the state after the last step."""
        outputs, state = self.lru(inputs if self.norm is None else self.norm(inputs), state)
        if self.glu is not None:
            value, gate = self.glu(self.dropout(gelu(outputs))).chunk(2, -1)
            outputs = self.dropout(value * torch.sigmoid(gate))
        return (outputs if self.norm is None else inputs + outputs), state


def _check(layers: int, glu: bool, dropout: float, scan: str) -> None:
    check_dropout(dropout)
    if dropout and layers == 1 and not glu:
        raise ConfigError(
            f"glu=True or more than one layer was expected with dropout, which acts around the gated linear unit, "
            f"but {dropout=} came with one bare layer: it would have no effect",
            fix="glu=True, or dropout=0.0",
        )
    if scan not in get_args(Scan):
        raise ConfigError(f"scan 'auto', 'parallel' or 'sequential' was expected, but {scan!r} came", fix='scan="auto"')
