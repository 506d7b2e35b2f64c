"""How a predictor learns from what arrives at the state it has predicted for: BP(lambda), with traces.

Letters: T time, B lanes, S numbers of a lane's state, M hidden units, P parameters of the predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from tbptt.errors import CapabilityError
from tbptt.estimators.gradients import gradients_of
from tbptt.estimators.predictor import Predictor
from tbptt.estimators.rows import cotangent_of, rows_of
from tbptt.estimators.segments import Segment
from tbptt.tree import LaneDims, Tree

__all__ = ["MOST_TRACED", "check_traced", "learned", "learned_with", "state_jacobian", "traced"]

MOST_TRACED = 2**28
"""The most numbers, B S P, that traces may have: 1 GiB in single precision, and as much again while they change."""


def check_traced(predictor: Predictor, lanes: int) -> None:
    """Refuse traces larger than `MOST_TRACED`.

    Raises:
        CapabilityError: they would be.
    """
    weights = sum(each.numel() for each in predictor.parameters() if each.requires_grad)
    size = lanes * predictor.size * weights
    if size > MOST_TRACED:
        raise CapabilityError(
            f"traces of at most {MOST_TRACED} numbers were expected, but {lanes} lanes, each with a state of "
            f"{predictor.size} numbers and {weights} weights of the predictor, make {size}: each lane keeps what each "
            "weight has done to each number of its state",
            fix="lambda_=0, which keeps no traces; or predictor=8, a few hidden units; or fewer lanes",
        )


def learned(predictor: Predictor, weights: Mapping[str, Tensor], rows: Tensor, errors: Tensor) -> dict[str, Tensor]:
    """Return the gradient of half the squared error, summed over S and averaged over lanes.

    Args:
        predictor: what predicted.
        weights: those of its parameters that learn, by name.
        rows: what it saw. Shape (B, S).
        errors: target less prediction. Shape (B, S).

    Cost: one pass forward and back.
    """
    with torch.enable_grad():
        predicted = predictor(rows)
    seeds = errors / -len(errors)
    found = gradients_of([predicted], [seeds], list(weights.values()))
    return {name: each for name, each in zip(weights, found, strict=True) if each is not None}


def learned_with(trace: Tensor, weights: Mapping[str, Tensor], errors: Tensor) -> dict[str, Tensor]:
    """Return the same, with what the error says of all former predictions: the mean over lanes of -error times trace.

    Args:
        trace: as `traced` gives it. Shape (B, S, P).
        weights: the parameters that learn, by name, in the order of the trace.
        errors: target less prediction. Shape (B, S).
    """
    joined = torch.einsum("bs,bsp->p", errors, trace) / -len(errors)
    pieces = joined.split([each.numel() for each in weights.values()])
    return {name: piece.view_as(each) for (name, each), piece in zip(weights.items(), pieces, strict=True)}


def traced(predictor: Predictor, weights: Mapping[str, Tensor], rows: Tensor, trace: Tensor | None) -> Tensor:
    """Return the trace with the predictions for `rows` added: e + dg/dPsi. Shape (B, S, P).

    Args:
        trace: of the predictions before, brought to this state; None for none.

    Raises:
        CapabilityError: a predictor that cannot be differentiated lane by lane, or of which other weights learn now.
    """
    parts = _by_lane(predictor, weights, rows) if predictor.spelled == "own" else _by_layer(predictor, rows)
    added = torch.cat([parts[name].flatten(2) for name in weights], 2)
    if trace is None:
        return added
    if trace.shape != added.shape:
        raise CapabilityError(
            f"traces of {added.shape[2]} weights of the predictor were expected, as many as learn now, but those "
            f"carried are of {trace.shape[2]}: some have been frozen or thawed since",
            fix="estimator.init(model, lanes), which starts anew; or lambda_=0",
        )
    return added.add_(trace)


def _by_layer(predictor: Predictor, rows: Tensor) -> dict[str, Tensor]:
    """Return d prediction / d weight in each lane, by the weight's name, for one layer or two. Shape (B, S, ...)."""
    net = predictor.net
    layers = [net] if isinstance(net, nn.Linear) else [each for each in net.children() if isinstance(each, nn.Linear)]
    names = {each: name for name, each in predictor.named_modules()}
    last, eye = layers[-1], torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        entered = rows
        if len(layers) == 2:
            first = layers[0]
            entered = first(rows)
            gate = last.weight * (entered > 0)[:, None]
            entered = torch.relu(entered)
            found[f"{names[first]}.weight"] = torch.einsum("bsm,bk->bsmk", gate, rows)
            found[f"{names[first]}.bias"] = gate
        found[f"{names[last]}.weight"] = torch.einsum("sj,bk->bsjk", eye, entered)
        found[f"{names[last]}.bias"] = eye.expand(len(rows), *eye.shape)
    return found


def _by_lane(predictor: Predictor, weights: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return the same for any predictor: each lane is given weights of its own, and S backward passes are made.

    Not by `torch.func.jacrev`, which refuses to run while what autograd holds is measured.
    """
    others = dict(predictor.named_parameters()) | dict(predictor.named_buffers())
    plain = {name: value.detach() for name, value in others.items() if name not in weights}
    lanes = len(rows)
    own = {name: value.detach().expand(lanes, *value.shape).clone().requires_grad_() for name, value in weights.items()}

    def predict(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(predictor, {**plain, **weights}, (row[None],))[0]

    try:
        with torch.enable_grad():
            predicted: Tensor = torch.func.vmap(predict)(own, rows)
    except (RuntimeError, ValueError) as error:
        raise CapabilityError(
            "a predictor that takes each lane by itself was expected, for traces, but torch.func.vmap cannot run it so "
            f"({str(error).splitlines()[0]})",
            fix="lambda_=0, or a predictor without batch normalisation and dropout",
        ) from error
    missed = gradients_of([predicted], [torch.ones_like(predicted)], list(weights.values()), keep=True)
    names = [name for name, each in zip(weights, missed, strict=True) if each is not None]
    if names:
        raise CapabilityError(
            f"a predictor that uses its weights as attributes was expected, for traces, but {', '.join(names)} came in "
            "another way, such as by a list or a closure: each lane is given copies of them, which are not reached so",
            fix="self.weight where it is needed; or lambda_=0, which keeps no traces",
        )
    each_row = [
        torch.autograd.grad(column.sum(), list(own.values()), retain_graph=True, materialize_grads=True)
        for column in predicted.unbind(1)
    ]
    return dict(zip(own, [torch.stack(columns, 1) for columns in zip(*each_row, strict=True)], strict=True))


def state_jacobian(segment: Segment, dims: LaneDims | None, weight: Tensor) -> Tensor:
    """Return the derivative of each lane's end state by its start state, d end / d start. Shape (B, S, S).

    Zero for a lane that starts anew in between.

    Args:
        segment: run with its start tracked.
        dims: the lane dimensions of the state.
        weight: a 0-dim tensor of the type of the losses.

    Cost: S backward passes through the segment, all lanes side by side.
    """
    end: Tree = segment.end
    silent = replace(segment, loss=None)
    like = rows_of(end, dims)
    found: list[Tensor] = []
    for index in range(like.shape[1]):
        seed = torch.zeros_like(like)
        seed[:, index] = 1.0
        cotangent = silent.vjp([], weight, cotangent_of(seed, end, dims), start=True, keep=True)[1]
        found.append(rows_of(segment.start, dims, cotangent))
    return torch.stack(found, 1)
