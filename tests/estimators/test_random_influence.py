"""UORO and KF-RTRL: their recursions in NumPy, their mean in a bound, their noise, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from systems import SYSTEMS, B, is_mean, relative, squared
from test_forward_mode import of_torch, over, whole
from torch import Tensor, nn

import tbptt
from tbptt import KFRTRL, RTRL, UORO, Window
from tbptt.errors import CapabilityError
from tbptt.estimators.random_products import signs


def network(size: int, steps: int) -> tuple[nn.Module, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A tanh network with a linear readout, W ~ N(0, 0.9^2 / n), U ~ N(0, 1/4), four inputs and three outputs."""
    drawn = np.random.default_rng(0)
    weights = {
        "w": drawn.normal(size=(size, size)) * 0.9 / size**0.5,
        "u": drawn.normal(size=(size, 4)) * 0.5,
        "c": drawn.normal(size=(3, size)) / size**0.5,
    }

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.RNN(4, size, bias=False), nn.Linear(size, 3, bias=False)

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs, state = self.core(inputs, state)
            return self.head(outputs), state

    model = Net().double()
    with torch.no_grad():
        model.core.weight_hh_l0.copy_(torch.from_numpy(weights["w"]))
        model.core.weight_ih_l0.copy_(torch.from_numpy(weights["u"]))
        model.head.weight.copy_(torch.from_numpy(weights["c"]))
    return model, drawn.normal(size=(steps, 4)), drawn.normal(size=(steps, 3)), weights


def drawn_by(estimator: Any, model: nn.Module, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The gradient of the recurrent weights over the whole recording, by an estimator, one step at a time."""
    carry, total = estimator.init(model, 1), np.zeros(0)
    for x, y in zip(inputs, targets, strict=True):
        window = Window(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])
        estimate, carry = estimator.estimate(model, lambda o, t: 0.5 * (o - t).square().sum(-1), carry, window)
        parts = [estimate.gradients[f"core.weight_{name}_l0"] for name in ("hh", "ih")]
        found = torch.cat(parts, 1).numpy().ravel()
        total = found if not total.size else total + found
    return total


def in_numpy(
    method: str, weights: dict[str, np.ndarray], inputs: np.ndarray, targets: np.ndarray, draws: Any, *, after: bool
) -> np.ndarray:
    """One lane; the estimate made before the influence moves on, or, as in the papers, after."""
    w, u, c = weights["w"], weights["u"], weights["c"]
    size, width = len(w), len(w) + inputs.shape[1]
    h, gradient = np.zeros(size), np.zeros((size, width))
    s, theta = np.zeros(size), np.zeros((size, width))  # UORO
    left, right = np.zeros(width), np.zeros((size, size))  # KF-RTRL: u, A
    for t, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        a = np.concatenate([h, x])
        h = np.tanh(w @ h + u @ x)
        slope = 1 - h**2
        error = c.T @ (c @ h - y)
        jacobian = slope[:, None] * w
        own = np.outer(error * slope, a)
        if not after:
            past = np.outer(np.zeros(size), a)
            if t:
                past = (error @ jacobian @ s) * theta if method == "uoro" else np.outer(error @ jacobian @ right, left)
            gradient += own + past
        if method == "uoro":
            nu = draws(t, size)
            f, b = jacobian @ s, np.outer(nu * slope, a)
            r0 = np.sqrt(np.linalg.norm(theta) / np.linalg.norm(f)) if t else 1.0
            r1 = np.sqrt(np.linalg.norm(b) / np.linalg.norm(nu))
            s, theta = r0 * f + r1 * nu, theta / r0 + b / r1
            gradient += (error @ s) * theta if after else 0.0
        else:
            sign = np.sign(a[np.abs(a).argmax()])  # which of a product's two factors is negative is not known
            if t == 0:
                left, right = sign * a, sign * np.diag(slope)
            else:
                one, two = draws(t, 2) * [1.0, sign]
                moved = jacobian @ right
                p0 = np.sqrt(np.linalg.norm(moved) / np.linalg.norm(left))
                p1 = np.sqrt(np.linalg.norm(slope) / np.linalg.norm(a))
                left, right = one * p0 * left + two * p1 * a, one * moved / p0 + two * np.diag(slope) / p1
            gradient += np.outer(error @ right, left) if after else 0.0
    return gradient.ravel()


@pytest.mark.parametrize(("method", "kind"), [("uoro", UORO), ("kf", KFRTRL)])
def test_each_draw_is_the_recursion(method: str, kind: Any) -> None:
    model, inputs, targets, weights = network(8, 30)

    def draws(step: int, size: int) -> np.ndarray:
        return signs((5, step), torch.empty(1, size).double())[0].numpy()

    found = drawn_by(kind(seed=5), model, inputs, targets)
    wanted = in_numpy(method, weights, inputs, targets, draws, after=False)
    assert np.abs(found - wanted).max() < 1e-10 * np.abs(wanted).max()
    other = in_numpy(method, weights, inputs, targets, draws, after=True)
    assert np.abs(found - other).max() > 1e-2 * np.abs(wanted).max()  # the control
    assert np.abs(found - drawn_by(kind(seed=6), model, inputs, targets)).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("estimator", "kind"), [(UORO(), "lstm"), (UORO(k1=5), "gru"), (KFRTRL(), "rnn"), (KFRTRL(k1=5), "rnn")], ids=str
)
def test_the_mean_is_the_full_gradient(estimator: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks and resets, two lanes, windows of one step and of several; and not when one sign is always plus."""
    model, recording = of_torch(kind, 4)
    wanted = torch.cat([each.flatten() for each in whole(model, recording).values()])

    def drawn() -> Tensor:
        found = [over(replace(estimator, seed=seed), model, recording, estimator.k1)[0] for seed in range(60)]
        return torch.stack([torch.cat([each.flatten() for each in sums.values()]) for sums in found])

    draws = drawn()
    assert is_mean(draws, wanted)
    assert not is_mean(draws, 2 * wanted)  # the control: it can tell
    for module in ("uoro", "kfrtrl"):
        monkeypatch.setattr(f"tbptt.estimators.{module}.signs", lambda about, like: torch.ones_like(like))
    assert relative({"": drawn()[0]}, {"": wanted}) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind", "size", "published"),
    [("uoro", UORO, 8, 13.3), ("uoro", UORO, 32, 80.9), ("kf", KFRTRL, 8, 1.03), ("kf", KFRTRL, 32, 1.73)],
)
def test_the_noise_is_below_the_published(method: str, kind: Any, size: int, published: float) -> None:
    """E|g - g*|^2 / |g*|^2: the papers' form has about the published noise; made before the influence moves, less."""
    model, inputs, targets, weights = network(size, 30 if size == 8 else 50)
    exact = drawn_by(RTRL(), model, inputs, targets)
    generator = np.random.default_rng(1)
    forms: dict[bool, float] = {}
    for after in (False, True):
        found = [
            in_numpy(method, weights, inputs, targets, lambda _, n: generator.integers(0, 2, n) * 2.0 - 1, after=after)
            for _ in range(600)
        ]
        squares = [float((each - exact) @ (each - exact)) for each in found]
        assert np.linalg.norm(np.mean(found, 0) - exact) < 0.5 * np.mean(squares) ** 0.5
        forms[after] = float(np.mean(squares) / (exact @ exact))
    assert published / 3 < forms[True] < published * 3
    assert forms[False] < forms[True]
    mine = [drawn_by(kind(seed=seed), model, inputs, targets) for seed in range(60)]
    own = [float((f - exact) @ (f - exact) / (exact @ exact)) for f in mine]
    assert abs(np.mean(own) - forms[False]) < 4 * np.std(own) / len(own) ** 0.5


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.core = nn.Embedding(4, 3), nn.RNN(3, 5)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> Any:
        return self.core(self.embedding(inputs), state)


@pytest.mark.parametrize(
    ("make", "inputs", "name"),
    [
        (lambda: nn.GRU(2, 5), torch.randn(1, B, 2), "weight_ih_l0"),
        (lambda: nn.LSTM(2, 5), torch.randn(1, B, 2), "weight_ih_l0"),
        (lambda: nn.RNN(2, 5, num_layers=2), torch.randn(1, B, 2), "weight_ih_l0"),
        (Embedded, torch.randint(4, (1, B)), "embedding.weight"),
    ],
    ids=["gru", "lstm", "two layers", "embedding"],
)
def test_kfrtrl_takes_one_linear_map(make: Any, inputs: Tensor, name: str) -> None:
    torch.manual_seed(0)
    model, estimator = make(), KFRTRL()
    window = Window(inputs, torch.zeros(1, B, 5))
    with pytest.raises(CapabilityError, match="a recurrence of one linear map") as caught:
        estimator.estimate(model, squared, estimator.init(model, B), window)
    assert name in str(caught.value)
    assert "UORO(k1)" in str(caught.value)


def test_uoro_takes_any_model() -> None:
    for name in SYSTEMS:
        model = SYSTEMS[name]().model
        carry = UORO().init(model, B)
        for _ in range(3):
            window = Window(torch.randn(1, B, 2).double(), torch.randn(1, B, 3).double())
            estimate, carry = UORO().estimate(model, squared, carry, window)
        assert all(each.isfinite().all() for each in estimate.gradients.values())
        assert tbptt.tree.all_finite(carry.influence)
