"""What the encoder and the decoder have agreed on."""

from __future__ import annotations

import torch

MARK = "$"
"""The key that says that an object of JSON stands for something else, and for what."""

SURROGATES = ("utf-8", "surrogatepass")
"""How a text is written whose characters JSON would not give back: lone surrogates are legal in Python."""

PLAIN_KEYS = (str, int, bool, float, bytes, type(None))
"""What a dict may have for keys: their hash runs no code of a class."""

FACTORIES = {f"builtins:{kind.__name__}": kind for kind in (list, dict, set, int, float)}
"""What may make the missing values of a defaultdict: it is called, and a file must not say what is called."""

NUMPY_SCALARS = "biufcmM"
"""numpy's own letters: bool, int, uint, float, complex, timedelta, datetime."""

NUMPY_ARRAYS = NUMPY_SCALARS + "SU"
"""Those, and texts of fixed length; never "O", whose bytes are addresses."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.complex128, torch.complex64, torch.complex32),
    )
}
"""The tensors that can be stored, by the name of their dtype."""
