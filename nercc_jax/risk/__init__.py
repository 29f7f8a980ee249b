"""How far an approximate prediction may be trusted: error probabilities and error bars."""

from ._error_bars import ErrorBars, bars_from, bars_of, error_bars
from ._error_probability import (
    Doubt,
    doubt_from,
    doubt_of,
    doubt_of_points,
    doubt_of_predictions,
    features_of_doubt,
    margin,
    observe,
)
from ._logistic import logistic_regression

__all__ = [
    "Doubt",
    "ErrorBars",
    "bars_from",
    "bars_of",
    "doubt_from",
    "doubt_of",
    "doubt_of_points",
    "doubt_of_predictions",
    "error_bars",
    "features_of_doubt",
    "logistic_regression",
    "margin",
    "observe",
]
