"""Other weights in the place of a model's own, and weights kept for graphs that outlive them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["KeptWeights", "Saved", "UsesOf", "copy_to_save", "in_place"]


@contextmanager
def in_place(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Generator[None]:
    """Let parameters have other values within the block, whoever reaches them and however: they stay the same objects.

    Args:
        parameters: of a model, a loss, or both.
        values: one for each, of its shape, type and device. What the block writes into a parameter is written there.
    """
    own = [(each, each.data) for each in parameters]
    try:
        for (parameter, _), value in zip(own, values, strict=True):
            parameter.data = value.detach()
        yield
    finally:
        for parameter, value in own:
            parameter.data = value


class UsesOf(TorchDispatchMode):
    """Notices which parameters the operations within the block read, in whatever way they are reached.

    Args:
        parameters: by name.

    Attributes:
        names: of those that were read.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._places = {each.untyped_storage().data_ptr(): name for name, each in parameters.items() if each.numel()}
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for each in tree_leaves((args, kwargs)):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                name = self._places.get(each.untyped_storage().data_ptr())
                if name is not None:
                    self.names.add(name)
        return func(*args, **kwargs)


class Saved:
    """A tensor that a backward pass will need, as long as nobody writes to it."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph it would hold itself, and never be freed
        self.version = self.tensor._version

    def save(self) -> None:
        """Make a copy, before the memory is written to."""
        if self.version == self.tensor._version:
            self.tensor = self.tensor.clone()
            self.version = self.tensor._version

    @staticmethod
    def unpack(saved: Saved | Tensor) -> Tensor:
        """Return a tensor as it was when it was saved; copies stand for themselves."""
        if isinstance(saved, Tensor):
            return saved
        if saved.version != saved.tensor._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation "
                "after the model's call: weights that an optimizer has changed in between, for example. A "
                "gradient through old activations and new weights is the gradient of nothing"
            )
        return saved.tensor


@dataclass(frozen=True, eq=False)
class KeptWeights:
    """The weights of one update, as they were, for graphs that are gone back through after the optimizer's steps.

    The model is run with its own parameters, which an optimizer may change in place afterwards: what a graph saves of
    them, in whatever way the model has reached them, is replaced by a view of the copies made here. What is computed
    anew within the backward pass, as by activation checkpointing, finds the copies in the parameters' place.

    Args:
        values: the copies, by name.
        parameters: whose they are, the leaves of all such graphs; none where they were read from a file.
    """

    values: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of(parameters: Mapping[str, Tensor]) -> KeptWeights:
        """Copy these parameters; those that share memory, as cuDNN wants them, have copies that share it likewise."""
        copies: dict[int, torch.UntypedStorage] = {}
        values: dict[str, Tensor] = {}
        for name, each in parameters.items():
            storage = each.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = storage.clone()
            values[name] = _view(copies[storage.data_ptr()], each)
        return KeptWeights(values, dict(parameters))

    def fits(self, parameters: Mapping[str, Tensor]) -> bool:
        """Tell whether graphs of these weights lead to these very parameters."""
        return self.parameters.keys() == parameters.keys() and all(
            each is parameters[name] for name, each in self.parameters.items()
        )

    def bound_to(self, parameters: Mapping[str, Tensor]) -> KeptWeights:
        """Return the same weights for the parameters of these names."""
        return KeptWeights(self.values, {name: parameters[name] for name in self.values})

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Let the parameters have these values within the block."""
        with in_place(self.parameters.values(), self.values.values()):
            yield

    @contextmanager
    def recording(self) -> Generator[None]:
        """Let graphs made within the block hold the copies instead of the parameters, whose values they are now."""
        recorder = _Recorder(self)
        token = _recorder.set(recorder)
        try:
            with saved_tensors_hooks(recorder.pack, Saved.unpack):
                yield
        finally:
            _recorder.reset(token)


class _Recorder:
    """Says what a graph is to hold instead of a weight, or of a view of it."""

    def __init__(self, weights: KeptWeights) -> None:
        # by the address of a parameter's memory: the copy of it, and the parameter's version when it was made
        self._known = {
            each.untyped_storage().data_ptr(): (weights.values[name].untyped_storage(), each._version)
            for name, each in weights.parameters.items()
            if each.numel()
        }
        self._views: dict[tuple[Any, ...], Tensor] = {}  # a weight is saved again at each step

    def copy_of(self, tensor: Tensor) -> Tensor | None:
        """Return the view of the copies for a view of the weights; None for any other tensor."""
        if tensor.layout != torch.strided:
            return None
        address = tensor.untyped_storage().data_ptr()
        found = self._known.get(address)
        if found is None:
            return None
        storage, version = found
        if tensor._version != version:  # the model itself has written to it since, as an embedding with max_norm does
            return tensor.detach().clone()
        if tensor.is_complex() or tensor.is_neg():  # bits that say conjugate, or negative, are not told by the shape
            return _view(storage, tensor)
        shape = (address, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if shape not in self._views:
            self._views[shape] = _view(storage, tensor)
        return self._views[shape]

    def pack(self, tensor: Tensor) -> Saved | Tensor:
        copy = self.copy_of(tensor)
        return Saved(tensor) if copy is None else copy


_recorder: ContextVar[_Recorder | None] = ContextVar("_recorder", default=None)


def copy_to_save(tensor: Tensor) -> Tensor | None:
    """Return what a graph is to hold instead of a weight, where weights are kept; None for any other tensor."""
    recorder = _recorder.get()
    return None if recorder is None else recorder.copy_of(tensor)


def _view(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    """Return the view of a storage that `like` is of its own."""
    with torch.no_grad():
        plain = torch.empty(0, dtype=like.dtype, device=like.device)
        plain = plain.set_(storage, like.storage_offset(), like.shape, like.stride())  # pyright: ignore
        plain = plain.conj() if like.is_conj() else plain
        return torch._neg_view(plain) if like.is_neg() else plain  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
