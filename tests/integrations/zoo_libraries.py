"""Tiny random models of the libraries other than transformers; see `zoo`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo import ALL_RIGHT, FORGETS, NATIVE, OVERWRITES, VOCABULARY, Entry, floats, scaled, swap, tokens

import tbptt
from tbptt.tree import detach


def _quietly(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Build a module with fixed weights; what the libraries warn of when they are imported is not our affair."""

    def quiet() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build()

    return quiet


def _batch_first(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs, state = module(swap(inputs), state)
    return outputs.transpose(0, 1), state


def _one_pass(call: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]) -> Callable[[Any, Tensor], Tensor]:
    return lambda module, inputs: call(module, inputs, None)[0]


def _each_step(call: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]) -> Callable[..., tuple[Tensor, Any]]:
    def run(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs: list[Tensor] = []
        for step in inputs:
            output, state = call(module, step, state)
            outputs.append(output)
        return torch.stack(outputs), state

    return run


def _via(name: str, function: str, **arguments: Any) -> Callable[[nn.Module], nn.Module]:
    """Return the function of tbptt.integrations, imported when it is called."""
    from importlib import import_module

    return lambda module: getattr(import_module(f"tbptt.integrations.{name}"), function)(module, **arguments)


@_quietly
def xlstm_blocks() -> nn.Module:
    import xlstm

    block = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=2, qkv_proj_blocksize=4))
    scalar = xlstm.sLSTMBlockConfig(slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=2))
    config = xlstm.xLSTMBlockStackConfig(
        mlstm_block=block, slstm_block=scalar, context_length=64, num_blocks=2, embedding_dim=16, slstm_at=[1]
    )
    return xlstm.xLSTMBlockStack(config)


def xlstm_large(mode: str) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

        config = xLSTMLargeConfig(
            **{"embedding_dim": 128, "num_heads": 2, "num_blocks": 2, "vocab_size": VOCABULARY, "mode": mode},
            **{"return_last_states": True, **NATIVE},
        )
        return scaled(xLSTMLarge(config), 2.0)

    return build


def _call_xlstm(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs, state = module.step(inputs[:, None], state=state)
    return outputs[:, 0], state


@_quietly
def torchrl_policy() -> nn.Module:
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.modules import GRUModule, LSTMModule

    return TensorDictSequential(
        LSTMModule(3, 6, in_key="observation", out_key="between"),
        GRUModule(6, 5, in_keys=["between", "memory"], out_keys=["features", ("next", "memory")]),
        TensorDictModule(nn.Linear(5, 2), in_keys=["features"], out_keys=["action"]),
    )


def _call_torchrl(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A step as a collector makes it: the state under the keys, `is_init` at the start of a trajectory."""
    from tensordict import TensorDict

    lanes = inputs.shape[0]
    data = TensorDict({"observation": inputs, "is_init": torch.full((lanes, 1), state is None)}, batch_size=[lanes])
    data.update({} if state is None else state)
    result = module(data)
    return result["action"], result["next"]


@_quietly
def snntorch_network() -> nn.Module:
    import snntorch

    first = nn.Sequential(nn.Linear(3, 6), snntorch.Leaky(beta=0.9, init_hidden=True, learn_beta=True))
    return nn.Sequential(first, snntorch.SLSTM(6, 5, init_hidden=True), nn.Linear(5, 2))


def _call_snntorch(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    if state is None:
        for each in module.modules():
            if "reset_mem" in dir(each):
                each.reset_mem()
    return module(inputs), "inside"


def _detach_snntorch(module: nn.Module, state: Any) -> Any:
    for each in module.modules():
        for name, buffer in each.named_buffers(recurse=False):
            if name in ("mem", "syn"):
                setattr(each, name, buffer.detach())
    return detach(state)


def spikingjelly_network(mode: str) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        from spikingjelly.activation_based import functional, layer, neuron

        first, second = neuron.ParametricLIFNode(v_threshold=0.3), neuron.LIFNode(v_threshold=0.3, v_reset=None)
        module = nn.Sequential(layer.Linear(3, 6), first, layer.Linear(6, 4), second, layer.Linear(4, 2))
        functional.set_step_mode(module, mode)
        return scaled(module, 3.0)

    return build


def _call_spikingjelly(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    from spikingjelly.activation_based import functional

    if state is None:
        functional.reset_net(module)
    return module(inputs), "inside"


def _detach_spikingjelly(module: nn.Module, state: Any) -> Any:
    from spikingjelly.activation_based import functional

    functional.detach_net(module)
    return detach(state)


def norse_network(cells: bool) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        import norse.torch as norse

        hidden = norse.LIFCell() if cells else norse.LIF()
        recurrent = norse.LIFRecurrentCell(6, 6) if cells else norse.LIFRecurrent(6, 6)
        readout = norse.LICell() if cells else norse.LI()
        return scaled(norse.SequentialState(nn.Linear(3, 6), hidden, recurrent, nn.Linear(6, 2), readout), 8.0)

    return build


def torchrecurrent_layer(name: str) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        import torchrecurrent

        return getattr(torchrecurrent, name)(3, 6, num_layers=2, batch_first=name != "coRNN")

    return build


def ncps_network(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        import ncps.torch

        return getattr(ncps.torch, name)(3, 6, **arguments)

    return build


@_quietly
def mambapy_stack() -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=8, n_layers=2, d_state=4))


def _call_mambapy(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    config = module.config
    empty = (None, inputs.new_zeros(inputs.shape[0], config.d_inner, config.d_conv - 1))
    return module.step(inputs, [empty for _ in module.layers] if state is None else state)


@_quietly
def titans_memory() -> nn.Module:
    from titans_pytorch import NeuralMemory

    return NeuralMemory(dim=8, chunk_size=4)


def _call_titans(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs, state = module(swap(inputs), state=state)
    return outputs.transpose(0, 1), state


def min_rnn(name: str) -> Callable[[], nn.Module]:
    @_quietly
    def build() -> nn.Module:
        import minGRU_pytorch
        from minGRU_pytorch.minLSTM import minLSTM

        return scaled({"minGRU": minGRU_pytorch.minGRU, "minLSTM": minLSTM}[name](6), 2.0)

    return build


def _call_min_rnn(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    outputs, state = module(swap(inputs), state, return_next_prev_hidden=True)
    return outputs.transpose(0, 1), state


def adapt_min_rnn(max_steps: int | None) -> Callable[[nn.Module], nn.Module]:
    arguments = {"return_next_prev_hidden": True}
    return lambda module: tbptt.stateful(
        module, state="prev_hidden", arguments=arguments, batch_first=True, max_steps=max_steps
    )


def _whole_batch_first(module: Any, inputs: Tensor) -> Tensor:
    return module(swap(inputs)).transpose(0, 1)


def _simple(name: str, build: Callable[[], nn.Module], needs: str) -> Entry:
    call = _batch_first if name != "coRNN" else lambda module, inputs, state: module(inputs, state)
    dtype = torch.float32 if name == "CfC mixed memory" else torch.float64  # its initial state is single precision
    return Entry(name, needs, build, floats(3), call, _via(needs, "recurrent"), _one_pass(call), dtype=dtype)


def _xlstm_large_entry(mode: str, by_hand: str, marks: str) -> Entry:
    return Entry(
        f"xLSTMLarge {mode}",
        "xlstm",
        xlstm_large(mode),
        tokens,
        _batch_first,
        _via("xlstm", "large"),
        lambda module, inputs: module(inputs.transpose(0, 1))[0].transpose(0, 1),
        by_hand,
        marks,
        unit=2,
    )


def _spikingjelly_entry(mode: str) -> Entry:
    call = _call_spikingjelly if mode == "m" else _each_step(_call_spikingjelly)
    adapt = _via("spikingjelly", "spiking")
    name = f"SpikingJelly {mode}"
    return Entry(
        name,
        "spikingjelly",
        spikingjelly_network(mode),
        floats(3),
        call,
        adapt,
        _one_pass(call),
        detach=_detach_spikingjelly,
    )


def _norse_entry(cells: bool) -> Entry:
    def call(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
        return module(inputs, state)

    run = _each_step(call) if cells else call
    adapt = _via("norse", "sequential", one_step=cells)
    name = "norse cells" if cells else "norse layers"
    return Entry(name, "norse", norse_network(cells), floats(3), run, adapt, _one_pass(run))


def _titans_entry(name: str, max_steps: int | None, marks: str) -> Entry:
    """Titans takes whole chunks from a chunk's start, or single steps; nothing that runs on into the next chunk."""

    def adapt(module: nn.Module) -> nn.Module:
        return tbptt.stateful(module, state="state", batch_first=True, max_steps=max_steps)

    whole = _one_pass(_call_titans)
    return Entry(name, "titans_pytorch", titans_memory, floats(8), _call_titans, adapt, whole, "+x+ +x+ +x+", marks)


LIBRARIES = [
    Entry(
        "xLSTMBlockStack",
        "xlstm",
        xlstm_blocks,
        floats(16),
        _each_step(_call_xlstm),
        _via("xlstm", "block_stack"),
        _whole_batch_first,
        "+++ !!! !!+",
    ),
    _xlstm_large_entry("train", "+xx !xx !xx", "+xx +xx +xx"),
    _xlstm_large_entry("inference", OVERWRITES, ALL_RIGHT),
    Entry(
        "TorchRL",
        "torchrl",
        torchrl_policy,
        floats(3),
        _each_step(_call_torchrl),
        _via("torchrl", "recurrent"),
        _one_pass(_each_step(_call_torchrl)),
    ),
    Entry(
        "snnTorch",
        "snntorch",
        snntorch_network,
        floats(3),
        _each_step(_call_snntorch),
        _via("snntorch", "spiking"),
        _one_pass(_each_step(_call_snntorch)),
        dtype=torch.float32,  # its membranes start in single precision
        detach=_detach_snntorch,
    ),
    _spikingjelly_entry("m"),
    _spikingjelly_entry("s"),
    _norse_entry(cells=True),
    _norse_entry(cells=False),
    *(_simple(name, torchrecurrent_layer(name), "torchrecurrent") for name in ("LEM", "coRNN", "IndRNN", "MGU", "NAS")),
    _simple("CfC", ncps_network("CfC"), "ncps"),
    _simple("CfC mixed memory", ncps_network("CfC", mixed_memory=True), "ncps"),
    _simple("LTC", ncps_network("LTC"), "ncps"),
    Entry(
        "mambapy",
        "mambapy",
        mambapy_stack,
        floats(8),
        _each_step(_call_mambapy),
        _via("mambapy", "recurrent"),
        _whole_batch_first,
    ),
    _titans_entry("titans NeuralMemory", None, "+x+ +x+ +x+"),
    _titans_entry("titans NeuralMemory in single steps", 1, ALL_RIGHT),
    Entry(
        "minGRU",
        "minGRU_pytorch",
        min_rnn("minGRU"),
        floats(6),
        _call_min_rnn,
        adapt_min_rnn(None),
        _whole_batch_first,
    ),
    Entry(
        "minLSTM",
        "minGRU_pytorch",
        min_rnn("minLSTM"),
        floats(6),
        _call_min_rnn,
        adapt_min_rnn(1),
        _whole_batch_first,
        FORGETS,
    ),
]
