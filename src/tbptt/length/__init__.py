"""Lengths that change while a model trains: policies that stand wherever a k1 or a k2 is asked for.

A policy holds settings only. How far it has come is a `LengthState`, which an estimator keeps in its carry, so that
a resumed run goes on with the same lengths.
"""

from tbptt.length.adaptive import Adaptive
from tbptt.length.base import Length, LengthState, RateScaling, scaled_rate
from tbptt.length.curriculum import Curriculum
from tbptt.length.schedules import Choice, Ramp, RandomLength
from tbptt.length.spelling import parse_length

__all__ = [
    "Adaptive",
    "Choice",
    "Curriculum",
    "Length",
    "LengthState",
    "Ramp",
    "RandomLength",
    "RateScaling",
    "parse_length",
    "scaled_rate",
]
