"""What is put around a model: what it is trained through as it is, and what has to be taken off first.

An estimate is made by `torch.autograd.grad` on the model's own parameters, piece by piece, and never calls
`.backward()`. A wrapper that does its work in `.backward()`, or that cuts the parameters up, would do it not at all, or
wrongly, in silence: it is refused by name. Libraries that are not installed are not imported: their classes are known
by the names of the packages that define them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from tbptt.errors import CapabilityError

__all__ = ["bare", "method_of", "refuse_wrapped"]

_SUM = (
    "sum Estimate.gradients over the ranks before estimate.apply(model), as examples/accelerate_loop.py does, or let "
    "Lightning do it (tbptt.integrations.lightning)"
)
_SHARDED = "its parameters are cut up over the ranks, and are whole only inside its own forward pass and .backward()"


class _Refused(NamedTuple):
    package: str
    name: str
    why: str
    fix: str


_REFUSED = (
    _Refused(
        "torch",
        "DistributedDataParallel",
        "it averages gradients in hooks of .backward(), which an estimate does not call: each rank would train a model "
        "of its own",
        f"pass the bare model, model.module (of Accelerate: accelerator.unwrap_model(model)); {_SUM}",
    ),
    _Refused(
        "torch",
        "DataParallel",
        "it cuts dimension 0 of the inputs into parts for several devices, and that is time here, not the batch",
        f"pass the bare model, model.module, on one device; for several devices one process each, and {_SUM}",
    ),
    _Refused("torch", "FullyShardedDataParallel", _SHARDED, f"pass the model as it was before it was wrapped; {_SUM}"),
    _Refused("torch", "FSDPModule", _SHARDED, f"leave fully_shard(model) out; {_SUM}"),
    _Refused(
        "deepspeed",
        "DeepSpeedEngine",
        "it scales, reduces and applies gradients in its own backward() and step(), which an estimate does not call",
        f"pass the model as it was before deepspeed.initialize, with an optimizer of torch; {_SUM}",
    ),
    _Refused(
        "lightning",
        "_FabricModule",
        "its precision and its strategy act in fabric.backward(), which an estimate does not call",
        "pass the bare model, model.module, and put `with torch.autocast(...)` around the loop; for several devices "
        + _SUM,
    ),
)


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is in, or has in it, a wrapper through which it cannot be trained in windows.

    Raises:
        CapabilityError: naming the wrapper, why, and what to pass instead.
    """
    for path, module in model.named_modules():
        known = _ancestry(module)
        for each in _REFUSED:
            if (each.package, each.name) in known:
                raise _refusal(_place(path), each.name, each.why, each.fix)
        _refuse_prompts(path, module, known)
        _refuse_checkpointing(path, module, known)
    for name, parameter in model.named_parameters():
        if ("torch", "DTensor") in _ancestry(parameter):
            raise _refusal(name, "DTensor", "it is cut up over the ranks", f"pass a model of whole parameters; {_SUM}")
        if hasattr(parameter, "ds_id"):
            why = "ZeRO keeps a part of it on each rank, and gathers it in the engine's own passes only"
            raise _refusal(name, "parameter of DeepSpeed's ZeRO-3", why, f"a model built without DeepSpeed; {_SUM}")


def bare(module: nn.Module) -> nn.Module:
    """Return what `torch.compile` was given, for a module that it returned; else the module.

    Both have the same parameters, under names that differ by "_orig_mod.".
    """
    while ("torch", "OptimizedModule") in _ancestry(module):
        module = module._modules["_orig_mod"]  # pyright: ignore[reportPrivateUsage, reportAssignmentType]
    return module


def method_of(module: object, name: str) -> Callable[..., Any] | None:
    """Return a method by which a model says something of itself; None where it has none.

    Through whatever hands attributes on, as the wrappers of `torch.compile`, PEFT and TorchScript do: a protocol's
    `isinstance` looks, from Python 3.12 on, at the class alone.
    """
    found = getattr(module, name, None)
    return found if callable(found) else None


def _ancestry(value: object) -> set[tuple[str, str]]:
    """Return the classes of an object, each as the package that defines it and its name."""
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__}


def _refuse_prompts(path: str, module: nn.Module, known: set[tuple[str, str]]) -> None:
    """Refuse PEFT's learned prompts. Its adapters act inside the layers, and are trained as they are."""
    if ("peft", "PeftModel") not in known:
        return
    settings: dict[str, Any] = getattr(module, "peft_config", {})
    if any(getattr(each, "is_prompt_learning", False) for each in settings.values()):
        raise _refusal(
            _place(path),
            f"{type(module).__name__} with a learned prompt",
            "the prompt is put before the inputs of each call, so that every window would begin with it anew",
            "an adapter inside the layers, as peft.LoraConfig",
        )


def _refuse_checkpointing(path: str, module: nn.Module, known: set[tuple[str, str]]) -> None:
    """Refuse transformers' gradient checkpointing, which drops the state in training mode and logs that once."""
    if ("transformers", "PreTrainedModel") in known and any(
        getattr(each, "gradient_checkpointing", False) for each in module.modules()
    ):
        raise _refusal(
            _place(path),
            f"{type(module).__name__} with gradient checkpointing enabled",
            "in training mode it then neither takes nor returns its cache, which is the state: every window would "
            "start from nothing",
            "model.gradient_checkpointing_disable(); a graph is k2 steps long at most: TBPTT with a shorter k2, or "
            "FullBPTT(checkpoints=...), which keeps states instead",
        )


def _place(path: str) -> str:
    return f"its {path}" if path else "the model"


def _refusal(place: str, what: str, why: str, fix: str) -> CapabilityError:
    return CapabilityError(
        f"a model that torch.autograd.grad can train window by window was expected, but {place} is a {what}: {why}",
        fix=fix,
    )
