"""Tiny random models of other libraries: how each is called by hand, and its adapter. Here those of transformers.

`by_hand_marks` and `marks` say what is known of them, in the versions named in the adapters, three groups of
three: value, gradient and detached gradient, each in aligned chunks, uneven ones and single steps. "+" exact,
"-" wrong, "!" "modified by an inplace operation", "x" another error or a wrong shape. Nothing is imported
before a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tbptt.tree import detach

LANES, VOCABULARY = 2, 128
ALL_RIGHT = "+++ +++ +++"
ONE_STEP_OVERWRITES = "+++ ++! ++!"  # single steps write into the state that the backward pass needs
OVERWRITES = "+++ !!! !!!"
FORGETS = "--+ --+ --+"  # several steps start from nothing


@dataclass(frozen=True)
class Entry:
    """A model of another library.

    Attributes:
        needs: the package.
        build: makes the library's own module.
        inputs: `inputs(steps)`, (T, B, ...); of token ids each occurs once.
        by_hand: `by_hand(module, inputs, state)`, as the library means it to be called.
        adapt: makes a model of the module.
        whole: `whole(module, inputs)`, one pass, where possible without any state.
        unit: aligned chunks are multiples of eight times this.
        detach: cuts the state that `by_hand` or the model returned.
    """

    name: str
    needs: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    by_hand: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]
    adapt: Callable[[nn.Module], nn.Module]
    whole: Callable[[nn.Module, Tensor], Tensor]
    by_hand_marks: str = ALL_RIGHT
    marks: str = ALL_RIGHT
    unit: int = 1
    dtype: torch.dtype = torch.float64
    detach: Callable[[nn.Module, Any], Any] = field(default=lambda module, state: detach(state))

    def __str__(self) -> str:
        return self.name


def floats(width: int) -> Callable[[int], Tensor]:
    return lambda steps: torch.randn(steps, LANES, width, generator=torch.Generator().manual_seed(0))


def tokens(steps: int) -> Tensor:
    return torch.arange(steps * LANES).view(steps, LANES)


def swap(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def scaled(module: nn.Module, by: float) -> nn.Module:
    """Return the module with larger weights: fresh ones are so small that some mistakes hardly show."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(by)
    return module


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_MAMBA = {"mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
NATIVE = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"}
NATIVE |= {"step_kernel": "native", "chunk_size": 16, "autocast_kernel_dtype": "float32"}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 4, "n_groups": 1, "chunk_size": 8, "expand": 2},
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Jamba": _ATTENTION
    | {
        "mamba_d_state": 8,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "Zamba2": _ATTENTION
    | {"mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_expand": 2}
    | {"chunk_size": 8, "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": False},
    "FalconH1": _ATTENTION | _MAMBA | {"mamba_d_ssm": 64},
    "GraniteMoeHybrid": _ATTENTION
    | _MAMBA
    | {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32}
    | {"layer_types": ["mamba", "attention"]},
    "NemotronH": _ATTENTION
    | {"ssm_state_size": 8, "mamba_head_dim": 16, "mamba_num_heads": 4, "n_groups": 1, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "attention"]},
    "Lfm2": _ATTENTION | {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": _ATTENTION | _DELTA | _EXPERTS | _MIXED | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "Qwen3_5": _ATTENTION | _DELTA | _MIXED | {"head_dim": 8},
    "OlmoHybrid": _ATTENTION | _DELTA | _MIXED | {"linear_num_value_heads": 2, "pad_token_id": 0},
    "Rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xLSTM": NATIVE | {"hidden_size": 128, "num_heads": 4, "mode": "train"},
    "MiniMax": _ATTENTION | _MIXED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8},
    "Bamba": _ATTENTION | _MAMBA | {"attn_layer_indices": [1]},
    "RecurrentGemma": _ATTENTION | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
}

_BY_HAND = {
    **dict.fromkeys(["Mamba2", "Zamba2", "FalconH1", "GraniteMoeHybrid", "NemotronH"], ONE_STEP_OVERWRITES),
    **dict.fromkeys(["Qwen3Next", "Qwen3_5", "OlmoHybrid"], OVERWRITES),
    **dict.fromkeys(["Mamba", "FalconMamba"], FORGETS),
    "Jamba": "--+ --! --!",
    "Rwkv": "++x !!! !!!",
    "xLSTM": "+xx !xx !xx",
    "Bamba": "--- --! --!",
    "MiniMax": "--- --- ---",
}
_ADAPTED = {"xLSTM": "+xx +xx +xx"}  # its mode "train" takes multiples of chunk_size only
_UNITS = {"xLSTM": 2}
_SINGLE_PRECISION = {"Jamba", "GraniteMoeHybrid", "Qwen3Next", "MiniMax"}  # their experts take no doubles


def transformer(kind: str, **changes: Any) -> nn.Module:
    """Build the language model of this kind."""
    import transformers

    config = getattr(transformers, "Qwen3_5TextConfig" if kind == "Qwen3_5" else f"{kind}Config")
    torch.manual_seed(0)
    module = getattr(transformers, f"{kind}ForCausalLM")(config(**SIZES | CONFIGURATIONS[kind] | changes))
    return scaled(module, 4.0)


def adapt_transformer(module: nn.Module) -> nn.Module:
    from tbptt.integrations.transformers import recurrent

    return recurrent(module)


def _call_transformer(module: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    keyword = {"mamba2": "cache_params", "mamba": "cache_params", "falcon_mamba": "cache_params"}
    name = (keyword | {"xlstm": "cache_params", "rwkv": "state"}).get(module.config.model_type, "past_key_values")
    given = {} if state is None else {name: state}
    result = module(inputs_embeds=swap(inputs), use_cache=True, **given)
    return result.logits.transpose(0, 1), getattr(result, name)


def _whole_transformer(module: Any, inputs: Tensor) -> Tensor:
    return module(inputs_embeds=swap(inputs), use_cache=False).logits.transpose(0, 1)


def transformer_entry(kind: str, name: str | None = None, by_hand: str = "", marks: str = "", **changes: Any) -> Entry:
    return Entry(
        name=name or kind,
        needs="xlstm" if kind == "xLSTM" else "transformers",  # its fallback without xlstm has marks of its own
        build=lambda: transformer(kind, **changes),
        inputs=floats((SIZES | CONFIGURATIONS[kind])["hidden_size"]),
        by_hand=_call_transformer,
        adapt=adapt_transformer,
        whole=_whole_transformer,
        by_hand_marks=by_hand or _BY_HAND.get(kind, ALL_RIGHT),
        marks=marks or _ADAPTED.get(kind, ALL_RIGHT),
        unit=_UNITS.get(kind, 1),
        dtype=torch.float32 if kind in _SINGLE_PRECISION else torch.float64,
    )


TRANSFORMERS = [
    *(transformer_entry(kind) for kind in CONFIGURATIONS if kind != "RecurrentGemma"),
    transformer_entry("Qwen3Next", "Qwen3Next without attention", "xxx xxx xxx", layer_types=["linear_attention"] * 2),
    transformer_entry("xLSTM", "xLSTM inference", "+++ !!+ !!+", ALL_RIGHT, mode="inference"),
]
