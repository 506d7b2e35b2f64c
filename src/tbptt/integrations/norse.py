"""Networks of norse, as models that carry their state."""

from __future__ import annotations

from torch import nn

from tbptt.adapters import Stateful, stateful

__all__ = ["sequential"]


def sequential(module: nn.Module, *, one_step: bool) -> Stateful:
    """Make a model of a `SequentialState`, or of any neuron of norse.

    Args:
        module: takes and returns its state, which it writes into.
        one_step: True for cells (`LIFCell`), which take one step; False for layers (`LIF`), which take (T, B, ...).

    Exactness: against its pass over the whole sequence (tests/integrations/test_libraries.py, norse 1.1.0).
    """
    return stateful(module, one_step=one_step)
