"""Learning while predicting, from a stream that is live: one step at a time, in bounded memory."""

from tbptt.online.learner import Online

__all__ = ["Online"]
