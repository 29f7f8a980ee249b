"""Risk of approximate predictions: error probabilities and error bars."""

from ._error_bars import ErrorBars, calibrate_learner_bars, error_bars, error_bars_from_ratios
from ._error_probability import (
    ErrorProbability,
    error_features,
    error_probability_from_answers,
    fit_error_probability,
    fit_error_probability_of_points,
    fit_error_probability_of_predictions,
    margin,
    observe_errors,
)
from ._logistic import logistic_regression

__all__ = [
    "ErrorBars",
    "ErrorProbability",
    "calibrate_learner_bars",
    "error_bars",
    "error_bars_from_ratios",
    "error_features",
    "error_probability_from_answers",
    "fit_error_probability",
    "fit_error_probability_of_points",
    "fit_error_probability_of_predictions",
    "logistic_regression",
    "margin",
    "observe_errors",
]
