"""The layers of torchrecurrent, as models that carry their state."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt.adapters import Stateful, stateful

__all__ = ["recurrent"]


def recurrent(module: nn.Module) -> Stateful:
    """Make a model of a layer of torchrecurrent (`LEM`, `IndRNN`, `MGU`, ...), batch first or time first.

    A cell (`LEMCell`) has its own convention: `tbptt.stateful(cell, call, one_step=True)`.

    Exactness: against its pass over the whole sequence (tests/integrations/test_libraries.py, 0.2.5).
    """
    layer: Any = module
    return stateful(module, batch_first=layer.batch_first)
