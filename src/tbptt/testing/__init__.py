"""Arbiters for estimators: oracles that share no code with what they judge."""

from tbptt.testing.oracles import Recording, StepFunction, frozen_boundary, influence_sums, look_backs

__all__ = ["Recording", "StepFunction", "frozen_boundary", "influence_sums", "look_backs"]
