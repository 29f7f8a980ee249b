"""Recorded answers, the comparison of codes, and the nested objective."""

from ._evaluation import Estimate, Evaluation, Evaluations, evaluate
from .answers import Answers, record_answers
from .objective import nested_objective

__all__ = [
    "Answers",
    "Estimate",
    "Evaluation",
    "Evaluations",
    "evaluate",
    "nested_objective",
    "record_answers",
]
