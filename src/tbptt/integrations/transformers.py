"""Recurrent and hybrid models of Hugging Face transformers, as models that carry their state."""

from __future__ import annotations

import inspect
from typing import Literal

from torch import Tensor, nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError
from tbptt.tree import Tree

__all__ = ["recurrent"]

KEYWORDS = ("cache_params", "state", "past_key_values")
"""What transformers' models call their state, both when they take it and when they return it."""

SINGLE_STEPS = frozenset({"mamba", "falcon_mamba", "jamba"})
"""Model types that drop their state when they are given several steps at once, and keep it in single steps."""


def recurrent(module: nn.Module, *, in_place: Literal["auto", "protect", "leave"] = "auto") -> Stateful:
    """Make a model of a recurrent model of transformers, with or without a language-modelling head.

    Models that drop their state between chunks of several steps (Mamba, FalconMamba, Jamba) are run step by
    step: right, and slower. Models that overwrite what their backward pass needs are protected.

    Args:
        module: a PreTrainedModel with a recurrent state.
        in_place: see `tbptt.stateful`.

    Returns:
        A model of token ids (T, B) or embeddings (T, B, D), whose outputs are the logits (T, B, V) or, without
        a head, the last hidden states (T, B, D).

    Raises:
        CapabilityError: a model that takes no state.

    Exactness: tested per model class, see docs/models.md; run `tbptt.check` on yours.
    """
    taken = inspect.signature(module.forward).parameters
    keyword = next((name for name in KEYWORDS if name in taken), None)
    if keyword is None:
        raise CapabilityError(
            f"a model that takes one of {', '.join(KEYWORDS)} was expected, but {type(module).__name__} takes "
            f"{', '.join(taken)}: it returns no state that could be passed on",
            fix="tbptt.stateful(module, inside=True), if it keeps its state in its own attributes",
        )
    kind = str(getattr(getattr(module, "config", None), "model_type", ""))
    return stateful(module, _Call(keyword), max_steps=1 if kind in SINGLE_STEPS else None, in_place=in_place)


class _Call:
    """Batch first, with the cache switched on: in training mode it is off by default."""

    def __init__(self, keyword: str) -> None:
        self.keyword = keyword

    def __call__(self, module: nn.Module, inputs: Tensor, state: Tree | None) -> tuple[Tensor, Tree]:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        given = {} if state is None else {self.keyword: state}
        result = module(**{name: inputs.transpose(0, 1).contiguous()}, use_cache=True, return_dict=True, **given)
        outputs = result.logits if "logits" in result else result.last_hidden_state
        return outputs.transpose(0, 1), result[self.keyword]
