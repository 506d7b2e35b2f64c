"""The networks of ncps (CfC, LTC), as models that carry their state."""

from __future__ import annotations

from typing import Any

from torch import nn

from tbptt.adapters import Stateful, stateful
from tbptt.errors import CapabilityError

__all__ = ["recurrent"]


def recurrent(module: nn.Module) -> Stateful:
    """Make a model of a `CfC` or an `LTC`, batch first or time first.

    Args:
        module: built with return_sequences=True, as it is by default.

    Raises:
        CapabilityError: built with return_sequences=False: it returns the last step alone.

    Exactness: against its pass over the whole sequence (tests/integrations/test_libraries.py, ncps 1.0.1).
    """
    layer: Any = module
    if not layer.return_sequences:
        raise CapabilityError(
            f"a {type(module).__name__} that returns every step was expected, but its return_sequences is False: "
            "there would be one output for a whole window",
            fix=f"{type(module).__name__}(..., return_sequences=True)",
        )
    return stateful(module, batch_first=layer.batch_first)
