"""Sparse attentive backtracking against the same sparse graph, built lane by lane with lists and explicit detaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from systems import Attending, relative, squared
from torch import Tensor, nn

import tbptt
from tbptt import TBPTT, ClipBoundary, SparseAttentiveBacktracking, Window
from tbptt.errors import CapabilityError, ConfigError
from tbptt.models import Attentive

D, H, B, T = 3, 5, 3, 46
K_ATT, K_TOP, SLOTS = 2, 3, 6
CORES = {"lstm": nn.LSTM, "gru": nn.GRU}
Weights = dict[str, Tensor]


class Headed(nn.Module):
    def __init__(self, core: str, k_att: int = K_ATT) -> None:
        super().__init__()
        self.layer = Attentive(CORES[core](D, H), k_att=k_att, k_top=K_TOP, memory=SLOTS)
        self.head = nn.Linear(2 * H, 2)

    def memories(self) -> tuple[int, ...]:
        return self.layer.memories()

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.layer(inputs, state)
        return self.head(outputs), state


@dataclass
class Lane:
    """One lane: its state, all that it has stored, and for how many steps it has run."""

    h: Tensor
    s: Tensor
    c: Tensor
    stored: list[Tensor]
    steps: int = 0

    @staticmethod
    def fresh() -> Lane:
        return Lane(torch.zeros(H).double(), torch.zeros(H).double(), torch.zeros(H).double(), [])


def core_step(core: str, w: Weights, x: Tensor, lane: Lane) -> tuple[Tensor, Tensor]:
    """The equations of the LSTM and the GRU, for one lane."""
    entered = w["layer.core.weight_ih_l0"] @ x + w["layer.core.bias_ih_l0"]
    again = w["layer.core.weight_hh_l0"] @ (lane.h + lane.s) + w["layer.core.bias_hh_l0"]
    if core == "lstm":
        i, f, g, o = (entered + again).split(H)
        c = f.sigmoid() * lane.c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    a, b = entered.split(H), again.split(H)
    r, z = (a[0] + b[0]).sigmoid(), (a[1] + b[1]).sigmoid()
    return (1 - z) * (a[2] + r * b[2]).tanh() + z * lane.h, lane.c


def looked_up(w: Weights, h: Tensor, memories: list[Tensor], k_top: int) -> Tensor:
    query = w["layer.query.weight"] @ h + w["layer.query.bias"]
    scores = [w["layer.score.weight"][0] @ torch.tanh(query + w["layer.key.weight"] @ each) for each in memories]
    best = sorted(range(len(scores)), key=lambda each: -float(scores[each].detach()))[:k_top]
    total = sum(scores[each].exp() for each in best)
    return sum((scores[each].exp() / total * memories[each] for each in best), torch.zeros(H).double())


@dataclass(frozen=True)
class Cuts:
    """Where the graph ends: before `begin` there is none, at `recurrent` it does for h and c, at `all` for memories.

    What goes on along memories at `recurrent` has a norm of at most `clip`, in each lane.
    """

    begin: int
    recurrent: frozenset[int]
    memories: frozenset[int] = frozenset()
    clip: float = float("inf")


class Clipped(torch.autograd.Function):
    """Nothing forward, a norm of at most so much back."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, most: float) -> Tensor:
        ctx.most = most
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = float(gradient.square().sum().sqrt())
        return gradient * min(1.0, ctx.most / norm) if norm else gradient, None


def by_hand(
    core: str, model: Headed, data: tuple[Tensor, Tensor, Tensor, Tensor], window: range, cuts: Cuts
) -> tuple[Weights, Tensor]:
    """Return the gradient of a window's mean loss, and the outputs of all steps up to its end."""
    inputs, targets, mask, reset = data
    w = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    total, count = torch.zeros(()).double(), 0
    outputs = torch.zeros(window.stop, B, 2).double()
    for number in range(B):
        lane = Lane.fresh()
        for t in range(window.stop):
            if reset[t, number]:
                lane = Lane.fresh()
            if t in cuts.recurrent or t == cuts.begin:
                lane.h, lane.s, lane.c = lane.h.detach(), lane.s.detach(), lane.c.detach()
                if lane.stored:
                    lane.stored = list(Clipped.apply(torch.stack(lane.stored), cuts.clip))
            if t in cuts.memories or t == cuts.begin:
                lane.stored = [each.detach() for each in lane.stored]
            lane.h, lane.c = core_step(core, w, inputs[t, number], lane)
            lane.s = looked_up(w, lane.h, lane.stored[-SLOTS:], K_TOP)
            lane.steps += 1
            if lane.steps % model.layer.k_att == 0:
                lane.stored.append(lane.h)
            output = w["head.weight"] @ torch.cat([lane.h + lane.s, lane.s]) + w["head.bias"]
            outputs[t, number] = output.detach()
            if t in window and mask[t, number]:
                total, count = total + (output - targets[t, number]).square().sum(), count + 1
    if not count:
        return {name: torch.zeros_like(value) for name, value in w.items()}, outputs
    found = torch.autograd.grad(total / count, list(w.values()), materialize_grads=True)
    return dict(zip(w, found, strict=True)), outputs


def made(core: str, seed: int = 0, *, resets: bool = True, k_att: int = K_ATT) -> tuple[Headed, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    model = Headed(core, k_att).double()
    with torch.no_grad():  # scores far apart, so that what is chosen matters
        for parameter in model.parameters():
            parameter.mul_(2.0)
    reset = torch.rand(T, B) < (0.06 if resets else -1.0)
    return model, (torch.randn(T, B, D).double(), torch.randn(T, B, 2).double(), torch.rand(T, B) < 0.7, reset)


def estimates(estimator: Any, model: nn.Module, data: tuple[Tensor, ...]) -> list[tuple[range, tbptt.Estimate]]:
    carry, found = estimator.init(model, B), []
    for begin in range(0, T, estimator.k1):
        window = Window(*(part[begin : begin + estimator.k1] for part in data), start=begin)
        estimate, carry = estimator.estimate(model, squared, carry, window)
        found.append((range(begin, begin + window.steps), estimate))
    return found


def cuts_of(window: range, k_trunc: int, lookback: int, shift: int = 0) -> Cuts:
    begin = max(0, window.stop - lookback)
    grid = [t for t in range(begin, window.stop) if (t - window.start - shift) % k_trunc == 0]
    return Cuts(begin if window.stop > lookback else -1, frozenset(grid))


SETTINGS = [(12, 4, 12), (12, 5, 12), (10, 1, 10), (6, 3, 20), (5, 3, 23)]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("k1", "k_trunc", "lookback"), SETTINGS)
@pytest.mark.parametrize("resets", [False, True])
def test_the_gradient_is_that_of_the_sparse_graph_built_by_hand(
    core: str, k1: int, k_trunc: int, lookback: int, resets: bool
) -> None:
    model, data = made(core, resets=resets)
    estimator = SparseAttentiveBacktracking(
        k1, k_trunc, lookback=None if lookback == k1 else lookback, keep_outputs=True
    )
    farthest = {"full": 0.0, "no jumps": 0.0, "cut one step later": 0.0}
    for window, estimate in estimates(estimator, model, data):
        reached = lookback if lookback > k1 else len(window)
        cuts = cuts_of(window, k_trunc, reached)
        wanted, outputs = by_hand(core, model, data, window, cuts)
        assert relative(estimate.gradients, wanted) < 1e-10
        torch.testing.assert_close(estimate.outputs, outputs[window.start :], rtol=1e-10, atol=1e-12)
        others = {
            "full": Cuts(cuts.begin, frozenset()),
            "no jumps": Cuts(cuts.begin, cuts.recurrent, cuts.recurrent),
            "cut one step later": cuts_of(window, k_trunc, reached, shift=1),
        }
        for name, other in others.items():
            apart = relative(estimate.gradients, by_hand(core, model, data, window, other)[0])
            farthest[name] = max(farthest[name], apart)
    if k_trunc == 1:
        farthest.pop("cut one step later")  # every step is cut
    assert min(farthest.values()) > 1e-3, farthest


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("k1", "k_trunc", "lookback"), [(12, 4, 12), (5, 3, 23)])
def test_what_goes_on_along_memories_is_clipped_at_each_cut_and_each_lane_alone(
    core: str, k1: int, k_trunc: int, lookback: int
) -> None:
    model, data = made(core)
    most, wide = 0.05, 1e3
    settings = {"k1": k1, "k_trunc": k_trunc, "lookback": lookback}
    clipped = estimates(SparseAttentiveBacktracking(**settings, boundary=ClipBoundary(most)), model, data)
    unclipped = estimates(SparseAttentiveBacktracking(**settings, boundary=ClipBoundary(wide)), model, data)
    plain = estimates(SparseAttentiveBacktracking(**settings), model, data)
    farthest = {"not clipped": 0.0, "clipped twice as hard": 0.0, "no jumps": 0.0}
    for (window, estimate), (_, loose), (_, free) in zip(clipped, unclipped, plain, strict=True):
        cuts = cuts_of(window, k_trunc, lookback if lookback > k1 else len(window))
        wanted = by_hand(core, model, data, window, replace(cuts, clip=most))[0]
        assert relative(estimate.gradients, wanted) < 1e-10
        assert relative(loose.gradients, free.gradients) < 1e-14
        others = {
            "not clipped": cuts,
            "clipped twice as hard": replace(cuts, clip=most / 2),
            "no jumps": replace(cuts, memories=cuts.recurrent),
        }
        for name, other in others.items():
            apart = relative(estimate.gradients, by_hand(core, model, data, window, other)[0])
            farthest[name] = max(farthest[name], apart)
        if estimate.boundary_norms.numel():  # the newest boundary: nothing was clipped before it
            assert torch.equal(estimate.boundary_norms[0], free.boundary_norms[0])
    assert min(farthest.values()) > 1e-3, farthest


def test_a_boundary_where_nothing_is_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"k_trunc=8\) the gradient crosses none: .*\n.*lookback=16") as caught:
        SparseAttentiveBacktracking(8, 8, boundary=ClipBoundary(1.0))
    assert "ClipNorm" in str(caught.value)
    assert SparseAttentiveBacktracking(8, 8, lookback=16, boundary=ClipBoundary(1.0)).boundary is not None


@pytest.mark.parametrize("core", CORES)
def test_k_trunc_of_the_window_is_full_backpropagation_through_it(core: str) -> None:
    model, data = made(core)
    whole = estimates(SparseAttentiveBacktracking(16, 16), model, data)
    plain = estimates(TBPTT(16, 16), model, data)
    cut = estimates(SparseAttentiveBacktracking(16, 15), model, data)
    for (_, one), (_, two) in zip(whole, plain, strict=True):
        assert relative(one.gradients, two.gradients) < 1e-12
    assert relative(cut[0][1].gradients, plain[0][1].gradients) > 1e-4


def test_no_gradient_goes_beyond_the_lookback_and_some_goes_beyond_k_trunc() -> None:
    """The gradient of the last loss with respect to each input, by inputs that are made of a parameter."""

    class Given(nn.Module):
        def __init__(self, model: Headed) -> None:
            super().__init__()
            self.model = model
            self.inputs = nn.Parameter(torch.randn(T, D).double())

        def memories(self) -> tuple[int, ...]:
            return self.model.memories()

        def forward(self, steps: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return self.model(self.inputs[steps], state)

    model, (_, targets, _, _) = made("lstm", resets=False)
    given = Given(model)
    steps = torch.arange(T)[:, None].expand(T, B)
    reached: dict[int, list[int]] = {}
    for lookback in (8, 16, 24):
        estimator = SparseAttentiveBacktracking(8, 2, lookback=lookback)
        carry = estimator.init(given, B)
        for begin in range(0, 40, 8):
            mask = torch.zeros(8, B, dtype=torch.bool)
            mask[-1] = True
            window = Window(steps[begin : begin + 8], targets[begin : begin + 8], mask)
            estimate, carry = estimator.estimate(given, squared, carry, window)
        arrived = estimate.gradients["inputs"].abs().sum(1)
        reached[lookback] = arrived.nonzero().flatten().tolist()
    for lookback, found in reached.items():
        assert found[-1] == 39
        assert 39 - lookback < found[0] <= 39 - lookback + 4, found
    assert len(reached[24]) > len(reached[8]) > 2


def test_models_without_memories_are_refused() -> None:
    with pytest.raises(CapabilityError, match="names its memories was expected, but GRU names none"):
        SparseAttentiveBacktracking(4, 2).init(nn.GRU(D, H), B)

    class Wrong(Attending):
        place = 3

        def memories(self) -> tuple[int, ...]:
            return (self.place,)

    window = Window(torch.randn(4, B, 2), torch.randn(4, B, 3))
    for place in (3, 4, -1):  # the count of steps, and none at all
        model = Wrong()
        model.place = place
        estimator = SparseAttentiveBacktracking(4, 2)
        with pytest.raises(CapabilityError, match=f"none at {place} of 4"):
            estimator.estimate(model, squared, estimator.init(model, B), window)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k1": 0, "k_trunc": 1}, "k1 of SparseAttentiveBacktracking was expected"),
        ({"k1": 4, "k_trunc": 2.0}, "k_trunc of SparseAttentiveBacktracking was expected"),
        ({"k1": 4, "k_trunc": 2, "lookback": True}, "lookback of SparseAttentiveBacktracking was expected"),
        ({"k1": 4, "k_trunc": 5}, "k_trunc of at most k1"),
        ({"k1": 4, "k_trunc": 2, "lookback": 3}, "lookback of at least k1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SparseAttentiveBacktracking(**settings)
    assert "hint:" in str(caught.value)
