"""Many copies of a model, each with weights of its own, run over the same steps.

Letters: T time, B lanes, M pairs, N = 2 M particles, P parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from tbptt.errors import TbpttError
from tbptt.estimators.base import by_owner
from tbptt.loss import StepLoss
from tbptt.model import with_parameters
from tbptt.side_state import SideState, preserved, replayed
from tbptt.tree import LaneDims, Tree, replace_tensors, tensors
from tbptt.unroll import unroll
from tbptt.weights import UsesOf, in_place
from tbptt.window import Window

__all__ = ["Noise", "Particles", "States", "draw_noise"]

Noise: TypeAlias = dict[str, Tensor]
"""By how much the first of each pair is off the weights, and the second the other way. Leaves (M, ...)."""

States: TypeAlias = tuple[Tree, ...]
"""Of all particles: one tree of leaves (N, ...) where they run side by side, N trees where one after another."""


_PURPOSE = 0x45535F4E4F495345
"""Keeps the noise apart from all else that is drawn from a seed and a number, such as the data of a stream."""


def draw_noise(parameters: Mapping[str, Tensor], pairs: int, sigma: float, seed: int, number: int) -> Noise:
    """Return the noise of a number, for weights of these shapes: the same on every machine and device.

    Args:
        parameters: by name; complex ones get noise of that deviation in both parts.
        pairs: how many draws, M.
        sigma: their standard deviation.
        seed: of all noise of a run.
        number: which of them.

    Cost: M P numbers drawn on the CPU, about 20 ns each.
    """
    generator = np.random.default_rng((seed, number, _PURPOSE))
    found: Noise = {}
    for name, value in parameters.items():
        parts = (2,) if value.is_complex() else ()
        drawn = torch.from_numpy(generator.standard_normal((pairs, *value.shape, *parts)) * sigma)
        drawn = torch.view_as_complex(drawn) if parts else drawn
        # half precision would round away most of what is added up
        dtype = torch.promote_types(value.dtype, torch.float32)
        found[name] = drawn.to(dtype=dtype).to(value.device)
    return found


@dataclass(frozen=True, eq=False)
class Particles:
    """The particles of a model: all the plus ones, then all the minus ones.

    Nothing of their runs remains in the model or in the random generators. All of them draw the random numbers that
    the model itself would draw next: were dropout not the same for the two of a pair, it would be most of their
    difference.

    Args:
        model: the model.
        loss: of its outputs.
        parameters: the weights that are perturbed, the model's and the loss's own, by the names of
            `Estimate.all_gradients`.
        dims: the lane dimension of each tensor of the model's state.
    """

    model: nn.Module
    loss: StepLoss
    parameters: dict[str, Tensor]
    dims: LaneDims | None

    def run(
        self, noise: Noise, window: Window, own: States | None, common: Tree | None, *, vectorized: bool
    ) -> tuple[Tensor, States]:
        """Run all particles over a window.

        Args:
            noise: of the pairs.
            window: the steps.
            own: their states before; None: they start together.
            common: the state that they start from then; None for the model's initial state.
            vectorized: side by side, or one after another.

        Returns:
            The losses by step, zero where a target does not count, shape (N, T, B); and the states after.
        """
        side = SideState.of(self.model, device=window.mask.device)
        if not vectorized:
            return self._one_by_one(noise, window, own, common, side)
        with replayed(side, self.model, device=window.mask.device):
            return self._side_by_side(noise, window, own, common)

    def obstacle(self, noise: Noise, window: Window, common: Tree | None) -> str:
        """Return why the particles cannot be run side by side, found out with one pair; empty if they can.

        What torch would only do particle by particle, inside, counts as an obstacle; and so do weights that are reached
        in another way than as attributes, such as by a list or a closure: side by side these would not be perturbed.

        Raises:
            TbpttError: the model or the loss does not do what is asked of it, side by side or not.
        """
        pair = {name: each[:1] for name, each in noise.items()}
        used = UsesOf(self.parameters)
        with preserved(self.model, device=window.mask.device), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop")
            try:
                _, own = self._side_by_side(pair, window, None, common, used)
                self._side_by_side(pair, window, own, common, used)  # a model may do other things once it has a state
            except (TbpttError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever torch, the model or the loss says to being vectorised
                return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if used.names:
            return (
                f"{', '.join(sorted(used.names))} would not be perturbed, as the model reaches it not as an attribute"
            )
        return ""

    def _side_by_side(
        self,
        noise: Noise,
        window: Window,
        own: States | None,
        common: Tree | None,
        around: AbstractContextManager[object] | None = None,
    ) -> tuple[Tensor, States]:
        shape_of: list[Tree] = []  # the state's containers, and whatever in them is no tensor

        def one(weights: dict[str, Tensor], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            begin = common if own is None else replace_tensors(own[0], leaves)
            of_model, of_loss = by_owner(weights)

            def run() -> tuple[Tensor, Tree]:
                return self._one(window, begin)

            def with_model() -> tuple[Tensor, Tree]:
                return with_parameters(self.model, of_model, run)

            loss = self.loss.module
            losses, end = with_parameters(loss, of_loss, with_model) if loss is not None and of_loss else with_model()
            shape_of[:] = [end]
            return losses, tensors(end)

        weights = {
            name: torch.cat([value + noise[name], value - noise[name]]).to(value.dtype)
            for name, value in self.parameters.items()
        }
        before = [] if own is None else tensors(own[0])
        with around or nullcontext():
            losses, after = torch.func.vmap(one, randomness="same")(weights, before)
        return losses, (replace_tensors(shape_of[0], after),)

    def _one_by_one(
        self, noise: Noise, window: Window, own: States | None, common: Tree | None, side: SideState
    ) -> tuple[Tensor, States]:
        pairs = len(next(iter(noise.values())))
        losses: list[Tensor] = []
        after: list[Tree] = []
        for index in range(2 * pairs):
            weights = {
                name: (value + noise[name][index] if index < pairs else value - noise[name][index - pairs])
                for name, value in self.parameters.items()
            }
            weights = {name: value.to(self.parameters[name].dtype) for name, value in weights.items()}
            with (
                replayed(side, self.model, device=window.mask.device),
                in_place(self.parameters.values(), weights.values()),
            ):
                found, end = self._one(window, common if own is None else own[index])
            losses.append(found)
            after.append(end)
        return torch.stack(losses), tuple(after)

    def _one(self, window: Window, begin: Tree | None) -> tuple[Tensor, Tree]:
        """Run one particle, its weights in place; return its losses, (T, B), and its state."""
        outputs, end = unroll(self.model, window, begin, self.dims)
        return self.loss.by_step(outputs, window)[0], end
