"""The parts of the horizon: statistics, Lyapunov exponents, influences, costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt.cost import held_for_backward, in_turn
from tbptt.errors import CapabilityError, ConfigError
from tbptt.horizon import influences, lyapunov_exponents
from tbptt.horizon.statistics import GradientStatistics, Sketch, band
from tbptt.models import LRU
from tbptt.streams import DelayedRecall

# Statistics


def test_bias_is_not_inflated_by_noise() -> None:
    """True bias 0.3 under noise ten times as large: the naive ratio of means is far off, pairs of probes are not."""
    generator = torch.Generator().manual_seed(0)
    numbers, probes = 400, 60
    truth = torch.zeros(numbers, dtype=torch.float64)
    truth[0] = 1.0
    short = 0.7 * truth
    found, naive = [], []
    for _ in range(40):
        noise = torch.randn(probes, 2, numbers, generator=generator, dtype=torch.float64) * (3.0 / math.sqrt(numbers))
        gradients = torch.stack([short + noise[:, 0], truth + noise[:, 1]], 1)
        statistics = GradientStatistics(gradients)
        assert statistics.is_measurable
        found.append(statistics.bias((1, 2)).mean[0])
        mean = gradients.mean(0)
        naive.append(float((mean[0] - mean[1]).norm() / mean[1].norm()))
    assert abs(float(np.mean(found)) - 0.3) < 0.08
    assert float(np.mean(naive)) > 0.45  # the control


def test_the_interval_of_the_bias_covers_it() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.ones(3, dtype=torch.float64)
    covered = 0
    for _ in range(200):
        noise = torch.randn(16, 2, 3, generator=generator, dtype=torch.float64) * 0.3
        bias = GradientStatistics(torch.stack([0.5 * truth + noise[:, 0], truth + noise[:, 1]], 1)).bias((1, 2))
        covered += bias.low[0] <= 0.5 <= bias.high[0]
    assert covered > 175


def test_a_gradient_that_is_noise_is_not_measurable() -> None:
    generator = torch.Generator().manual_seed(2)
    measurable = [
        GradientStatistics(torch.randn(16, 2, 50, generator=generator, dtype=torch.float64)).is_measurable
        for _ in range(100)
    ]
    assert sum(measurable) < 8
    bias = GradientStatistics(torch.randn(16, 2, 50, generator=generator, dtype=torch.float64)).bias((1, 2))
    assert math.isnan(bias.mean[0])


def test_gradients_without_noise_are_exact() -> None:
    one = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    for probes in (1, 2, 5):
        statistics = GradientStatistics(one.expand(probes, 3, 2))
        if probes == 2:
            continue  # two have no uncertainty to be known
        assert statistics.bias((1, 2, 3)).mean == pytest.approx((2.0, math.sqrt(2) / 2, 0.0))
        assert statistics.cosine((1, 2, 3)).mean == pytest.approx((-1.0, math.sqrt(0.5), 1.0))
        assert statistics.signed((1, 2, 3)).mean == pytest.approx((-1.0, 0.5, 1.0))


def test_a_sketch_keeps_inner_products() -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    right = right + 0.5 * left
    sketch = Sketch(200_000)
    assert not sketch.exact
    a, b = sketch([left[:7], left[7:].reshape(-1, 1)]), sketch([right])
    scale = float(left.norm() * right.norm())
    assert abs(float(a @ b - left @ right)) < 0.03 * scale
    assert float(a.norm()) == pytest.approx(float(left.norm()), rel=0.03)
    assert float((a - b).norm()) == pytest.approx(float((left - right).norm()), rel=0.03)
    exact = Sketch(100)
    assert exact.exact
    assert torch.equal(exact([left[:60].reshape(6, 10), left[60:100]]), left[:100])


def test_a_band_is_the_mean_and_where_it_may_lie() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        curve = band((1,), generator.normal(2.0, 1.0, size=(20, 1)))
        covered += curve.low[0] <= 2.0 <= curve.high[0]
    assert 170 < covered < 200


# Lyapunov exponents


class Henon(nn.Module):
    """x' = 1 - a x^2 + y, y' = b x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.4).double())

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, y = (inputs.new_zeros(inputs.shape[1]) + 0.1,) * 2 if state is None else (state["x"], state["y"])
        outputs = []
        for _ in inputs:
            x, y = 1 - self.a * x * x + y, 0.3 * x
            outputs.append(x)
        return torch.stack(outputs), {"x": x, "y": y}


def test_the_exponents_of_the_henon_map() -> None:
    """0.4192 and ln 0.3 - 0.4192 (Sprott 2003, table 5.1)."""
    model = Henon()
    with torch.no_grad():
        _, state = model(torch.zeros(100, 3, 1).double())
    window = tbptt.Window(torch.zeros(800, 3, 1).double())
    found = lyapunov_exponents(model, window, state, (0, 0), count=2)
    assert found is not None
    assert found[0] == pytest.approx(0.4192, abs=0.04)
    assert float(found.sum()) == pytest.approx(math.log(0.3), abs=1e-9)


def test_the_exponents_of_a_linear_network_are_its_eigenvalues() -> None:
    torch.manual_seed(0)
    model = nn.RNN(2, 3, bias=False).double()
    with torch.no_grad():  # tanh is the identity at 0
        model.weight_ih_l0.zero_()
        q = torch.linalg.qr(torch.randn(3, 3).double())[0]
        model.weight_hh_l0.copy_(q @ torch.diag(torch.tensor([0.9, 0.7, 0.2]).double()) @ q.T)
    window = tbptt.Window(torch.zeros(300, 2, 2).double())
    found = lyapunov_exponents(model, window, torch.zeros(1, 2, 3).double(), (1,), count=3, burn_in=50)
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.9, 0.7, 0.2]).double().log(), rtol=1e-6, atol=1e-6)


def test_the_exponents_of_a_complex_state_are_those_of_both_its_parts() -> None:
    torch.manual_seed(0)
    model = LRU(2, 3).double()
    decays = torch.tensor([0.9, 0.7, 0.2]).double()
    with torch.no_grad():
        model.get_parameter("layers.0.lru.nu_log").copy_((-decays.log()).log())
    window, state = tbptt.Window(torch.randn(300, 2, 2).double()), model(torch.zeros(1, 2, 2).double())[1]
    found = lyapunov_exponents(model, window, state, (0,), count=6, burn_in=100)
    assert found is not None
    torch.testing.assert_close(found, decays.log().repeat_interleave(2), rtol=1e-6, atol=1e-6)


def test_exponents_need_lanes_and_single_steps() -> None:
    window = tbptt.Window(torch.zeros(30, 2, 2))
    assert lyapunov_exponents(nn.RNN(2, 3), window, torch.zeros(1, 2, 3), None) is None
    assert lyapunov_exponents(nn.RNN(2, 3), window, torch.zeros(1, 2, 3), (None,)) is None


# Influences


def test_the_influence_of_each_step_is_the_gradient_of_its_input() -> None:
    torch.manual_seed(0)
    model = tbptt.SequenceModel(3, 1, hidden=6, dropout=0.5).double()
    data = torch.randn(900, 3).double(), torch.randn(900).double()
    stream = tbptt.ArrayStream(*data, lanes=3)
    place = stream.state_dict()
    found = influences(model, nn.MSELoss(), stream, steps=12, count=4)
    assert stream.state_dict() == place
    assert model.training
    assert len(found) == 4
    model.eval()
    whole = data[0].view(3, 300, 3).transpose(0, 1)
    for number, each in enumerate(found):
        lane = number % 3
        begin = next(t for t in range(289) if torch.equal(whole[t : t + 12, lane], each.inputs))
        inputs = whole[begin : begin + 12, lane : lane + 1].clone().requires_grad_()
        _, state = model(whole[:begin, lane : lane + 1])
        outputs, _ = model(inputs, state)
        loss = (outputs[-1, 0] - each.target).square()
        [wanted] = torch.autograd.grad(loss, inputs)
        assert each.loss == pytest.approx(float(loss.detach()))
        torch.testing.assert_close(each.norms, wanted[:, 0].norm(dim=1))


def test_symbols_without_an_embedding_have_no_influence_to_measure() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            outputs = self.weight[ids]
            return outputs, outputs[-1]

    with pytest.raises(CapabilityError, match=r"nn\.Embedding"):
        influences(Lookup(), nn.CrossEntropyLoss(), DelayedRecall(1, 2), steps=5)


@pytest.mark.parametrize("settings", [{"steps": 1}, {"count": 0}, {"steps": 2.5}, {"steps": 9000}])
def test_influences_that_cannot_be_meant(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        influences(
            tbptt.SequenceModel(4, 4, hidden=3, embedding=2), nn.CrossEntropyLoss(), DelayedRecall(1, 2), **settings
        )


# Costs


def test_the_bytes_held_are_those_of_the_graph() -> None:
    x = torch.ones(1000, requires_grad=True)
    with held_for_backward([x]) as held:
        y = x.exp()  # saves its result, 4000 bytes
        z = y.sin()  # saves its input, the same storage
        assert held.now == held.peak == 4000
        w = (z * 2).cos()  # saves 4000 more
        assert held.now == 8000
        w.sum().backward()
    del y, z, w
    assert held.now == 0
    assert held.peak == 8000


def test_parameters_do_not_count() -> None:
    model = nn.Linear(100, 1)
    inputs = torch.ones(1, 100)
    with held_for_backward([*model.parameters(), inputs]) as held:
        model(inputs).sum().backward()
    assert held.peak == 0


def test_sides_take_turns() -> None:
    order: list[str] = []
    in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
