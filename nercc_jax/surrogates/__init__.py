"""Cheap models of the served one: fixed ones, and learners from past answers."""

from ._fit_learner import fit_learner, tune_learner
from ._interface import AbstractLearner, AbstractSurrogate
from ._kernels import Kernel
from ._learner import Learner, init_learner
from ._learner_files import learner_card, load_learner, save_learner
from ._pairs import Projection, principal_components
from ._surrogate import Surrogate, fit_surrogate
from ._tune_kernel import LearnerTuning

__all__ = [
    "AbstractLearner",
    "AbstractSurrogate",
    "Kernel",
    "Learner",
    "LearnerTuning",
    "Projection",
    "Surrogate",
    "fit_learner",
    "fit_surrogate",
    "init_learner",
    "learner_card",
    "load_learner",
    "principal_components",
    "save_learner",
    "tune_learner",
]
