"""A state's numbers as one row for each lane, and back: real and complex tensors of any size, in any order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from systems import relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import Window
from tbptt.estimators.rows import cotangent_of, rows_of

T, N = 12, 3


class Mixed(nn.Module):
    """A real memory of odd size, and after it a complex one, which may be kept conjugate."""

    def __init__(self, conjugate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conjugate = conjugate
        self.weight, self.bias = nn.Parameter(torch.randn(N, N) * 0.3), nn.Parameter(torch.randn(N))

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            kind = torch.complex128 if self.bias.dtype == torch.float64 else torch.complex64
            state = {"a": inputs.new_zeros(len(inputs), N), "z": inputs.new_zeros(len(inputs), N, dtype=kind)}
        h = torch.tanh(state["a"] @ self.weight.T + inputs + self.bias + state["z"].real)
        z = 0.5j * state["z"] + h
        return h + z.imag, {"a": h, "z": z.conj() if self.conjugate else z}


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize("lanes", [1, 2])
def test_one_lane_and_a_real_tensor_of_odd_size_before_a_complex_one(lanes: int, conjugate: bool) -> None:
    model = tbptt.scan(Mixed(conjugate).double())
    inputs, targets = (torch.randn(T, lanes, N).double() for _ in range(2))
    total = squared(model(inputs)[0], targets).sum()
    wanted = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(total, list(model.parameters())), strict=True)
    )
    others = (tbptt.UORO(2), tbptt.TBPTT(2, 6, replay="retain"), tbptt.SyntheticGradients(2, lambda_=0.5))
    for estimator in (tbptt.RTRL(2), tbptt.SnAp(2, n=9), *others):
        if isinstance(estimator, tbptt.SyntheticGradients):
            estimator.attach(model, inputs[:2])
        carry, sums = estimator.init(model, lanes), {name: torch.zeros_like(each) for name, each in wanted.items()}
        for at in range(0, T, 2):
            window = Window(inputs[at : at + 2], targets[at : at + 2])
            estimate, carry = estimator.estimate(model, squared, carry, window)
            for name in sums:
                sums[name] += estimate.gradients[name] * estimate.num_injected
        exact = relative(sums, wanted) < 1e-12
        assert exact == isinstance(estimator, tbptt.RTRL | tbptt.SnAp), estimator


@pytest.mark.parametrize("sizes", [(1, 3), (2, 1), (5,), (3, 1, 4)])
def test_rows_there_and_back(sizes: tuple[int, ...]) -> None:
    """Whatever stands before a complex tensor; a gradient through them is that of each number."""
    for lanes in (1, 2, 3):
        state = [
            torch.randn(lanes, size, dtype=torch.complex128 if at % 2 else torch.float64)
            for at, size in enumerate(sizes)
        ]
        dims = (0,) * len(sizes)
        rows = rows_of(state, dims).requires_grad_()
        again = cotangent_of(rows, state, dims)
        assert all(torch.equal(a, b) for a, b in zip(again, state, strict=True))  # type: ignore[arg-type]
        weights = torch.randn_like(rows)
        seeds = cotangent_of(weights, state, dims)
        total = sum((a.conj() * b).real.sum() for a, b in zip(again, seeds, strict=True))  # type: ignore[union-attr]
        assert torch.allclose(torch.autograd.grad(total, rows)[0], weights)  # type: ignore[arg-type]


def test_complex_gradients_are_clamped_by_their_parts() -> None:
    """One that is kept conjugate, too."""
    model = nn.RNN(2, 2)
    window = Window(torch.randn(1, 1, 2), torch.randn(1, 1, 2))
    estimate, _ = tbptt.TBPTT(1, 1).estimate(model, squared, tbptt.TBPTT(1, 1).init(model, 1), window)
    gradient = torch.randn(4, 3, dtype=torch.complex128).conj().T
    clamped = tbptt.guards.ClipValue(0.1)(replace(estimate, gradients={"w": gradient})).gradients["w"]
    plain = gradient.resolve_conj()
    assert torch.equal(clamped.real, plain.real.clamp(-0.1, 0.1))
    assert torch.equal(clamped.imag, plain.imag.clamp(-0.1, 0.1))
