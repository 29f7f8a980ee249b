"""Gradient descent through the nested objective, and the search for a layout."""

from ._layouts import LayoutTuning, search_layout
from ._learn_decoder import learn_decoder
from ._parameters import parametrize
from ._sampling import Sampling
from ._tune import Descent, Tuned, TuningStep, tune

__all__ = [
    "Descent",
    "LayoutTuning",
    "Sampling",
    "Tuned",
    "TuningStep",
    "learn_decoder",
    "parametrize",
    "search_layout",
    "tune",
]
