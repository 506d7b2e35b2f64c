"""Networks of SpikingJelly, which keep their state inside, as models that carry it."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError

__all__ = ["spiking"]


def spiking(module: nn.Module) -> Stateful:
    """Make a model of a network of SpikingJelly, in either step mode.

    Args:
        module: in step mode "m" it is given (T, B, ...), in "s" one step (B, ...) after the other.

    Raises:
        CapabilityError: its neurons differ in their step mode, or there are none.

    Exactness: against the network run by hand (tests/integrations/test_libraries.py, spikingjelly 2.0.0).
    """
    from spikingjelly.activation_based.base import MemoryModule  # pyright: ignore[reportMissingImports]
    from spikingjelly.activation_based.functional import reset_net  # pyright: ignore[reportMissingImports]

    neurons: list[Any] = [each for each in module.modules() if isinstance(each, MemoryModule)]
    modes = sorted({neuron.step_mode for neuron in neurons})
    if len(modes) != 1:
        raise CapabilityError(
            f"neurons of one step mode were expected, but {type(module).__name__} has {modes or 'no neurons'}: it "
            "is not clear whether to give it many steps or one",
            fix='spikingjelly.activation_based.functional.set_step_mode(net, "m")',
        )
    return stateful(module, inside=reset_net, one_step=modes == ["s"])
