"""A linear system whose short look-backs point the wrong way.

Letters: T time, B lanes, N units.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from tbptt.errors import ConfigError, ShapeError

__all__ = ["InfluenceBalancingModel"]


@final
class InfluenceBalancingModel(nn.Module):
    """Run s_{t+1} = A s_t + θ v and show the first unit: the sharpest test of a gradient there is.

    A has 0.5 on and just above its diagonal; v is +1 for the first `positive` units and -1 for the others.
    The influence of θ on the first unit is the sum over lags k of (A^k v)_1: the near lags are positive, the
    far ones negative and outweigh them (-6 in all, for the default sizes). With the loss ½(s - 1)² every
    look-back k2 below 41 has the wrong sign at k1 = 1, and θ runs away from its optimum, -1/6. There is one
    parameter, θ, and everything about it is known in closed form: see `truncated_influence`.

    Not for learning anything: for finding out whether a method does what it says. Use float64.

    Args:
        n: the number of units, N.
        positive: the units that θ pushes up; from 1 to n.
        theta: where θ starts.

    Raises:
        ConfigError: sizes that cannot be meant.

    Reference: Tallec & Ollivier (2017), "Unbiased online recurrent optimization", arXiv:1702.05043,
        section 4.1; sizes as in Vicol, Metz & Sohl-Dickstein (2021).

    Example:
        >>> model = InfluenceBalancingModel().double()
        >>> outputs, state = model(torch.zeros(200, 1, 1))
        >>> round(outputs[-1, 0].item(), 6)  # settled at -6 θ
        -3.0
    """

    matrix: Tensor
    direction: Tensor

    def __init__(self, n: int = 23, positive: int = 10, theta: float = 0.5) -> None:
        super().__init__()
        if n < 1 or not 1 <= positive <= n:
            raise ConfigError(
                f"1 <= positive <= n was expected, but n={n} and positive={positive} came: "
                "the influences would not balance",
                fix="InfluenceBalancingModel(n=23, positive=10)",
            )
        self.theta = nn.Parameter(torch.tensor(float(theta)))
        self.register_buffer("matrix", 0.5 * (torch.eye(n) + torch.diag(torch.ones(n - 1), 1)))
        self.register_buffer("direction", torch.where(torch.arange(n) < positive, 1.0, -1.0))

    def initial_state(self, lanes: int) -> Tensor:
        """Return ones. Shape (B, N)."""
        return torch.ones(lanes, len(self.direction), dtype=self.theta.dtype, device=self.theta.device)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run as many steps as `inputs` has; nothing of what it holds is looked at.

        Args:
            inputs: shape (T, B, 1).
            state: shape (B, N); None: ones.

        Returns:
            The first unit after each step, (T, B), and the state after the last.

        Raises:
            ShapeError: the inputs have no time and lanes.
        """
        if inputs.ndim < 2:
            raise ShapeError(
                f"inputs of shape (T, B, 1) were expected, but {tuple(inputs.shape)} came",
                fix="InfluenceBalancing(lanes=1).read(64).inputs",
            )
        if state is None:
            state = self.initial_state(inputs.shape[1])
        shown: list[Tensor] = []
        for _ in range(len(inputs)):
            state = state @ self.matrix.T + self.theta * self.direction
            shown.append(state[:, 0])
        return torch.stack(shown), state

    def truncated_influence(self, lookback: int) -> Tensor:
        """Return the influence of θ on the first unit over `lookback` steps, S_K in closed form; 0-dim.

        The gradient of ½(s - 1)² that reaches that far back is (s - 1) times it. For the default
        sizes it is positive up to K = 40 and negative from 41 on.
        """
        total, power = torch.zeros_like(self.theta), self.direction
        for _ in range(lookback):
            total, power = total + power[0], self.matrix @ power
        return total.detach()
