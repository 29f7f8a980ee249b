"""Recorded answers, codes side by side, the nested objective, forecasts."""

from ._answers import CodedAnswers
from ._evaluation import (
    Estimate,
    Evaluation,
    all_answers,
    batched,
    cut_groups,
    evaluate,
    own_outputs,
)
from ._forecast import Forecast, make_forecast
from ._objective import Loss, nested_errors, nested_objective, point_loss
from ._trial import Trial, draw_sets, landscape, make_trial, relative_objective

__all__ = [
    "CodedAnswers",
    "Estimate",
    "Evaluation",
    "Forecast",
    "Loss",
    "Trial",
    "all_answers",
    "batched",
    "cut_groups",
    "draw_sets",
    "evaluate",
    "landscape",
    "make_forecast",
    "make_trial",
    "nested_errors",
    "nested_objective",
    "own_outputs",
    "point_loss",
    "relative_objective",
]
