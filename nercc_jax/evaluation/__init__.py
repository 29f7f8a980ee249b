"""Recorded answers, the comparison of codes, and the nested objective."""

from ._answers import Answers, record_answers
from ._evaluation import Estimate, Evaluation, Evaluations, evaluate
from ._objective import nested_objective

__all__ = [
    "Answers",
    "Estimate",
    "Evaluation",
    "Evaluations",
    "evaluate",
    "nested_objective",
    "record_answers",
]
