"""Recurrent and hybrid models of Hugging Face transformers, as models that carry their state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError
from tbptt.tree import Tree, tensors
from tbptt.wrappers import method_of, refuse_wrapped

__all__ = ["recurrent"]

KEYWORDS = ("cache_params", "state", "past_key_values")
"""What transformers' models call their state, both when they take it and when they return it."""

SINGLE_STEPS = frozenset({"mamba", "falcon_mamba", "jamba"})
"""Model types that drop their state when they are given several steps at once, and keep it in single steps."""


def recurrent(module: nn.Module, *, in_place: Literal["auto", "protect", "leave"] = "auto") -> Stateful:
    """Make a model of a recurrent model of transformers, with or without a language-modelling head.

    Models that overwrite what their backward pass needs are protected. What else some get wrong between
    chunks is put right: Mamba, FalconMamba and Jamba drop their state unless they are given single steps, so
    they are run step by step: right, and slower. Bamba counts its positions anew in each chunk, and MiniMax
    looks for the length of its past in a layer that has none: both are told where they stand. So are hybrids
    built without any attention, which do not run with a cache at all. Rwkv mixes the lanes up in a single
    step: it is given them one by one there.

    Args:
        module: a PreTrainedModel with a recurrent state, or what `peft.get_peft_model` made of one.
        in_place: see `tbptt.stateful`.

    Returns:
        A model of token ids (T, B) or embeddings (T, B, D), whose outputs are the logits (T, B, V) or, without
        a head, the last hidden states (T, B, D). Layers with full attention have a state that grows.

    Raises:
        CapabilityError: a model that takes no state; one with gradient checkpointing enabled, which drops it.

    Exactness: each class against its own pass over the whole sequence (tests/integrations/test_transformers.py,
        transformers 5.23); run `tbptt.check` on yours.
    """
    refuse_wrapped(module)
    inner = method_of(module, "get_base_model")  # PEFT's wrappers take what is not their own by **kwargs
    taken = inspect.signature((module if inner is None else inner()).forward).parameters
    keyword = next((name for name in KEYWORDS if name in taken), None)
    if keyword is None:
        raise CapabilityError(
            f"a model that takes one of {', '.join(KEYWORDS)} was expected, but {type(module).__name__} takes "
            f"{', '.join(taken)}: it returns no state that could be passed on",
            fix="a model whose output has its state; no call of this one can bring its state back",
        )
    kind = str(getattr(getattr(module, "config", None), "model_type", ""))
    way = _WAYS.get(kind, _run)
    if keyword == "past_key_values" and kind not in _WAYS and not any(map(_is_attention, _empty_cache(module).layers)):
        way = _no_attention
    steps = 1 if kind in SINGLE_STEPS else None
    return stateful(module, _Call(way, keyword), max_steps=steps, pathways=_pathways, in_place=in_place)


def _run(module: nn.Module, keyword: str, inputs: Tensor, state: Tree | None, **more: Tensor) -> tuple[Tensor, Any]:
    """Call a module batch first, with the cache switched on: in training mode it is off by default."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    given = {} if state is None else {keyword: state}
    result = module(**{name: inputs.transpose(0, 1).contiguous()}, use_cache=True, return_dict=True, **given, **more)
    if keyword not in result:
        raise CapabilityError(
            f"{type(module).__name__} takes {keyword!r}, and was expected to return it, but returned "
            f"{', '.join(result)}: it keeps its state in attributes of its own, from which no window can start",
            fix="another model; tbptt.stateful(module, inside=True) carries nothing that the module itself drops",
        )
    outputs = result.logits if "logits" in result else result.last_hidden_state
    return outputs.transpose(0, 1), result[keyword]


def _bamba(module: nn.Module, keyword: str, inputs: Tensor, state: Any) -> tuple[Tensor, Tree]:
    """Without positions, Bamba takes each chunk for the first one."""
    layers = [] if state is None else state.layers
    past = max((layer.get_seq_length() for layer in layers if _is_attention(layer)), default=0)
    positions = torch.arange(past, past + inputs.shape[0], device=inputs.device)
    return _run(module, keyword, inputs, state, position_ids=positions[None])


def _no_attention(module: nn.Module, keyword: str, inputs: Tensor, state: Any) -> tuple[Tensor, Tree]:
    """Without attention no layer of transformers' cache has a length to count positions by: an empty one is added."""
    from transformers.cache_utils import DynamicLayer

    if state is None:
        state = _empty_cache(module)
        state.layers.append(DynamicLayer())
    return _run(module, keyword, inputs, state)


def _minimax(module: nn.Module, keyword: str, inputs: Tensor, state: Any) -> tuple[Tensor, Tree]:
    """MiniMax asks its first layer for the length of the past: one of linear attention holds none, and is hidden."""
    from transformers.cache_utils import DummyLayer

    outputs, state = _run(module, keyword, inputs, state)
    state.layers = [layer if layer.is_initialized else DummyLayer() for layer in state.layers]
    return outputs, state


def _rwkv(module: nn.Module, keyword: str, inputs: Tensor, state: Any) -> tuple[Tensor, Tree]:
    """A single step of several lanes has a wrong shape in Rwkv, as the lanes of the state are taken for steps."""
    if inputs.shape[0] > 1 or inputs.shape[1] == 1:
        return _run(module, keyword, inputs, state)
    lanes = range(inputs.shape[1])
    given = [None if state is None else [leaf[lane : lane + 1].clone() for leaf in state] for lane in lanes]
    results = [_run(module, keyword, inputs[:, lane : lane + 1], given[lane]) for lane in lanes]
    outputs, states = zip(*results, strict=True)
    return torch.cat(outputs, 1), [torch.cat(leaves) for leaves in zip(*states, strict=True)]


def _pathways(state: Any) -> dict[str, Tree]:
    """Tell the keys and values of hybrids' attention from the rest of their cache; other states have one way only."""
    layers: list[Any] = list(getattr(state, "layers", []))
    cached = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    attended = [each for each in cached if isinstance(each, Tensor)]
    if not attended:
        return {}
    known = {id(each) for each in attended}
    return {"attention": attended, "recurrence": [each for each in tensors(state) if id(each) not in known]}


_WAYS = {"bamba": _bamba, "minimax": _minimax, "rwkv": _rwkv}
"""Model types that need more than the usual call."""


@dataclass(frozen=True)
class _Call:
    """One of the ways above, with the keyword of the state."""

    way: Callable[[nn.Module, str, Tensor, Any], tuple[Tensor, Tree]]
    keyword: str

    def __call__(self, module: nn.Module, inputs: Tensor, state: Tree | None) -> tuple[Tensor, Tree]:
        return self.way(module, self.keyword, inputs, state)


def _empty_cache(module: nn.Module) -> Any:
    from transformers import DynamicCache  # pyright: ignore[reportMissingImports]

    return DynamicCache(config=getattr(module, "config", None))


def _is_attention(layer: object) -> bool:
    from transformers.cache_utils import CacheLayerMixin  # pyright: ignore[reportMissingImports]

    return isinstance(layer, CacheLayerMixin)
