"""A tensor's place in memory: what must be kept of it for kernels to treat the tensor alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["laid_out", "layout_of"]

_ALIGNMENT_BYTES = 64  # of fresh memory in torch


def _default_stride(size: Sequence[int]) -> list[int]:
    strides: list[int] = []
    step = 1
    for length in reversed(size):
        strides.append(step)
        step *= max(length, 1)
    return strides[::-1]


def layout_of(tensor: Tensor) -> dict[str, Any]:
    """Return what must be known of a tensor's place in memory for kernels to treat it alike.

    The order of a sum, and with it its last bits, may depend on strides and alignment.
    """
    size, stride = list(tensor.size()), list(tensor.stride())
    layout: dict[str, Any] = {}
    if stride != _default_stride(size):
        if any(step == 0 and length > 1 for step, length in zip(stride, size, strict=True)):
            layout["size"] = size
        apart = 1  # elements overlap unless each dimension steps over all that the faster ones cover
        for step, length in sorted(zip(stride, size, strict=True)):
            if length > 1 and step != 0:
                if step < apart:
                    return {}
                apart = step * length
        layout["stride"] = stride
    offset = tensor.storage_offset() % (_ALIGNMENT_BYTES // tensor.element_size())
    return layout | {"offset": offset} if offset else layout


def laid_out(data: Tensor, layout: dict[str, Any]) -> Tensor:
    """Return a copy of `data` in fresh memory, laid out as `layout_of` said."""
    if "stride" not in layout and "offset" not in layout:
        return data.clone(memory_format=torch.contiguous_format)
    stride: list[int] = layout.get("stride") or _default_stride(data.shape)
    offset: int = layout.get("offset", 0)
    reach = sum((length - 1) * step for length, step in zip(data.shape, stride, strict=True)) + 1
    memory = torch.empty(offset + (reach if data.numel() else 0), dtype=data.dtype)
    rebuilt = memory.as_strided(data.shape, stride, offset).copy_(data)
    return rebuilt.expand(layout["size"]) if "size" in layout else rebuilt
