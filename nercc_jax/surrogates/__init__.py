"""Cheap models of the served one: fixed ones, and learners from past answers."""

from ._components import ComponentLearner
from ._fit_learner import fit_learner, tune_learner
from ._interface import (
    AbstractGroupPrior,
    AbstractLearner,
    AbstractSurrogate,
    FixedOutputs,
    SurrogatePredictions,
    fixed_outputs,
    fixed_outputs_of_answers,
)
from ._kernels import Kernel
from ._learner import Learner, init_learner
from ._learner_files import learner_card, load_learner, save_learner
from ._projection import Projection, principal_components
from ._surrogate import (
    Surrogate,
    decode_with_deviation,
    decode_with_surrogate,
    fit_surrogate,
    group_prior_of_points,
)
from ._tune_kernel import LearnerCriterion, LearnerTuning, LeaveOneOut, leave_one_out

__all__ = [
    "AbstractGroupPrior",
    "AbstractLearner",
    "AbstractSurrogate",
    "ComponentLearner",
    "FixedOutputs",
    "Kernel",
    "Learner",
    "LearnerCriterion",
    "LearnerTuning",
    "LeaveOneOut",
    "Projection",
    "Surrogate",
    "SurrogatePredictions",
    "decode_with_deviation",
    "decode_with_surrogate",
    "fit_learner",
    "fit_surrogate",
    "fixed_outputs",
    "fixed_outputs_of_answers",
    "group_prior_of_points",
    "init_learner",
    "learner_card",
    "leave_one_out",
    "load_learner",
    "principal_components",
    "save_learner",
    "tune_learner",
]
