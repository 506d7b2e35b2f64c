"""A stretch of steps whose gradients come lane by lane.

Letters: B lanes, S numbers of a lane's state, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.gradients import Gradients
from tbptt.estimators.rows import cotangent_of, rows_of
from tbptt.estimators.segments import Segment
from tbptt.tree import LaneDims, Tree, as_real, differentiable, tensors

__all__ = ["LaneSegment", "check_dense", "check_embeddings"]


@dataclass(frozen=True, eq=False)
class LaneSegment:
    """A stretch of steps with its graph, whose gradients come lane by lane.

    Args:
        segment: the stretch, its start tracked unless it is the model's initial state.
        names: of the parameters.
        weights: each lane's copy of them; of one lane they themselves.
        dims: the lane dimensions of the state.
        one: 1, in the type of the losses.
        parameters: the weights that all lanes share, of the model.
        of_loss: the loss's own parameters, by the names of `Estimate.all_gradients`.
        shared: the same steps run with these; None where a method does not ask for it.
        begun: the lanes that began at its first step, (B,), bool, and
        initial: their initial state as a stretch of no steps, if the start is held still there, too.
    """

    segment: Segment
    names: Sequence[str]
    weights: Sequence[Tensor]
    dims: LaneDims | None
    one: Tensor
    parameters: Sequence[Tensor] = ()
    of_loss: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    shared: Segment | None = None
    begun: Tensor | None = None
    initial: LaneSegment | None = None

    @property
    def end(self) -> Tensor:
        """The numbers of the state after. Shape (B, S)."""
        return self.rows(self.segment.end)

    @property
    def lanes(self) -> int:
        """The number of lanes, B."""
        return tensors(self.segment.outputs)[0].shape[1]

    @property
    def direct(self) -> dict[str, Tensor]:
        """What a loss reaches besides the copies: the loss's own parameters, and the weights that all lanes share.

        The loss is run with these, as where it is a part of the model or shares a weight with it.
        """
        shared = {} if self.lanes == 1 else dict(zip(self.names, self.parameters, strict=True))
        return {**shared, **self.of_loss}

    def rows(self, state: Tree, gradient: Gradients | None = None) -> Tensor:
        """Return a state, or its gradient, as rows. Shape (B, S)."""
        return rows_of(state, self.dims, gradient)

    def pulled(self, seeds: Tensor, *, weights: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
        """Pull a gradient of the end state back, each lane alone.

        Args:
            seeds: the gradient of each number of the end state. Shape (B, S).
            weights: whether to go on to the weights.

        Returns:
            The gradients of the weights that they depend on, by name, (B, p) each; and of the start, (B, S), None for
            the model's initial state.

        Raises:
            CapabilityError: the state depends on weights that have no copies, as they are not reached as attributes.
        """
        silent = replace(self.segment, loss=None)
        chosen, direct = list(self.weights) if weights else [], self.direct
        tracked = self.segment.start is not None
        arriving = cotangent_of(seeds, self.segment.end, self.dims)
        try:
            found, before = silent.vjp([*chosen, *direct.values()], self.one, arriving, start=tracked, keep=True)
        except NotImplementedError as error:  # a lane's copy is a part of one tensor, and torch has no sparse parts
            raise _sparse("a weight") if "Sparse" in str(error) else error from error
        missed = [name for name, each in zip(direct, found[len(chosen) :], strict=True) if each is not None]
        if missed:
            raise _not_copied(missed)
        check_dense(self.names, found[: len(chosen)])
        lanes = seeds.shape[0]
        by_name = {
            name: each.detach().reshape(lanes, -1)
            for name, each in zip(self.names, found, strict=False)
            if each is not None
        }
        return by_name, self.rows(self.segment.start, before) if tracked else None

    def pushed(self, rows: Tensor) -> Tensor:
        """Return D times a direction of each lane's start state. Shape (B, S).

        Forward mode by going back twice, which every operation of torch can: u D t is linear in u, and its gradient
        with respect to u is D t.

        Cost: two backward passes.
        """
        start, end = self.segment.start, self.segment.end
        assert start is not None
        seed = torch.zeros_like(rows, requires_grad=True)
        pairs = zip(differentiable(end), cotangent_of(seed, end, self.dims), strict=True)
        roots = [(leaf, each) for leaf, each in pairs if leaf.requires_grad]
        before = differentiable(start)
        found = cast(
            "Sequence[Tensor | None]",
            torch.autograd.grad(
                [leaf for leaf, _ in roots], before, [each for _, each in roots], create_graph=True, allow_unused=True
            ),
        )
        total: Tensor | None = None
        for each, along in zip(found, cotangent_of(rows, start, self.dims), strict=True):
            if each is not None:
                part = (as_real(each) * as_real(along)).sum()  # pyright: ignore[reportArgumentType]
                total = part if total is None else total + part
        if total is None or not total.requires_grad:
            return torch.zeros_like(rows)
        (along,) = torch.autograd.grad(total, seed, retain_graph=True, allow_unused=True)
        return torch.zeros_like(rows) if along is None else along.detach()  # pyright: ignore[reportUnnecessaryComparison]

    def jacobians(self, seeds: Sequence[Tensor] | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return I by name, (B, S, p) each, and D, (B, S, S), None for the model's initial state.

        Args:
            seeds: gradients of the end state, C of shape (B, S), to pull back instead of one for each of its numbers.

        Cost: S backward passes, or C, all lanes side by side.
        """
        chosen = self.unit_seeds() if seeds is None else seeds
        full: dict[str, Tensor] = {}
        before: list[Tensor] = []
        for index, each in enumerate(chosen):
            found, start = self.pulled(each)
            for name, gradient in found.items():
                if name not in full:
                    full[name] = gradient.new_zeros(len(gradient), len(chosen), gradient.shape[1])
                full[name][:, index] = gradient
            if start is not None:
                before.append(start)
        return full, torch.stack(before, 1) if before else None

    def state_jacobian(self) -> Tensor:
        """Return D. Shape (B, S, S).

        Cost: S backward passes, all lanes side by side, none of them into the weights.
        """
        rows = [self.pulled(seed, weights=False)[1] for seed in self.unit_seeds()]
        return torch.stack([each for each in rows if each is not None], 1)

    def unit_seeds(self) -> list[Tensor]:
        """Return a gradient of the end state for each of its numbers, 1 there and 0 elsewhere. S of shape (B, S)."""
        like = self.end
        eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        return [row.expand_as(like) for row in eye]


def _not_copied(names: Sequence[str]) -> CapabilityError:
    return CapabilityError(
        f"a state that depends on the model's weights as attributes was expected, but {', '.join(names)} "
        f"{'reaches' if len(names) == 1 else 'reach'} it in another way, such as a list, a closure, or a backward() "
        "within a function's own backward pass: each lane is run with copies of the weights, which are not reached so, "
        "and their influence on the state would be lost",
        fix="use self.weight where it is needed, instead of a list or a closure that holds it; or TBPTT(k1, k2), which "
        "needs no copies",
    )


def check_dense(names: Iterable[str], gradients: Gradients) -> None:
    """Refuse sparse gradients.

    Raises:
        CapabilityError: one is.
    """
    for name, each in zip(names, gradients, strict=False):
        if each is not None and each.is_sparse:
            raise _sparse(name)


def check_embeddings(model: nn.Module) -> None:
    """Refuse embeddings with sparse gradients.

    Raises:
        CapabilityError: there is one.
    """
    for name, each in model.named_modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse and each.weight.requires_grad:
            raise _sparse(f"{name}.weight" if name else "weight")


def _sparse(name: str) -> CapabilityError:
    """Return the refusal of a weight with sparse gradients."""
    return CapabilityError(
        f"dense gradients were expected, but that of {name} is sparse: the influence of a weight on the state is kept "
        "for all of its rows, lane by lane",
        fix="nn.Embedding(..., sparse=False), or TBPTT(k1, k2)",
    )
