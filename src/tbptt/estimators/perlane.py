"""A model with weights of its own in each lane, so that gradients come lane by lane.

Letters: T time, B lanes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tbptt.errors import CapabilityError, TbpttError
from tbptt.estimators.rows import known_dims
from tbptt.model import check_outputs, initial_state, split_result, with_parameters
from tbptt.side_state import preserved
from tbptt.tree import LaneDims, Tree, detach, differentiable, replace_tensors, tensors, time_slice, tree_map

__all__ = ["PerLane", "check_single_steps"]


class PerLane(nn.Module):
    """Runs a model so that each lane has a copy of the weights, and the gradient of a copy is that of its lane.

    The copies share their memory; nothing is computed twice. Side by side where `torch.func.vmap` can run the model,
    else one lane after another. Attention is computed as it is written: torch's faster kernels have no second
    derivative, and not all of them a rule for being vectorised.

    Args:
        model: the model.
        parameters: those that are to have copies, by name.
        lanes: B.
        dims: the lane dimension of each tensor of the state; None where they were not found.
        vectorized: side by side, or one after another; None: to be found out at the first run.

    Attributes:
        weights: the copies, leaves of the graph, by name. Each (B, ...); of one lane the parameters themselves.

    Raises:
        CapabilityError: several lanes, and it is not known where they are in the state.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        lanes: int,
        dims: LaneDims | None,
        vectorized: bool | None,
    ) -> None:
        super().__init__()
        self.held = [model]  # in a list: its parameters are not this module's
        self.lanes, self.dims = lanes, known_dims(dims) if lanes > 1 else (dims or ())
        self.vectorized = False if lanes == 1 else vectorized
        self.weights = dict(parameters)
        if lanes > 1:
            self.weights = {
                name: value.detach().expand(lanes, *value.shape).requires_grad_() for name, value in parameters.items()
            }

    def initial_state(self, lanes: int) -> Tree | None:
        """Return the model's own, which may be made of its weights."""
        model = self.held[0]
        if self.lanes == 1 or initial_state(model, 1) is None:
            return initial_state(model, lanes)
        return self._joined_states([self._with(lane, lambda: initial_state(model, 1)) for lane in range(lanes)])

    def forward(self, inputs: Tree, state: Tree | None = None) -> tuple[Tree, Tree]:
        """Run the model over inputs (T, B, ...)."""
        with sdpa_kernel(SDPBackend.MATH):
            if self.lanes == 1:
                return split_result(self.held[0], self.held[0](inputs, state))
            if self.vectorized is None:
                self.vectorized = not self._obstacle(inputs, state)
            return self._side_by_side(inputs, state) if self.vectorized else self._one_by_one(inputs, state)

    def _with(self, lane: int, function: Callable[[], Any]) -> Any:
        return with_parameters(self.held[0], {name: each[lane] for name, each in self.weights.items()}, function)

    def _one_by_one(self, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        model, found = self.held[0], list[tuple[Tree, Tree]]()
        for lane in range(self.lanes):
            mine = tree_map(lambda leaf, lane=lane: leaf[:, lane : lane + 1], inputs)
            before = None if state is None else self._state_of(lane, state)
            found.append(self._with(lane, lambda mine=mine, before=before: split_result(model, model(mine, before))))
            check_outputs(model, found[-1][0], tensors(mine)[0].shape[0], 1)
        outputs = [tensors(each) for each, _ in found]
        joined = [torch.cat(parts, 1) for parts in zip(*outputs, strict=True)]
        return replace_tensors(found[0][0], joined), self._joined_states([end for _, end in found])

    def _state_of(self, lane: int, state: Tree) -> Tree:
        chosen = [leaf.narrow(dim or 0, lane, 1) for leaf, dim in zip(tensors(state), self.dims, strict=True)]
        return replace_tensors(state, chosen)

    def _joined_states(self, states: list[Tree]) -> Tree:
        leaves = zip(*[tensors(each) for each in states], strict=True)
        return replace_tensors(
            states[0], [torch.cat(each, dim or 0) for each, dim in zip(leaves, self.dims, strict=True)]
        )

    def _side_by_side(self, inputs: Tree, state: Tree | None) -> tuple[Tree, Tree]:
        model, shapes = self.held[0], list[tuple[Tree, Tree]]()  # the containers, and what in them is no tensor
        dims = [dim or 0 for dim in self.dims]

        def one(weights: dict[str, Tensor], given: list[Tensor], before: list[Tensor]) -> tuple[list[Tensor], ...]:
            own = replace_tensors(inputs, [each.unsqueeze(1) for each in given])
            start = None
            if state is not None:
                start = replace_tensors(state, [each.unsqueeze(dim) for each, dim in zip(before, dims, strict=True)])
            outputs, end = with_parameters(model, weights, lambda: split_result(model, model(own, start)))
            shapes[:] = [(outputs, end)]
            ends = [each.squeeze(dim) for each, dim in zip(tensors(end), dims, strict=True)]
            return [each.squeeze(1) for each in tensors(outputs)], ends

        before = [] if state is None else tensors(state)
        sides: Any = (1, dims)  # a tree of dimensions, as torch takes it
        run = torch.func.vmap(one, in_dims=(0, 1, dims[: len(before)]), out_dims=sides, randomness="different")
        outputs, ends = run(self.weights, tensors(inputs), before)
        return replace_tensors(shapes[0][0], outputs), replace_tensors(shapes[0][1], ends)

    def _obstacle(self, inputs: Tree, state: Tree | None) -> str:
        """Return why the lanes cannot be run side by side, found out by trying; empty if they can."""
        device = tensors(inputs)[0].device
        with preserved(self.held[0], device=device), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*performance drop")
            try:
                with torch.enable_grad():
                    _, end = self._side_by_side(inputs, state)
                    outputs, end = self._side_by_side(inputs, detach(end))  # a model may do other things with a state
                    roots = [each for each in differentiable([outputs, end]) if each.requires_grad]
                    if roots:  # what is computed anew on the way back, as by checkpointing, knows of no lanes
                        ones = [torch.ones_like(each) for each in roots]
                        torch.autograd.grad(roots, list(self.weights.values()), ones, allow_unused=True)
            except (TbpttError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever torch or the model says to being vectorised
                return f"{type(error).__name__}: {error}"
        return ""


def check_single_steps(model: nn.Module, inputs: Tree) -> None:
    """Refuse a model that cannot be run step by step. Nothing remains of trying it.

    Args:
        model: the model.
        inputs: an example, leaves (T, B, ...).

    Raises:
        CapabilityError: it takes longer windows only.
    """
    first = tensors(inputs)[0]
    one = time_slice(inputs, 0, 1)
    with preserved(model, device=first.device), torch.no_grad():
        try:
            state = initial_state(model, first.shape[1])
            for _ in range(2):
                _, state = split_result(model, model(one, state))
        except CapabilityError:
            raise
        except Exception as error:  # whatever a model says to a length that it does not take
            split_result(model, model(inputs, initial_state(model, first.shape[1])))  # if to all, it says it again
            raise CapabilityError(
                "a model that goes on after each step was expected, as influence is brought on step by step, but a "
                f"{type(model).__name__} takes longer windows only: {str(error).partition(chr(10))[0]}",
                fix="TBPTT(k1, k2); or RTRL(k1) or UORO(k1), which bring it on window by window",
            ) from error
