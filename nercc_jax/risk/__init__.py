"""Risk of approximate predictions: error probabilities, error bars, and which to give out."""

from ._evidence import Comparison, Risk
from ._monitor import RiskMonitor
from .accuracy import Accuracy
from .ensembles import EnsembleEstimate
from .error_bars import ErrorBars, calibrate_learner_bars
from .error_probability import ErrorProbability, logistic_regression

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
