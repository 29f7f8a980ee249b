"""Gradient descent through the nested objective, and learned decoders."""

from ._learn_decoder import learn_decoder
from ._parameters import parametrize
from ._sampling import Sampling
from ._tune import Descent, Tuned, TuningStep, tune

__all__ = [
    "Descent",
    "Sampling",
    "Tuned",
    "TuningStep",
    "learn_decoder",
    "parametrize",
    "tune",
]
