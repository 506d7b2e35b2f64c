"""Any nesting of plain values, objects and tensors as JSON with references to tensors, and exactly back.

What JSON has is written as JSON; everything else is an object with the key "$", which names its kind.

A file is not a program. What is named in one is looked up in lists of this program's own, never in modules:

- The class of an object, named tuple or enum must be one that this run's own state is made of in the same entry of the
  state ("carry", "optimizer", ...), or one that the program has registered (`tbptt.registered_class`). For what a new
  run does not have yet, such as the model's state, the model is run on the first window (`first_states`).
- A class that is itself a value must be a value there in this run's own state, too.
- The default of a defaultdict is list, dict, set, int or float.

An object is put together without its `__init__`, named tuples and enum members without any call. Nothing is imported,
and no function is ever restored.
"""

from tbptt.codec.decoder import UnknownClassError, decode
from tbptt.codec.encoder import encode
from tbptt.codec.known import Like, nothing, registered_class

__all__ = ["Like", "UnknownClassError", "decode", "encode", "nothing", "registered_class"]
