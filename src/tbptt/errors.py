"""What can go wrong, as a tree.

    TbpttError
    ├── ConfigError      (ValueError)       a setting that cannot be meant
    ├── ShapeError       (ValueError)       a tensor of another shape or type than agreed
    ├── CapabilityError  (TypeError)        an object that cannot do what is asked of it
    ├── StreamError      (RuntimeError)     data that cannot be read
    │   └── EndOfStream                     one pass is over: not a fault, rewind to go on
    ├── NonFiniteError   (ArithmeticError)  NaN or infinity where a number is needed
    ├── DivergedError    (ArithmeticError)  training that going back does not help
    ├── CheckError       (RuntimeError)     a model that does not carry its state
    └── CheckpointError  (RuntimeError)     a checkpoint that cannot be trusted

    UserWarning
    ├── CheckpointWarning                   a checkpoint or a file of the run that could not be written
    └── AlarmWarning                        training that goes wrong, or nowhere

Each leaf is also the builtin that a caller would catch. A message says what was expected, what came,
why it matters, and the fix.
"""

from __future__ import annotations

__all__ = [
    "AlarmWarning",
    "CapabilityError",
    "CheckError",
    "CheckpointError",
    "CheckpointWarning",
    "ConfigError",
    "DivergedError",
    "EndOfStream",
    "NonFiniteError",
    "ShapeError",
    "StreamError",
    "TbpttError",
]


class TbpttError(Exception):
    """The root: catch it to catch everything that this library raises on purpose.

    Args:
        message: what was expected, what came, and why it matters.
        fix: what to do about it, preferably as code; shown on a line of its own.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.fix}" if self.fix else self.message


class ConfigError(TbpttError, ValueError):
    """A setting has a value that cannot be meant."""


class ShapeError(TbpttError, ValueError):
    """A tensor has another shape, dtype or number of lanes than was agreed."""


class CapabilityError(TbpttError, TypeError):
    """An object cannot do what is asked of it."""


class StreamError(TbpttError, RuntimeError):
    """A stream cannot deliver its steps."""


class EndOfStream(StreamError):
    """One pass over a stream is over; `rewind()` starts the next."""


class NonFiniteError(TbpttError, ArithmeticError):
    """NaN or infinity stands where a number is needed."""


class DivergedError(TbpttError, ArithmeticError):
    """Training has gone wrong again and again, however often it went back."""


class CheckError(TbpttError, RuntimeError):
    """A model fails `tbptt.check`: training it would be silently wrong."""


class CheckpointError(TbpttError, RuntimeError):
    """A checkpoint is damaged, incomplete, or belongs to something else."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written or was passed over; training goes on."""


class AlarmWarning(UserWarning):
    """Training goes wrong, or nowhere; it goes on, and the message says what to do."""
