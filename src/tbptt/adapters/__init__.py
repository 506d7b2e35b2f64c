"""Modules of any habit as `model(inputs, state) -> (outputs, state)`."""

from tbptt.adapters.model import Stateful
from tbptt.adapters.protect import protected
from tbptt.adapters.stateful import stateful

__all__ = ["Stateful", "protected", "stateful"]
