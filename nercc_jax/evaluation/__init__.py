"""Recorded answers, codes side by side, the nested objective, forecasts."""

from ._answers import Answers, record_answers
from ._evaluation import Estimate, Evaluation, Evaluations, evaluate
from ._forecast import Forecast, make_forecast
from ._functions import coverage, recall, relative_rmse, row_errors
from ._looks import system_look
from ._objective import nested_errors, nested_objective
from ._pictures import batch_figure, straggler_curves

__all__ = [
    "Answers",
    "Estimate",
    "Evaluation",
    "Evaluations",
    "Forecast",
    "batch_figure",
    "coverage",
    "evaluate",
    "make_forecast",
    "nested_errors",
    "nested_objective",
    "recall",
    "record_answers",
    "relative_rmse",
    "row_errors",
    "straggler_curves",
    "system_look",
]
