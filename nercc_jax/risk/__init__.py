"""Risk of approximate predictions: error probabilities, error bars, and which to give out."""

from ._accuracy import Accuracy
from ._error_bars import ErrorBars, calibrate_learner_bars
from ._error_probability import ErrorProbability, logistic_regression
from ._evidence import Comparison, Risk
from ._monitor import RiskMonitor
from .ensembles import EnsembleEstimate

__all__ = [
    "Accuracy",
    "Comparison",
    "EnsembleEstimate",
    "ErrorBars",
    "ErrorProbability",
    "Risk",
    "RiskMonitor",
    "calibrate_learner_bars",
    "logistic_regression",
]
