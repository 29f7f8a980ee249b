"""Risk of approximate predictions: error probabilities and error bars."""

from ._error_bars import ErrorBars, calibrate_learner_bars
from ._error_probability import ErrorProbability, logistic_regression
from ._monitor import RiskMonitor

__all__ = [
    "ErrorBars",
    "ErrorProbability",
    "RiskMonitor",
    "calibrate_learner_bars",
    "logistic_regression",
]
