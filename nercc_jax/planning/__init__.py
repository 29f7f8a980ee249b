"""Planning: the code, the number of workers, and the rule of waiting for a service; or none."""

from ._candidates import Candidate, PlanEffort
from ._plan import Plan, plan

__all__ = [
    "Candidate",
    "Plan",
    "PlanEffort",
    "plan",
]
