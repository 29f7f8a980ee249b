"""Recorded answers, codes side by side, the nested objective, forecasts."""

from ._answers import (
    Answers,
    Recorder,
    all_answers,
    batched,
    cut_groups,
    mean_losses,
    own_outputs,
    record_answers,
)
from ._criteria import Criterion, agree_on_labels, labels_of, point_criterion, same_labels
from ._evaluation import SHARES, Estimate, Evaluation, Evaluations, evaluate
from ._forecast import Forecast, make_forecast
from ._functions import coverage, recall, relative_rmse, row_errors
from ._looks import system_look
from ._objective import nested_errors, nested_objective
from ._pictures import (
    batch_figure,
    laws_and_codes,
    straggler_curves,
    straggler_figure,
)
from ._trial import Trial, draw_sets, landscape, make_trial, relative_objective

__all__ = [
    "SHARES",
    "Answers",
    "Criterion",
    "Estimate",
    "Evaluation",
    "Evaluations",
    "Forecast",
    "Recorder",
    "Trial",
    "agree_on_labels",
    "all_answers",
    "batch_figure",
    "batched",
    "coverage",
    "cut_groups",
    "draw_sets",
    "evaluate",
    "labels_of",
    "landscape",
    "laws_and_codes",
    "make_forecast",
    "make_trial",
    "mean_losses",
    "nested_errors",
    "nested_objective",
    "own_outputs",
    "point_criterion",
    "recall",
    "record_answers",
    "relative_objective",
    "relative_rmse",
    "row_errors",
    "same_labels",
    "straggler_curves",
    "straggler_figure",
    "system_look",
]
