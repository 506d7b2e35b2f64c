"""How exactly a model computes: what two ways to the same result may differ by."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tbptt.errors import ShapeError
from tbptt.model import copy_model, fork_random, left_as_it_was
from tbptt.tree import Tree, differentiable, leaves, tensors, to, tree_map
from tbptt.unroll import unroll
from tbptt.window import Window

__all__ = [
    "apart",
    "cast_inputs",
    "computes_narrower",
    "distance",
    "half_precision",
    "in_double",
    "project",
    "without_autocast",
]

HALF = (torch.bfloat16, torch.float16)
"""The types of 16 bits, coarsest first."""


def in_double(model: nn.Module, inputs: Tree) -> tuple[nn.Module, Tree] | None:
    """Return a copy of model and inputs in double precision, or None if it cannot be run so."""
    if any(value.dtype not in (torch.float32, torch.float64, *HALF) for value in model.parameters()):
        return None
    wide = cast_inputs(inputs, torch.float64)
    try:
        with torch.enable_grad():  # some models ask for a gradient inside
            unroll(copy_model(model).double(), Window(wide), None, None)
    except Exception:  # it fixes a dtype inside, or the device has no float64; else the original says it again
        return None
    return copy_model(model).double(), wide


def cast_inputs(inputs: Tree, dtype: torch.dtype) -> Tree:
    """Return inputs whose floating-point numbers are of a type."""
    return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, inputs)


def without_autocast(model: nn.Module, inputs: Tree) -> AbstractContextManager[Any]:
    """Leave autocast off, where a check is made within it, unless the model runs in no other way.

    Autocast narrows single precision, and leaves double precision as it is: a model that fixes float32 somewhere would
    be told that it does not carry its state, for what is autocast's rounding.
    """
    device = next(model.parameters()).device
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        return nullcontext()
    off = torch.autocast(device.type, enabled=False)
    try:
        with off, torch.no_grad(), fork_random(device), left_as_it_was(model):
            unroll(model, Window(to(inputs, device)), None, None)
    except Exception:  # kernels that take 16 bits only; whatever else it is, it is said in the check
        return nullcontext()
    return off


def half_precision(model: nn.Module) -> torch.dtype | None:
    """Return the coarsest type of 16 bits that a model computes in, by its parameters or autocast; None for none."""
    found = {value.dtype for value in model.parameters()}
    device = next(model.parameters()).device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    return next((dtype for dtype in HALF if dtype in found), None)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            self.narrow |= isinstance(each, Tensor) and each.dtype in (torch.float32, *HALF)
        return result


def computes_narrower(model: nn.Module, inputs: Tree) -> bool:
    """Tell whether a model in double precision computes some of its parts in a narrower one."""
    with torch.enable_grad(), left_as_it_was(model), _Watch() as watch:
        unroll(model, Window(inputs), None, None)
    return watch.narrow


def apart(left: Tree, right: Tree) -> float:
    """Return the largest difference of two trees, relative to the size of the left one.

    Raises:
        ShapeError: their tensors do not pair up.
    """
    worst = 0.0
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ShapeError(f"a tensor of shape {tuple(a.shape)} was expected, but {tuple(b.shape)} came")
        if a.numel():
            wide = torch.complex128 if a.is_complex() else torch.float64
            one, two = a.detach().to(wide), b.detach().to(wide)
            worst = max(worst, float((one - two).abs().max() / one.abs().max().clamp(min=1e-6)))
    plain = [[leaf for leaf in leaves(tree) if not isinstance(leaf, Tensor)] for tree in (left, right)]
    return worst if plain[0] == plain[1] else float("inf")


def distance(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Return the distance of two gradients, relative to the length of the wanted one."""
    length = torch.nn.utils.get_total_norm(wanted).clamp(min=1e-30)
    return float(torch.nn.utils.get_total_norm([a - b for a, b in zip(wanted, found, strict=True)]) / length)


def project(outputs: Tree, begin: int) -> Tensor:
    """Return a random direction of the outputs from step `begin` on, 0-dim; the same for the same shapes."""
    generator = torch.Generator().manual_seed(0)
    total: list[Tensor] = []
    for leaf in differentiable(outputs):
        rest = leaf[begin:]
        total.append((rest * torch.randn(rest.shape, generator=generator, dtype=torch.float64).to(rest)).sum().real)
    return torch.stack(total).sum()
