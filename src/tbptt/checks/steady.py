"""Randomness and batch normalisation: seen while a model runs, and held still.

One pass and chunks of it draw other numbers where a model draws for all of its steps at once, as dropout between the
layers of nn.LSTM does. To tell that from a state that is lost, torch's draws are replaced by numbers that do not
depend on the number of steps, and batch normalisation is done with the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Operations", "Watched", "steady"]

_THRESHOLDS = frozenset(
    "gt lt ge le eq ne sign sgn heaviside round floor ceil trunc argmax argmin topk bernoulli multinomial".split()
)
"""Operations by which a small change of a number makes a step, or none, in the result."""
_BY_RUNNING_STATISTICS = 5
"""The place of `training` among the arguments of both torch.batch_norm and nn.functional.batch_norm."""


class Operations(TorchDispatchMode):
    """Notes what the operations of torch below it are: random, thresholds."""

    def __init__(self) -> None:
        super().__init__()
        self.random = self.thresholds = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # attention is marked as random, and draws only with a dropout: then torch's generator moves
        self.random |= torch.Tag.nondeterministic_seeded in func.tags and "attention" not in _name(func)
        if _name(func) in _THRESHOLDS:
            self.thresholds |= any(isinstance(each, Tensor) and each.is_floating_point() for each in args)
        return func(*args, **(kwargs or {}))


class Watched(TorchFunctionMode):
    """Notes which functions are called: dropout that is on, and batch normalisation by the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = self.batch_norm = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        if "dropout" in name and _given(args, kwargs, 2, ("training", "train"), name.startswith("dropout")):
            self.dropout = name
        if name == "batch_norm" and _given(args, kwargs, _BY_RUNNING_STATISTICS, ("training",), False):
            self.batch_norm = name
        return func(*args, **kwargs)


@contextmanager
def steady() -> Generator[None]:
    """Hold torch's random numbers and batch normalisation still, whatever the number of steps."""
    with _RunningStatistics(), _Replaced():
        yield


def _given(args: Any, kwargs: Any, place: int, names: Iterable[str], default: bool) -> bool:
    """Return an argument that is given by its place or by one of its names."""
    return bool(args[place]) if len(args) > place else bool(next((kwargs[n] for n in names if n in kwargs), default))


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__).rstrip("_")


class _RunningStatistics(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") != "batch_norm" or not _given(
            args, kwargs, _BY_RUNNING_STATISTICS, ("training",), False
        ):
            return func(*args, **kwargs)
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        if func is not torch.nn.functional.batch_norm:
            names = (names[0], names[3], names[4], names[1], names[2], *names[5:], "cudnn_enabled")
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        features = kwargs["input"].shape[1]
        mean, variance = kwargs["running_mean"], kwargs["running_var"]
        return torch.nn.functional.batch_norm(
            kwargs["input"],
            kwargs["input"].new_zeros(features) if mean is None else mean,
            kwargs["input"].new_ones(features) if variance is None else variance,
            kwargs.get("weight"),
            kwargs.get("bias"),
            training=False,
            eps=kwargs.get("eps", 1e-5),
        )


class _Replaced(TorchDispatchMode):
    """Replaces what is drawn by numbers that vary along the last dimension alone, and not with the steps."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = _name(func)
        if name == "rrelu_with_noise":
            return func(*args[:4], False, *args[5:], **kwargs)
        if name == "native_dropout":
            kept = 1 - float(args[1]) or 1.0
            return args[0] / kept, torch.ones_like(args[0], dtype=torch.bool)
        replace = _REPLACEMENTS.get(name)
        if replace is None:  # from the same start at every call
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return func(*args, **kwargs)
        drawn = func(*args, **kwargs)
        return drawn.copy_(replace(drawn, args, kwargs))


def _uniform(drawn: Tensor) -> Tensor:
    """Return numbers in (0, 1): the multiples of the golden ratio, along the last dimension if that is not the only."""
    dtype = drawn.dtype if drawn.is_floating_point() else torch.float32
    features = drawn.shape[-1] if drawn.ndim > 1 else 1
    steps = torch.arange(1, features + 1, dtype=torch.float64, device=drawn.device)
    return (steps * 0.6180339887498949 % 1).clamp(1e-3, 1 - 1e-3).to(dtype).expand(drawn.shape)


def _normal(drawn: Tensor) -> Tensor:
    return torch.erfinv(2 * _uniform(drawn).double() - 1).mul(2**0.5).to(drawn.dtype)


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _between(drawn: Tensor, args: Any, kwargs: Any) -> Tensor:
    low, high = _argument(args, kwargs, 1, "from", 0.0), _argument(args, kwargs, 2, "to", 1.0)
    return low + (high - low) * _uniform(drawn)


def _gaussian(drawn: Tensor, args: Any, kwargs: Any) -> Tensor:
    first = 1 if args and args[0] is drawn else 0  # normal_ is given the tensor that it writes into
    return _argument(args, kwargs, first, "mean", 0.0) + _argument(args, kwargs, first + 1, "std", 1.0) * _normal(drawn)


def _mean(drawn: Tensor, args: Any, kwargs: Any) -> Any:
    """Return the probability itself in place of a Bernoulli number: of dropout it makes nothing."""
    return _argument(args, kwargs, 1, "p", args[0] if args[0] is not drawn else 0.5)


def _likeliest(drawn: Tensor, args: Any, kwargs: Any) -> Tensor:
    del kwargs  # how many is seen from what was drawn
    return cast("Tensor", args[0]).argmax(-1, keepdim=True).expand(drawn.shape)


_REPLACEMENTS: dict[str, Callable[[Tensor, Any, Any], Any]] = {
    "rand": lambda drawn, args, kwargs: _uniform(drawn),
    "rand_like": lambda drawn, args, kwargs: _uniform(drawn),
    "uniform": _between,
    "randn": lambda drawn, args, kwargs: _normal(drawn),
    "randn_like": lambda drawn, args, kwargs: _normal(drawn),
    "normal": _gaussian,
    "bernoulli": lambda drawn, args, kwargs: torch.as_tensor(_mean(drawn, args, kwargs)).to(drawn),
    "exponential": lambda drawn, args, kwargs: (
        -torch.log1p(-_uniform(drawn)) / _argument(args, kwargs, 1, "lambd", 1.0)
    ),
    "multinomial": _likeliest,
    "randint": lambda drawn, args, kwargs: torch.full_like(drawn, args[0] if len(args) > 2 else 0),
    "randperm": lambda drawn, args, kwargs: torch.arange(drawn.numel(), device=drawn.device),
}
