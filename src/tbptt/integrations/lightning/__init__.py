"""Lightning 2: truncated backpropagation through time for a LightningModule.

Lightning 1 had `truncated_bptt_steps`; version 2 took it out. `TBPTTMixin` gives it back: windows from a stream,
k1 and k2 or any other estimator, guards, and a place in mid-stream inside Lightning's own checkpoints.
"""

from tbptt.integrations.lightning.course import StreamOfRank
from tbptt.integrations.lightning.mixin import TBPTTMixin

__all__ = ["StreamOfRank", "TBPTTMixin"]
