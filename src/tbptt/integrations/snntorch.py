"""Networks of snnTorch whose neurons keep their state inside, as models that carry it."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt.adapters import Stateful, stateful

__all__ = ["spiking"]


def spiking(module: nn.Module) -> Stateful:
    """Make a model of a network of snnTorch that takes one step, its neurons built with init_hidden=True.

    The membranes become a state that is passed, reset by lane and saved; snnTorch itself has them in no
    state_dict. They are reset here neuron by neuron: `snntorch.utils.reset` overlooks those of nested
    modules, and empties those of every other network of the process.

    Args:
        module: of inputs (B, ...). What it returns, spikes or (spikes, membranes), becomes (T, B, ...).

    Exactness: against the network run step by step by hand (tests/integrations/test_libraries.py, 1.0.0).
    """
    return stateful(module, inside=reset, one_step=True)


def reset(module: nn.Module) -> None:
    """Put every neuron of the network to the start of a sequence."""
    from snntorch import SpikingNeuron  # pyright: ignore[reportMissingImports]

    for each in module.modules():
        if isinstance(each, SpikingNeuron):
            neuron: Any = each
            neuron.reset_mem()
