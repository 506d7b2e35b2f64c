"""Who gets a gradient, and what becomes of it: hooks, sparse ones, unused parameters, graphs from outside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from users_models import SETTINGS, B, ByBackward, ByInputs, Net, Tanh, case_of, data_of, estimates_of, squared

import tbptt
from tbptt import TBPTT, Window
from tbptt.errors import CapabilityError, ConfigError
from tbptt.estimators.gradients import add, numbers_of, own
from tbptt.guards import AdaptiveClip, ClipNorm, ClipValue, NonFinite

RETAIN = TBPTT(3, 7, replay="retain")


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_graph_from_outside_is_refused(setting: str) -> None:
    """Whatever has made the inputs, the targets or the state would never be trained, and its graph never freed."""
    estimator, case = SETTINGS[setting], case_of("hook", setting, plain=False)
    (inputs, targets), seen = data_of(case), torch.ones(1).double().requires_grad_()
    estimator.prepare(case.net, inputs[:3])
    carry = estimator.init(case.net, B)
    steps = estimator.next_steps(carry) if estimator.next_steps(carry) < 20 else 3
    for given in ((inputs * seen, targets), (inputs, targets * seen)):
        with pytest.raises(CapabilityError, match="without a graph"):
            estimator.estimate(case.net, squared, carry, Window(given[0][:steps], given[1][:steps]))
    _, carry = estimator.estimate(case.net, squared, carry, Window(inputs[:steps], targets[:steps]))
    chain = next(each for each in (carry, *vars(carry).values()) if "state" in vars(each))
    chain.state = tbptt.tree.tree_map(lambda leaf: leaf * seen if leaf.is_floating_point() else leaf, chain.state)
    steps = min(steps, estimator.next_steps(carry))
    with pytest.raises(CapabilityError, match="a carried state without a graph"):
        estimator.estimate(case.net, squared, carry, Window(inputs[:steps], targets[:steps], start=3))


def test_a_losses_gradients_are_not_left_behind() -> None:
    case = case_of("criterion as submodule", "TBPTT equal", plain=True)
    estimate = estimates_of(case, TBPTT(3, 3))[-1]
    with pytest.raises(ConfigError, match="scale"):
        estimate.apply(case.net)


def test_weight_decay_leaves_an_unused_head_alone() -> None:
    case = case_of("unused head", "TBPTT equal", plain=False)
    before = {name: each.detach().clone() for name, each in case.net.named_parameters()}
    optimizer = torch.optim.AdamW(case.net.parameters(), 1e-2, weight_decay=0.5)
    for estimate in estimates_of(case, TBPTT(3, 7), rate=0.0):
        estimate.apply(case.net)
        optimizer.step()
    moved = {name for name, each in case.net.named_parameters() if not each.equal(before[name])}
    assert moved == {name for name in before if not name.startswith("other")}


def test_hooks_after_accumulation_are_called_once_an_update() -> None:
    """The optimizer in the backward pass, as it is known from large models, is the same training."""

    def trained(within: bool) -> dict[str, Tensor]:
        case, calls = case_of("unused head", "TBPTT equal", plain=False), []
        if within:
            for each in case.net.parameters():
                single = torch.optim.SGD([each], lr=0.05)
                each.register_post_accumulate_grad_hook(lambda p, by=single: (calls.append(p), by.step()))
        found = estimates_of(case, RETAIN, rate=0.0 if within else 0.05)
        assert len(calls) == (sum(len(each.gradients) for each in found) if within else 0)
        return case.net.state_dict()

    for name, each in trained(True).items():
        assert each.equal(trained(False)[name]), name


def test_grad_is_left_as_it_stood() -> None:
    case = case_of("function by backward() before the state", "TBPTT equal", plain=False)
    inputs, targets = data_of(case)
    standing = {name: torch.full_like(each, 7.0) for name, each in case.net.named_parameters()}
    for name, each in case.net.named_parameters():
        each.grad = standing[name]
    TBPTT(3, 7).estimate(case.net, squared, TBPTT(3, 7).init(case.net, B), Window(inputs[:3], targets[:3]))
    for name, each in case.net.named_parameters():
        assert each.grad is standing[name]
        assert bool((standing[name] == 7.0).all())


def test_checkpointing_of_the_older_kind_is_refused_with_the_fix() -> None:
    case = case_of("function of its parameters before the state", "TBPTT equal", plain=True)
    case.net.run_core = lambda given, state: checkpoint(case.net.core, given, state, use_reentrant=True)
    with pytest.raises(CapabilityError, match="use_reentrant=False"):
        estimates_of(case, TBPTT(3, 3))


@pytest.mark.parametrize("function", [ByInputs, ByBackward])
def test_a_recurrence_of_a_function_that_is_differentiated_once(function: Any) -> None:
    """UORO goes back twice, and sees that it cannot; the others go back once."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.again = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)
            self.plain = False

        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            state = self.gain.expand(inputs.shape[1], 2) if state is None else state
            outputs = []
            for step in inputs:
                weights = () if function is ByBackward else self.again.parameters()
                given = state * self.gain  # requires a gradient, as torch asks of a function's input
                state = torch.tanh(
                    step + (self.again(given) if self.plain else function.apply(self.again, given, *weights))
                )
                outputs.append(state)
            return torch.stack(outputs), state

    def found(estimator: tbptt.Estimator, plain: bool) -> list[tbptt.Estimate]:
        torch.manual_seed(0)
        model = Step().double()
        model.plain = plain
        inputs, carry, found = torch.randn(12, B, 2).double(), estimator.init(model, B), list[tbptt.Estimate]()
        for at in range(0, 12, 3):
            window = Window(inputs[at : at + 3], inputs[at : at + 3], start=at)
            estimate, carry = estimator.estimate(model, squared, carry, window)
            estimate.apply(model)
            torch.optim.SGD(model.parameters(), 0.05).step()
            found.append(estimate)
        return found

    takes = [TBPTT(3, 3), TBPTT(3, 7), RETAIN, tbptt.FullBPTT(3, segment=2)]
    if function is ByInputs:
        takes.append(tbptt.RTRL(3))
    for estimator in takes:
        for one, other in zip(found(estimator, False), found(estimator, True), strict=True):
            assert one.gradients.keys() == other.gradients.keys()
            for name, each in one.gradients.items():
                torch.testing.assert_close(each, other.gradients[name], rtol=1e-10, atol=1e-12)
    for estimator in (tbptt.UORO(3), *([] if function is ByInputs else [tbptt.RTRL(3)])):
        found(estimator, True)
        with pytest.raises(CapabilityError, match=r"differentiated twice|in another way"):
            found(estimator, False)


def test_particles_side_by_side_use_no_weight_but_as_an_attribute() -> None:
    for variant, expected in (("list after the state", 0.0), ("hook", 1.0)):
        case = case_of(variant, "PES", plain=False)
        assert estimates_of(case, tbptt.PES(3, 4, 0.1), steps=6)[-1].metrics["vectorized"] == expected
    case = case_of("list after the state", "PES", plain=False)
    with pytest.raises(CapabilityError, match=r"head\.bias, head\.weight would not be perturbed"):
        estimates_of(case, tbptt.PES(3, 4, 0.1, vectorize=True))


# Sparse gradients


class Words(nn.Module):
    """A small language model."""

    def __init__(self, *, sparse: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, sparse=sparse, padding_idx=padding)
        self.core, self.head = nn.GRU(4, 4), nn.Linear(4, 20)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, state = self.core(self.embedding(inputs), state)
        return self.head(outputs), state


def words(sparse: bool, estimator: tbptt.Estimator, guard: Any, *, adam: bool) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(1)
    model, text, norms = Words(sparse=sparse).double(), torch.randint(20, (49, B)), list[float]()
    rest = [each for name, each in model.named_parameters() if not name.startswith("embedding")]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(rest, 0.1)]
    rows = [model.embedding.weight]
    optimizers.append(torch.optim.SparseAdam(rows, 0.1) if adam else torch.optim.SGD(rows, 0.1))
    carry = estimator.init(model, B)
    if isinstance(guard, AdaptiveClip):
        guard.begin(model)
    for at in range(0, 48, 4):
        window = Window(text[at : at + 4], text[at + 1 : at + 5], start=at)
        estimate, carry = estimator.estimate(model, nn.CrossEntropyLoss(), carry, window)
        estimate = estimate if guard is None else guard(estimate)
        norms.append(float(estimate.gradient_norm()))
        assert estimate.gradients["embedding.weight"].is_sparse == sparse
        estimate.apply(model)
        for each in optimizers:
            each.step()
    return norms, model.state_dict()


@pytest.mark.parametrize("estimator", [TBPTT(4, 4), TBPTT(4, 9, replay="retain"), tbptt.Mixture(4, 4, 9, 0.5)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: ClipNorm(0.05, allow_bias=True),
        lambda: ClipValue(0.01, allow_bias=True),
        NonFinite,
        lambda: AdaptiveClip(0.01, allow_bias=True),
    ],
    ids=["none", "norm", "value", "finite", "adaptive"],
)
def test_sparse_rows_are_trained_as_dense_ones(estimator: tbptt.Estimator, make: Any) -> None:
    (norms, found), (plain, wanted) = (words(sparse, estimator, make(), adam=False) for sparse in (True, False))
    assert norms == pytest.approx(plain, rel=1e-10)
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], rtol=1e-10, atol=1e-12)


def test_lazy_adam_takes_them() -> None:
    torch.manual_seed(1)
    model, text, carry = Words(sparse=True).double(), torch.randint(20, (49, B)), None
    rest = [each for name, each in model.named_parameters() if not name.startswith("embedding")]
    optimizers = [torch.optim.SGD(rest, 0.1), torch.optim.SparseAdam([model.embedding.weight], 0.1)]
    for at in range(0, 48, 4):  # a plain loop
        outputs, carry = model(text[at : at + 4], None if carry is None else carry.detach())
        for each in optimizers:
            each.zero_grad()
        F.cross_entropy(outputs.flatten(0, 1), text[at + 1 : at + 5].flatten()).backward()
        for each in optimizers:
            each.step()
    for name, each in words(True, TBPTT(4, 4), None, adam=True)[1].items():
        torch.testing.assert_close(each, model.state_dict()[name], rtol=1e-10, atol=1e-12)


def test_a_sparse_nan_is_found_and_sums_are_taken_with_dense_ones() -> None:
    rows = torch.sparse_coo_tensor([[1, 1]], [[1.0, 2.0], [3.0, 4.0]], (3, 2), check_invariants=True)
    full = torch.ones(3, 2)
    for left, right in (([rows, full], [full, rows]), ([rows, rows], [rows, rows])):
        for found, pair in zip(add(left, right), zip(left, right, strict=True), strict=True):
            assert found is not None
            assert found.to_dense().equal(pair[0].to_dense() + pair[1].to_dense())
    assert numbers_of(own(["a"], [rows])["a"]).tolist() == [[4.0, 6.0]]
    case = case_of("sparse embedding", "TBPTT equal", plain=False)
    estimate = estimates_of(case, TBPTT(3, 3))[-1]
    broken = estimate.gradients | {"embedding.weight": estimate.gradients["embedding.weight"] * float("nan")}
    for guard in (NonFinite(), ClipNorm(1.0)):
        with pytest.raises(tbptt.errors.NonFiniteError, match=r"embedding\.weight"):
            guard(estimate.with_gradients(broken))


# Graphs that outlive the weights


def retained(
    net: nn.Module, *, restart: int | None = None, swap: int | None = None, dtype: Any = torch.float64
) -> list[Any]:
    """The estimates of 7 windows, with a restart or a copy of the model in between."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(21, B, 2, generator=generator, dtype=torch.float64).to(dtype)
    carry, found = RETAIN.init(net, B), []
    for number, at in enumerate(range(0, 21, 3)):
        window = Window(inputs[at : at + 3], inputs[at : at + 3], start=at)
        estimate, carry = RETAIN.estimate(net, squared, carry, window)
        found.append(estimate.gradients)
        estimate.apply(net)
        torch.optim.SGD(net.parameters(), 0.1).step()
        if number == restart:
            state, carry = copy.deepcopy(carry.state_dict()), RETAIN.init(net, B)
            carry.load_state_dict(state)
        if number == swap:
            net = copy.deepcopy(net)
    return found


def close(found: list[Any], wanted: list[Any], rtol: float = 1e-10) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=rtol)


def fresh(core: nn.Module | None = None, dtype: Any = torch.float64) -> Net:
    torch.manual_seed(3)
    return Net(Tanh() if core is None else core).to(dtype)


def test_a_restart_and_a_copied_model_go_on_as_if_nothing_had_happened() -> None:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return tbptt.SequenceModel(inputs=2, outputs=2, hidden=3).double()

    wanted = retained(made())
    close(retained(made(), restart=3), wanted)
    close(retained(made(), swap=3), wanted)


def test_views_of_weights_that_were_made_once() -> None:
    """A transposed view has another shape and strides, and is no parameter; a graph saves it all the same."""
    net = fresh()
    weight, bias = net.head.weight.t(), net.head.bias
    net.way_out = lambda found: found @ weight.detach() + bias  # its values; the gradient goes to the bias alone
    plain = fresh()
    plain.way_out = lambda found: found @ plain.head.weight.detach().t() + plain.head.bias
    close(retained(net), retained(plain))


def test_a_weight_that_the_model_writes_to_itself() -> None:
    """As an embedding with max_norm does: what is saved after that is what was used."""

    class Shrinking(Tanh):
        def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                self.enter.weight.mul_(0.9)
            return super().forward(inputs, state)

    nets = []
    for core in (Shrinking, Tanh):
        torch.manual_seed(3)
        nets.append(Net(core()).double())
    estimator, seen = TBPTT(3, 6, replay="retain"), list[Any]()
    inputs = torch.randn(12, B, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    windows = [Window(inputs[at : at + 3], inputs[at : at + 3], start=at) for at in range(0, 12, 3)]
    for net, plain in zip(nets, (False, True), strict=True):
        carry = estimator.init(net, B).with_dims(net, windows[0])  # which runs it
        net.load_state_dict(nets[1].state_dict())
        for window in windows:
            if plain:  # by hand, before the window
                with torch.no_grad():
                    net.core.enter.weight.mul_(0.9)
            estimate, carry = estimator.estimate(net, squared, carry, window)
            seen.append(estimate.gradients)
    close(seen[:4], seen[4:])


def test_fused_kernels_in_single_precision() -> None:
    """torch's LSTM saves its weights in its own way; against a loop of its cell over the same weights."""

    class Cells(nn.Module):
        def __init__(self, fused: nn.LSTM) -> None:
            super().__init__()
            for name, each in fused.named_parameters():
                self.register_parameter(name, nn.Parameter(each.detach().clone()))

        def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            h, c = state or (inputs.new_zeros(inputs.shape[1], 3), inputs.new_zeros(inputs.shape[1], 3))
            outputs = []
            for step in inputs:
                both = F.linear(step, self.weight_ih_l0, self.bias_ih_l0) + F.linear(
                    h, self.weight_hh_l0, self.bias_hh_l0
                )
                i, f, g, o = both.chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            return torch.stack(outputs), (h, c)

    torch.manual_seed(3)
    fused = nn.LSTM(2, 3)
    nets = [fresh(core, torch.float32) for core in (fused, Cells(fused))]
    nets[1].load_state_dict(nets[0].state_dict())
    close(*(retained(net, dtype=torch.float32) for net in nets), rtol=1e-5)


def test_a_graph_that_holds_no_copies_would_be_refused_by_torch() -> None:
    """The control: without them an optimizer's step in place breaks the graph."""
    net = fresh()
    net.way_out = lambda found: F.linear(found, net.head.weight, net.head.bias)
    outputs, _ = net(torch.randn(3, B, 2).double())
    with torch.no_grad():
        net.head.weight.mul_(0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


@pytest.mark.parametrize("variant", ["list before the state", "function by backward() before the state"])
def test_one_lane_needs_no_copies(variant: str) -> None:
    """There the parameters themselves are used: forward mode takes what it refuses for several lanes."""
    found = []
    for plain in (False, True):
        case = case_of(variant, "RTRL", plain=plain)
        inputs, targets = (each[:, :1] for each in data_of(case))
        carry = tbptt.RTRL(3).init(case.net, 1)
        for at in (0, 3, 6):
            window = Window(inputs[at : at + 3], targets[at : at + 3], start=at)
            estimate, carry = tbptt.RTRL(3).estimate(case.net, squared, carry, window)
        found.append(estimate.gradients)
    close(found[:1], found[1:])
