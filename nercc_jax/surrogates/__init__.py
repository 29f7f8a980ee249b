"""Cheap models and learners beside the coded one, doubt, and the scheme that joins them."""

from ._bars import ErrorBars, bars_from, bars_of
from ._calibrate_bars import bars_of_scheme, calibrate_bars
from ._calibrate_doubt import calibrate_doubt
from ._components import ComponentLearner, fit_components, tune_components
from ._doubt import (
    Doubt,
    assess,
    doubt_from,
    doubt_of,
    doubt_of_points,
    doubt_of_predictions,
    features_of_doubt,
    margin,
    observe,
)
from ._expected import (
    AbstractExpectation,
    AbstractLearner,
    AbstractSurrogate,
    Expected,
    Outputs,
    joined_outputs,
    outputs_of,
)
from ._fit_learner import (
    LearnerCriterion,
    LearnerTuning,
    LeftOut,
    fit_learner,
    leave_one_out,
    tune_learner,
)
from ._fit_scheme import Lesson, fit_scheme
from ._kernels import Kernel
from ._learner import Learner, start_learner
from ._learner_files import learner_card, load_learner, save_learner
from ._logistic import logistic_regression
from ._projection import Projection, principal_components
from ._reexecute import Assessed, doubtful, error_bars, reexecute
from ._scheme import Prepared, Scheme
from ._surrogate import Surrogate, decode_with_surrogate, expect_points, fit_surrogate

__all__ = [
    "AbstractExpectation",
    "AbstractLearner",
    "AbstractSurrogate",
    "Assessed",
    "ComponentLearner",
    "Doubt",
    "ErrorBars",
    "Expected",
    "Kernel",
    "Learner",
    "LearnerCriterion",
    "LearnerTuning",
    "LeftOut",
    "Lesson",
    "Outputs",
    "Prepared",
    "Projection",
    "Scheme",
    "Surrogate",
    "assess",
    "bars_from",
    "bars_of",
    "bars_of_scheme",
    "calibrate_bars",
    "calibrate_doubt",
    "decode_with_surrogate",
    "doubt_from",
    "doubt_of",
    "doubt_of_points",
    "doubt_of_predictions",
    "doubtful",
    "error_bars",
    "expect_points",
    "features_of_doubt",
    "fit_components",
    "fit_learner",
    "fit_scheme",
    "fit_surrogate",
    "joined_outputs",
    "learner_card",
    "leave_one_out",
    "load_learner",
    "logistic_regression",
    "margin",
    "observe",
    "outputs_of",
    "principal_components",
    "reexecute",
    "save_learner",
    "start_learner",
    "tune_components",
    "tune_learner",
]
