"""Models as users write them, each with a plain twin, and a setting of every estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from systems import Forgetful
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tbptt
from tbptt import Window
from tbptt.estimators.base import Estimate, Estimator

B, D, H = 2, 2, 3

SETTINGS: dict[str, Estimator] = {
    "TBPTT equal": tbptt.TBPTT(3, 3),
    "TBPTT tail": tbptt.TBPTT(3, 2),
    "TBPTT all": tbptt.TBPTT(3, 2, losses="all"),
    "TBPTT recompute": tbptt.TBPTT(3, 7),
    "TBPTT retain": tbptt.TBPTT(3, 7, replay="retain"),
    "TBPTT clipped": tbptt.TBPTT(3, 7, boundary=tbptt.ClipBoundary(0.01)),
    "FullBPTT": tbptt.FullBPTT(3, segment=2),
    "FullBPTT few": tbptt.FullBPTT(3, segment=2, checkpoints=2),
    "ARTBP": tbptt.ARTBP(mean_length=4, seed=1),
    "Telescope": tbptt.Telescope(3, (3, 6)),
    "Mixture": tbptt.Mixture(3, 3, 6, 0.5),
    "SyntheticGradients": tbptt.SyntheticGradients(3, lambda_=0.5),
    "SparseAttentiveBacktracking": tbptt.SparseAttentiveBacktracking(4, 2, lookback=7),
    "RTRL": tbptt.RTRL(3),
    "ElementwiseRTRL": tbptt.ElementwiseRTRL(3),
    "SnAp": tbptt.SnAp(3),
    "UORO": tbptt.UORO(3),
    "KFRTRL": tbptt.KFRTRL(3),
    "RFLO": tbptt.RFLO(3, leak=0.3),
    "EProp": tbptt.EProp(3),
    "TruncatedES": tbptt.TruncatedES(3, 4, 0.1),
    "PES": tbptt.PES(3, 4, 0.1),
    "ESSingle": tbptt.ESSingle(3, 4, 0.1),
}
FORWARD = ("RTRL", "ElementwiseRTRL", "SnAp", "UORO", "KFRTRL", "RFLO", "EProp")
STEPS = {name: 7 for name in (*FORWARD, "TruncatedES", "PES", "ESSingle")}  # two windows and a part; others look back
LONGEST = 16
OFTEN = {
    *("TBPTT equal", "TBPTT tail", "TBPTT recompute", "TBPTT retain", "FullBPTT", "ARTBP", "SyntheticGradients"),
    *("SparseAttentiveBacktracking", "RTRL", "ElementwiseRTRL", "UORO", "RFLO", "PES"),
}
"""The others share all that could differ with one of these, and run with the slow tests."""

NO_COPIES = "reach(es)? it in another way"
SPARSE = "is sparse"
NOT_ONE_MAP = "a recurrence of one linear map"  # what is before the recurrence is no part of its Kronecker product
REFUSED: dict[tuple[str, str], str] = {
    **{("list before the state", name): NO_COPIES for name in FORWARD},
    **{("function by backward() before the state", name): NO_COPIES for name in FORWARD},
    **{("sparse embedding", name): SPARSE for name in FORWARD},
    ("function of its parameters before the state", "KFRTRL"): NOT_ONE_MAP,
    ("tied softmax", "KFRTRL"): NOT_ONE_MAP,
}


class Tanh(nn.Module):
    """h' = tanh(W (x, h) + b), which shows the very state that it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again = nn.Linear(D, H), nn.Linear(H, H, bias=False)

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = inputs.new_zeros(inputs.shape[1], H) if state is None else state
        outputs = []
        for step in inputs:
            state = torch.tanh(self.enter(step) + self.again(state))
            outputs.append(state)
        return torch.stack(outputs), state


class Looking(nn.Module):
    """A layer that looks up its own past, its two parts joined."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = tbptt.models.Attentive(nn.GRU(D, H), k_att=2, k_top=2, memory=4)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        outputs, state = self.layer(inputs, state)
        return outputs.unflatten(-1, (2, H)).sum(-2), state


CORES = {"ElementwiseRTRL": lambda: Forgetful(D, H), "SparseAttentiveBacktracking": Looking}


class Net(nn.Module):
    """A core between a way in and a way out; a variant says how they are called."""

    def __init__(self, core: nn.Module, *, symbols: int = 0, sparse: bool = False, enter: bool = False) -> None:
        super().__init__()
        self.core = core
        self.head = nn.Linear(H, D)
        if symbols:
            self.embedding = nn.Embedding(symbols, D, sparse=sparse)
        if enter:
            self.gain, self.enter = nn.Parameter(torch.full((D,), 0.7)), nn.Linear(D, D)
        self.way_in: Callable[[Tensor], Tensor] = lambda given: self.enter(given)
        self.way_out: Callable[[Tensor], Tensor] = lambda found: self.head(found)
        self.run_core: Callable[..., Any] = lambda given, state: self.core(given, state)

    def recurrences(self) -> tuple[tbptt.Recurrence, ...]:
        return (tbptt.Recurrence(0, tuple(f"core.{name}" for name in ("gate", "own", "bias", "drive"))),)

    def memories(self) -> tuple[int, ...]:
        return self.core.layer.memories() if isinstance(self.core, Looking) else ()

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        given = self.embedding(inputs) if hasattr(self, "embedding") else inputs
        given = self.way_in(given * self.gain) if hasattr(self, "gain") else given
        found, state = self.run_core(given, state)
        return self.way_out(found), state


class Scaled(nn.Module):
    """A loss with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, D))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * self.scale - targets).square().sum(-1)


class ByInputs(torch.autograd.Function):
    """Calls a module again in its backward pass; the weights are among its inputs."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, given: Tensor, *weights: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(given)
        return module(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            found = ctx.module(given)
        return None, *torch.autograd.grad(found, [given, *ctx.module.parameters()], gradients)


class ByBackward(torch.autograd.Function):
    """Likewise, with a backward() of its own, which leaves the weights' gradients in `.grad`."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, given: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(given)
        return module(given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            ctx.module(given).backward(*gradients)
        return None, given.grad


def by_list(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weights = [module.weight, module.bias]
    return lambda given: F.linear(given, *weights)


def by_inputs(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda given: ByInputs.apply(module, given, *module.parameters())


def by_backward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda given: ByBackward.apply(module, given)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


@dataclass
class Case:
    """A model with its loss, and how its gradients are called in the plain twin."""

    net: Net
    loss: Any = squared
    renamed: Callable[[str], str] = lambda name: name
    finished: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient
    special: tuple[str, ...] = ()


def clamped(gradient: Tensor) -> Tensor:
    """A hook that is no linear function: one call for each part of the gradient is another thing."""
    return gradient.clamp(-1e-2, 1e-2)


def criterion_inside(core: nn.Module, plain: bool) -> Case:
    net, criterion = Net(core), Scaled()
    if plain:
        return Case(net, criterion)
    net.criterion = criterion
    return Case(net, lambda outputs, targets: net.criterion(outputs, targets), special=("criterion.scale",))


def tied(core: nn.Module, plain: bool) -> Case:
    net = Net(core, symbols=5)
    if plain:
        net.way_out = lambda found: F.linear(net.head(found), net.embedding.weight)
        return Case(net, nn.CrossEntropyLoss())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(outputs, net.embedding.weight).movedim(-1, 1), targets, reduction="none")

    return Case(net, loss, special=("embedding.weight",))


def way_in(way: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Callable[[nn.Module, bool], Case]:
    def made(core: nn.Module, plain: bool) -> Case:
        net = Net(core, enter=True)
        if not plain:
            net.way_in = way(net.enter)
        return Case(net, special=("enter.weight",))

    return made


def way_out(way: Callable[[nn.Linear], Callable[[Tensor], Tensor]]) -> Callable[[nn.Module, bool], Case]:
    def made(core: nn.Module, plain: bool) -> Case:
        net = Net(core)
        if not plain:
            net.way_out = way(net.head)
        return Case(net, special=("head.weight",))

    return made


def checkpointed(core: nn.Module, plain: bool) -> Case:
    net = Net(core)
    if not plain:
        net.run_core = lambda given, state: checkpoint(net.core, given, state, use_reentrant=False)
    return Case(net)


def masked(core: nn.Module, plain: bool) -> Case:
    net = Net(core)
    if plain:
        return Case(net, finished=lambda name, each: clamped(each) if name.startswith(("core", "head.w")) else each)
    for name, each in net.named_parameters():
        if name.startswith(("core", "head.w")):
            each.register_hook(clamped)
    return Case(net, special=("head.weight",))


def frozen(core: nn.Module, plain: bool) -> Case:
    net = Net(core)
    if not plain:
        net.head.weight.requires_grad_(False)
        return Case(net)
    weight = net.head.weight.detach().double()
    del net.head.weight
    net.head.register_buffer("weight", weight)
    return Case(net)


def unused(core: nn.Module, plain: bool) -> Case:
    net = Net(core)
    if not plain:
        net.other = nn.Linear(H, 1)
    return Case(net)


def sparse(core: nn.Module, plain: bool) -> Case:
    return Case(Net(core, symbols=5, sparse=not plain), special=("embedding.weight",))


VARIANTS: dict[str, Callable[[nn.Module, bool], Case]] = {
    "criterion as submodule": criterion_inside,
    "tied softmax": tied,
    "list before the state": way_in(by_list),
    "list after the state": way_out(by_list),
    "activation checkpointing": checkpointed,
    "function of its parameters before the state": way_in(by_inputs),
    "function of its parameters after the state": way_out(by_inputs),
    "function by backward() before the state": way_in(by_backward),
    "function by backward() after the state": way_out(by_backward),
    "hook": masked,
    "frozen part": frozen,
    "unused head": unused,
    "sparse embedding": sparse,
}


def case_of(variant: str, setting: str, *, plain: bool) -> Case:
    """The same weights for a variant and its plain twin."""
    torch.manual_seed(3)
    case = VARIANTS[variant](CORES.get(setting, Tanh)(), plain)
    case.net.double()
    if isinstance(case.loss, nn.Module):
        case.loss.double()
    return case


def data_of(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    symbols = torch.randint(5, (LONGEST + 1, B), generator=generator)
    numbers = torch.randn(2, LONGEST, B, D, generator=generator, dtype=torch.float64)
    with_symbols = hasattr(case.net, "embedding")
    targets = symbols[1:] if with_symbols and case.loss is not squared else numbers[1]
    return symbols[:-1] if with_symbols else numbers[0], targets


def estimates_of(case: Case, estimator: Estimator, *, steps: int = LONGEST, rate: float = 0.05) -> list[Estimate]:
    """The estimates over the sequence, with weights that move after each."""
    inputs, targets = data_of(case)
    estimator.prepare(case.net, inputs[:3])
    carry, at, found = estimator.init(case.net, B), 0, list[Estimate]()
    whole = [case.net, case.loss] if isinstance(case.loss, nn.Module) else [case.net]
    optimizer = torch.optim.SGD([each for module in whole for each in module.parameters()], lr=rate)
    while at < steps:
        end = min(steps, at + estimator.next_steps(carry))
        estimate, carry = estimator.estimate(
            case.net, case.loss, carry, Window(inputs[at:end], targets[at:end], start=at)
        )
        found.append(estimate)
        at = end
        changed = {name: case.finished(name, each) for name, each in estimate.all_gradients.items()}
        estimate.with_gradients(changed).apply(case.net, case.loss)
        optimizer.step()
    return found


EXACT: dict[str, Estimator] = {
    "FullBPTT": tbptt.FullBPTT(3),
    "TBPTT recompute": tbptt.TBPTT(3, 60),
    "TBPTT retain": tbptt.TBPTT(3, 60, replay="retain"),
    "RTRL": tbptt.RTRL(3),
    "ElementwiseRTRL": tbptt.ElementwiseRTRL(3),
}
