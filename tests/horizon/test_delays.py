"""Dependencies behind a delay: flat on the way, and then over. The weights act at the far end alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, Adaptive
from tbptt.errors import ConfigError
from tbptt.horizon.recommend import Limits, Need, choose
from tbptt.models import Attentive, SegmentTransformer
from tbptt.pathways import pathways_of
from tbptt.tree import as_leaves, tensors


class Delay(nn.Module):
    """y_t = v w x_(t - lag), through a shift register: its gradient needs a look-back of lag + 1 steps."""

    def __init__(self, lag: int) -> None:
        super().__init__()
        self.lag, self.w, self.v = lag, nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], self.lag) if state is None else state
        outputs = []
        for each in inputs:
            outputs.append(self.v * state[:, -1:])
            state = torch.cat([self.w * each, state[:, :-1]], 1)
        return torch.stack(outputs), state


def delayed(lag: int) -> tbptt.ArrayStream:
    x = torch.randn(6000, 1, generator=torch.Generator().manual_seed(0))
    return tbptt.ArrayStream(x, x.roll(lag, 0), lanes=4)


@pytest.mark.parametrize(
    "lag", [20, pytest.param(50, marks=pytest.mark.slow), pytest.param(137, marks=pytest.mark.slow)]
)
def test_a_length_that_adapts_covers_a_delay(lag: int) -> None:
    longest = 160 if lag > 20 else 40
    model, stream, estimator = Delay(lag), delayed(lag), TBPTT(1, Adaptive(tolerance=0.1, max=longest))
    carry = estimator.init(model, 4)
    for _ in range(longest + 120):  # two probes at least
        estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, stream.read(estimator.next_steps(carry)))
    assert lag + 1 <= estimate.metrics["k2"] <= longest
    assert estimate.gradients["w"] != 0


def test_a_smooth_decay_asks_for_what_the_states_gradient_says() -> None:
    """The control: where weights act all along the way, the parameters' gradient lengthens nothing."""
    policy = Adaptive(tolerance=0.1, max=64)
    norms = [0.8**lag for lag in policy.lags]
    smooth, _ = policy.probed(policy.start(), norms)
    same, kappa = policy.probed(policy.start(), norms, [1.0, *norms], missed=0.09)
    longer, far = policy.probed(policy.start(), norms, [1.0, *[0.0] * (len(norms) - 1), 1.0], missed=0.5)
    assert same.length == smooth.length
    assert kappa < far == 64 == longer.length


@pytest.mark.parametrize(("lag", "longest"), [(20, 80), (50, 80), (137, 160)])
def test_what_is_recommended_covers_a_delay(lag: int, longest: int) -> None:
    settings = {"context": False, "costs": False, "lyapunov": False, "probes": 4}
    report = tbptt.horizon.measure(Delay(lag), nn.MSELoss(), delayed(lag), max_lag=longest, **settings)
    found = report.recommend(tolerance=0.1, k1=1)
    assert found.needed is not None
    assert found.low is not None
    assert lag + 1 <= found.low <= found.needed <= longest
    assert "the far end" in str(found)


def test_a_delay_beyond_what_was_measured_cannot_be_told() -> None:
    settings = {"context": False, "costs": False, "lyapunov": False, "probes": 4}
    report = tbptt.horizon.measure(Delay(137), nn.MSELoss(), delayed(137), max_lag=80, **settings)
    with pytest.raises(ConfigError, match="beyond lies more"):
        report.recommend(tolerance=0.1, k1=1)


def test_by_the_states_gradient_alone_it_says_what_it_does_not_know() -> None:
    settings = {"context": False, "costs": False, "lyapunov": False, "probes": 4, "gradients": False}
    report = tbptt.horizon.measure(Delay(20), nn.MSELoss(), delayed(20), max_lag=80, **settings)
    assert "says nothing of weights that act at the far end" in str(report.recommend(tolerance=0.1, k1=1))


@pytest.mark.parametrize(("by_context", "interval"), [(7, (3, 9)), (20, (None, None))])
def test_no_interval_is_given_for_what_it_is_none_of(by_context: int, interval: tuple[int | None, int | None]) -> None:
    need = Need(by_mass=8, low=3, high=9, by_bias=5, by_context=by_context, longest=24, trained=True, by_weights=4)
    found = choose(need, None, Limits(k1=1), 0.1, True)
    assert (found.low, found.high) == interval
    assert found.needed == max(8, by_context)


def segmented() -> nn.Module:
    return SegmentTransformer(3, 2, 8, heads=2, layers=2, memory=4, memory_tokens=1, segment=4).double()


def attentive() -> nn.Module:
    return Attentive(nn.GRU(3, 5), k_att=1000, k_top=2, memory=4).double()


@pytest.mark.parametrize("build", [segmented, attentive])
def test_a_memory_that_was_never_written_gets_no_gradient(build: type) -> None:
    torch.manual_seed(0)
    model, inputs = build(), torch.randn(4, 2, 3, dtype=torch.float64)
    start = model.initial_state(2) if hasattr(model, "initial_state") else model(inputs[:1] * 0)[1]
    given = as_leaves(start)
    outputs, _ = model(inputs, given)
    outputs.square().sum().backward()
    ways = pathways_of(model, given)
    unwritten = [tensors(given)[place] for place in ways["attention"]]
    others = [leaf for leaf in tensors(given) if leaf.requires_grad and all(leaf is not each for each in unwritten)]
    assert all(leaf.grad is None or not bool(leaf.grad.any()) for leaf in unwritten)
    assert any(leaf.grad is not None and bool(leaf.grad.any()) for leaf in others)  # the control


def test_the_horizon_of_an_empty_memory_is_that_of_the_core() -> None:
    torch.manual_seed(0)
    model = Attentive(nn.GRU(3, 5), k_att=10_000, k_top=2, memory=4)
    stream = tbptt.ArrayStream(torch.randn(1000, 3), torch.randn(1000, 10), lanes=4)
    settings = {"context": False, "costs": False, "lyapunov": False, "probes": 2, "gradients": False}
    report = tbptt.horizon.measure(model, nn.MSELoss(), stream, max_lag=64, checked=False, **settings)
    assert report.share_of("attention") == 0.0
    assert report.half_life < 4
