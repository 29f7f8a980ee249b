"""Cheap models of the served one: fixed ones, and learners from past answers."""

from ._components import ComponentLearner, fit_components, tune_components
from ._fit_learner import (
    LearnerCriterion,
    LearnerTuning,
    LeftOut,
    fit_learner,
    leave_one_out,
    tune_learner,
)
from ._interface import (
    AbstractExpectation,
    AbstractLearner,
    AbstractSurrogate,
    Expected,
    Outputs,
    joined_outputs,
    outputs_of,
)
from ._kernels import Kernel
from ._learner import Learner, start_learner
from ._learner_files import learner_card, load_learner, save_learner
from ._projection import Projection, principal_components
from ._surrogate import Surrogate, assess, decode_with_surrogate, expect_points, fit_surrogate

__all__ = [
    "AbstractExpectation",
    "AbstractLearner",
    "AbstractSurrogate",
    "ComponentLearner",
    "Expected",
    "Kernel",
    "Learner",
    "LearnerCriterion",
    "LearnerTuning",
    "LeftOut",
    "Outputs",
    "Projection",
    "Surrogate",
    "assess",
    "decode_with_surrogate",
    "expect_points",
    "fit_components",
    "fit_learner",
    "fit_surrogate",
    "joined_outputs",
    "learner_card",
    "leave_one_out",
    "load_learner",
    "outputs_of",
    "principal_components",
    "save_learner",
    "start_learner",
    "tune_components",
    "tune_learner",
]
