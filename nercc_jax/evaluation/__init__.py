"""Recorded answers, codes side by side, the nested objective, forecasts."""

from ._answers import Answers, record_answers
from ._criteria import coverage
from ._evaluation import Estimate, Evaluation, Evaluations, evaluate
from ._forecast import Forecast, make_forecast
from ._objective import nested_objective

__all__ = [
    "Answers",
    "Estimate",
    "Evaluation",
    "Evaluations",
    "Forecast",
    "coverage",
    "evaluate",
    "make_forecast",
    "nested_objective",
    "record_answers",
]
