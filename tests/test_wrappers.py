"""What is put around a model: it works, to the last bit, or is refused by name with the fix, before any update."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tbptt
from tbptt.cli.config import estimator_classes
from tbptt.errors import CapabilityError
from tbptt.recurrence import recurrences_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it

INPUTS = torch.linspace(-2, 2, 16 * 2 * 3).view(16, 2, 3).sin()
TARGETS = torch.linspace(-1, 2, 16 * 2).view(16, 2, 1).cos()

SCRIPTED = """
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.read = nn.GRUCell(3, 5), nn.Linear(5, 1)
        self.start = nn.Parameter(torch.full((5,), 0.3))
        self.register_buffer("calls", torch.zeros(1))

    @torch.jit.export
    def initial_state(self, lanes: int) -> Tensor:
        return self.start.expand(lanes, 5)

    def forward(self, inputs: Tensor, state: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        if state is None:
            state = self.initial_state(inputs.shape[1])
        rows: List[Tensor] = []
        self.calls = self.calls + 1
        for each in inputs:
            state = self.cell(each, state)
            rows.append(self.read(state))
        return torch.stack(rows), state
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], nn.Module]:
    """Return what makes the model: from a file, as TorchScript reads its source."""
    path = tmp_path_factory.mktemp("scripted") / "scripted_net.py"
    path.write_text(SCRIPTED)
    spec = importlib.util.spec_from_file_location("scripted_net", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return module.Net()

    return build


@pytest.fixture(scope="module")
def _group() -> Iterator[None]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@contextmanager
def quiet() -> Iterator[None]:
    """Let other libraries warn of their own deprecations while they wrap."""
    with catch_warnings():
        simplefilter("ignore")
        yield


def of_package(package: str, name: str, base: type = nn.Module, **members: Any) -> type:
    """Return a class that says that it is of a package that is not installed here."""
    return type(name, (base,), {"__module__": package, **members})


class Wraps(nn.Module):
    """Wraps another module under the name that the wrappers of libraries use, and does nothing."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.module(inputs, state)


class Keeps(Wraps):
    """As `Wraps`, with the initial state of what it wraps."""

    def initial_state(self, lanes: int) -> Tensor:
        return self.module.initial_state(lanes)


class HandsOn(Wraps):
    """As `Wraps`, with all attributes of what it wraps, as PEFT's wrappers have them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def scripted(net: nn.Module) -> nn.Module:
    with quiet():
        return torch.jit.script(net)


def prepared(net: nn.Module, precision: str) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with quiet():
        return accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(net)


def set_up(net: nn.Module) -> nn.Module:
    fabric = pytest.importorskip("lightning.fabric")
    with quiet():
        return fabric.Fabric(accelerator="cpu", devices=1).setup(net)


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


def sharded(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    with quiet():
        fully_shard(net)
    return net


def sharded_first(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with quiet():
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"))


def tensor_parallel(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    with quiet():
        whole = distribute_tensor(net.read.weight.detach(), init_device_mesh("cpu", (1,)))
    net.read.weight = nn.Parameter(whole)
    return net


def engine(net: nn.Module) -> nn.Module:
    return of_package("deepspeed.runtime.engine", "DeepSpeedEngine", Keeps)(net)


def zero_three(net: nn.Module) -> nn.Module:
    next(net.parameters()).ds_id = 0
    return net


class Lora(nn.Module):
    """A linear layer with an adapter of rank one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.full((1, layer.in_features), 0.1))
        self.b = nn.Parameter(torch.zeros(layer.out_features, 1))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + inputs @ self.a.T @ self.b.T


@dataclass
class Settings:
    is_prompt_learning: bool


def peft(net: nn.Module, prompt: bool = False) -> nn.Module:
    made = of_package("peft.peft_model", "PeftModel", HandsOn)(net)
    made.peft_config = {"default": Settings(prompt)}
    return made


def adapted(net: nn.Module) -> nn.Module:
    net.requires_grad_(False)
    net.read = Lora(net.read)
    return peft(net)


WORKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a wrapper that does nothing": Keeps,
    "TorchScript": scripted,
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "Module.compile": compiled_in_place,
    "Accelerate": lambda net: prepared(net, "no"),
    "PEFT": peft,
}

REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "DDP": (nn.parallel.DistributedDataParallel, "the model is a DistributedDataParallel: it averages", "model.module"),
    "DDP inside": (
        lambda net: Keeps(nn.parallel.DistributedDataParallel(net)),
        "its module is a DistributedDataParallel",
        "accelerator.unwrap_model",
    ),
    "DDP compiled": (
        lambda net: torch.compile(nn.parallel.DistributedDataParallel(net), backend="eager"),
        "its _orig_mod is a DistributedDataParallel",
        "accelerate_loop.py",
    ),
    "DataParallel": (nn.DataParallel, "DataParallel: it cuts dimension 0", "on one device"),
    "FSDP": (sharded_first, "FullyShardedDataParallel: its parameters are cut up", "before it was wrapped"),
    "FSDP2": (sharded, "FSDPModule: its parameters are cut up", "leave fully_shard"),
    "DTensor": (tensor_parallel, "its read.weight is a DTensor|read.weight is a DTensor", "whole parameters"),
    "Fabric": (set_up, "_FabricModule: its precision", "torch.autocast"),
    "DeepSpeed": (engine, "DeepSpeedEngine: it scales", "before deepspeed.initialize"),
    "ZeRO-3": (zero_three, "ZeRO keeps a part", "without DeepSpeed"),
    "PEFT, prompts": (lambda net: peft(net, prompt=True), "PeftModel with a learned prompt", "LoraConfig"),
}


def gradients(model: nn.Module, estimator: tbptt.Estimator) -> list[Tensor]:
    """The gradients of the last of four windows, the second and fourth of which have resets."""
    carry, estimate = estimator.init(model, 2), None
    for begin in range(0, 16, 4):
        reset = torch.zeros(4, 2, dtype=torch.bool)
        reset[2, 1] = begin in (4, 12)
        window = tbptt.Window(INPUTS[begin : begin + 4], TARGETS[begin : begin + 4], reset=reset)
        estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
    assert estimate is not None
    return list(estimate.gradients.values())


ESTIMATORS = {
    "within": tbptt.TBPTT(4, 4),
    "tail": tbptt.TBPTT(4, 2),
    "recompute": tbptt.TBPTT(4, 10),
    "retain": tbptt.TBPTT(4, 10, replay="retain"),
    "full": tbptt.FullBPTT(4, segment=3),
    "RTRL": tbptt.RTRL(4),
    "PES": tbptt.PES(4, 4, 0.1),
}


@pytest.mark.parametrize("wrapper", WORKS)
def test_it_works(net, wrapper: str) -> None:
    for name, estimator in ESTIMATORS.items():
        wanted = gradients(net(), estimator)
        found = gradients(WORKS[wrapper](net()), estimator)
        assert all(map(torch.equal, wanted, found)), name
        assert len(wanted) == len(found) == 7
        assert all(each.any() for each in found), name


@pytest.mark.parametrize("wrapper", WORKS)
def test_check_and_the_trainer_take_it(net, wrapper: str) -> None:
    """It starts at the model's own initial state; without that, a lane that is reset would not restart."""
    model = WORKS[wrapper](net())
    stream = tbptt.ArrayStream(INPUTS.flatten(0, 1), TARGETS.flatten(0, 1), lanes=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [each.detach().clone() for each in model.parameters()]
    tbptt.Trainer(model, nn.MSELoss(), optimizer, tbptt.TBPTT(4, 10), stream).run(updates=3)
    assert not any(map(torch.equal, before, model.parameters()))
    report = tbptt.check(model, INPUTS, tbptt.TBPTT(4, 10))
    assert report, report


def test_accelerates_mixed_precision_works(net) -> None:
    wanted = gradients(net(), tbptt.TBPTT(4, 10))
    found = gradients(prepared(net(), "bf16"), tbptt.TBPTT(4, 10))
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(wanted, found, strict=True))
    assert not any(map(torch.equal, wanted, found))  # or it would not have been in another precision


def test_peft_trains_its_adapters_alone(net) -> None:
    model = adapted(net())
    carry = tbptt.TBPTT(4, 10).init(model, 2)
    estimate, _ = tbptt.TBPTT(4, 10).estimate(model, nn.MSELoss(), carry, tbptt.Window(INPUTS[:4], TARGETS[:4]))
    assert sorted(estimate.gradients) == ["module.read.a", "module.read.b"]


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("wrapper", REFUSED)
def test_it_is_refused_by_name_with_the_fix(net, wrapper: str) -> None:
    wrap, why, fix = REFUSED[wrapper]
    model = wrap(net())
    stream = tbptt.ArrayStream(INPUTS.flatten(0, 1), TARGETS.flatten(0, 1), lanes=2)
    optimizer = torch.optim.SGD(net().parameters(), 0.1)
    tries: list[Callable[[], object]] = [
        lambda: tbptt.check(model, INPUTS),
        lambda: tbptt.Trainer(model, nn.MSELoss(), optimizer, tbptt.TBPTT(4, 4), stream).run(updates=1),
        lambda: tbptt.horizon.measure(model, nn.MSELoss(), stream),
    ]
    for kind in estimator_classes().values():
        tries.append(lambda kind=kind: kind.examples()[0].init(model, 2))
    for each in tries:
        with pytest.raises(CapabilityError, match=why) as caught:
            each()
        assert fix in caught.value.fix


def test_what_is_only_called_so_is_not_refused(net) -> None:
    """A class of one's own is no wrapper of a library, whatever its name."""
    model = type("DistributedDataParallel", (Keeps,), {})(net())
    assert len(gradients(model, tbptt.TBPTT(4, 4))) == 7


def test_a_compiled_model_says_what_it_is_made_of() -> None:
    model = torch.compile(tbptt.SequenceModel(3, 1, hidden=4, core="lru"), backend="eager")
    named = [name for each in recurrences_of(model) for name in each.parameters]
    assert named
    assert set(named) < {name for name, _ in model.named_parameters()}
    with pytest.raises(CapabilityError, match="batch_first"):
        tbptt.TBPTT(4, 4).init(torch.compile(nn.GRU(3, 5, batch_first=True), backend="eager"), 2)
    assert tbptt.scan(torch.compile(nn.GRUCell(3, 5), backend="eager"))(INPUTS)[0].shape == (16, 2, 5)


@pytest.mark.slow
def test_the_recurrences_of_a_compiled_model_are_followed() -> None:
    """Its weights have other names, and those that it named itself were taken for frozen ones, in silence."""
    core = tbptt.SequenceModel(3, 1, hidden=4, core="lru")
    estimator = tbptt.ElementwiseRTRL(4)
    wanted = gradients_of_flat(core, estimator)
    found = gradients_of_flat(torch.compile(core, backend="eager"), estimator)
    assert all(map(torch.equal, wanted, found))


def gradients_of_flat(model: nn.Module, estimator: tbptt.Estimator) -> list[Tensor]:
    carry, estimate = estimator.init(model, 2), None
    for begin in range(0, 16, 4):
        window = tbptt.Window(INPUTS[begin : begin + 4], TARGETS[begin : begin + 4, :, 0])
        estimate, carry = estimator.estimate(model, nn.MSELoss(), carry, window)
    assert estimate is not None
    return list(estimate.gradients.values())


class TestTransformers:
    TOKENS = torch.arange(24 * 2).view(24, 2) % 7

    def mamba2(self) -> Any:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes = {"vocab_size": 7, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16}
        config = transformers.Mamba2Config(**sizes, state_size=4, n_groups=1, chunk_size=8)
        return transformers.Mamba2ForCausalLM(config)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_is_refused(self, reentrant: bool) -> None:
        """It drops the cache in training mode; that was taken for a model that keeps its state in attributes."""
        from tbptt.integrations.transformers import recurrent

        module = self.mamba2()
        model = recurrent(module)
        with quiet():
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for each in (lambda: recurrent(module), lambda: tbptt.TBPTT(4, 4).init(model, 2)):
            with pytest.raises(CapabilityError, match="Mamba2ForCausalLM with gradient checkpointing") as caught:
                each()
            assert "gradient_checkpointing_disable()" in caught.value.fix
        with quiet():
            module.gradient_checkpointing_disable()
        assert tbptt.TBPTT(4, 4).init(model, 2).state is None

    def test_a_model_with_adapters_of_peft_carries_its_state(self) -> None:
        """PEFT's wrapper takes the cache by **kwargs: that was taken for a model without a state."""
        from tbptt.integrations.transformers import recurrent

        plain = self.mamba2().requires_grad_(False)
        plain.lm_head = Lora(plain.lm_head)

        def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
            return self.module(input_ids=input_ids, attention_mask=attention_mask, **more)

        members = {"forward": forward, "get_base_model": lambda self: self.module}
        wrapped = of_package("peft.peft_model", "PeftModel", HandsOn, **members)(plain)
        model = recurrent(wrapped)
        report = tbptt.check(model, self.TOKENS)
        assert not [item for item in report.items if item.name == "value carry" and not item.passed], report
        whole, _ = model(self.TOKENS)
        first, state = model(self.TOKENS[:8])
        second, _ = model(self.TOKENS[8:], state)
        torch.testing.assert_close(torch.cat([first, second]), whole)


RANKS = """
import torch
import torch.distributed as dist

import tbptt

dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.GRU(3, 1))
try:
    tbptt.TBPTT(k1=16, k2=16).init(model, 2)
except tbptt.errors.CapabilityError as error:
    print("refused", dist.get_rank(), error.message.split(" is a ")[1].split(":")[0], flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_do_not_drift_apart(tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, str(tmp_path / "ranks.py")], capture_output=True, text=True, check=True)
    found = sorted(line for line in done.stdout.splitlines() if line.startswith("refused"))
    assert found == ["refused 0 DistributedDataParallel", "refused 1 DistributedDataParallel"]
