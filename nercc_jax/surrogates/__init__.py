"""Surrogates, cheap approximations of the served model: fixed models, and learners from answers."""

from .interface import AbstractSurrogate
from .kernel import Kernel, Projection, principal_components
from .learner import Learner
from .surrogate import Surrogate, fit_surrogate
from .tuning import LearnerTuning, fit_learner, tune_learner

__all__ = [
    "AbstractSurrogate",
    "Kernel",
    "Learner",
    "LearnerTuning",
    "Projection",
    "Surrogate",
    "fit_learner",
    "fit_surrogate",
    "principal_components",
    "tune_learner",
]
