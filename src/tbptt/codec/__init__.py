"""Any nesting of plain values, objects and tensors as JSON with references to tensors, and exactly back.

What JSON has is written as JSON; everything else is an object with the key "$", which names its kind. No
code is ever run or imported to read one: the class of a named tuple or object must already be there, and an
object is put together without its `__init__`.
"""

from tbptt.codec.decoder import decode
from tbptt.codec.encoder import encode

__all__ = ["decode", "encode"]
