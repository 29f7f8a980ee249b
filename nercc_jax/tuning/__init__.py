"""Gradient descent through the nested objective, and the search for a layout."""

from ._descent import Descent
from ._fine_tune import FineTuned, FineTuningStep, Target, fine_tune
from ._layouts import SEARCHED, LayoutCandidate, LayoutSearch, LayoutTuning, search_layout
from ._parameters import parametrize
from ._sampling import Sampling, Split, split_points
from ._tune import Tuned, TuningStep, tune

__all__ = [
    "SEARCHED",
    "Descent",
    "FineTuned",
    "FineTuningStep",
    "LayoutCandidate",
    "LayoutSearch",
    "LayoutTuning",
    "Sampling",
    "Split",
    "Target",
    "Tuned",
    "TuningStep",
    "fine_tune",
    "parametrize",
    "search_layout",
    "split_points",
    "tune",
]
