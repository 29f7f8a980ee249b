"""Gradient descent through the nested objective, and the search for a layout."""

from ._fine_tune import FineTuned, FineTuningStep, fine_tune
from ._layouts import SEARCHED, Candidate, LayoutSearch, search_layout
from ._parameters import parametrize
from ._tune import Tuned, TuningStep, split_groups, tune

__all__ = [
    "SEARCHED",
    "Candidate",
    "FineTuned",
    "FineTuningStep",
    "LayoutSearch",
    "Tuned",
    "TuningStep",
    "fine_tune",
    "parametrize",
    "search_layout",
    "split_groups",
    "tune",
]
