"""Planning: the code, the number of workers, and the rule of waiting for a service; or none."""

from ._plan import Plan, plan
from ._planner import Candidate, PlanEffort

__all__ = [
    "Candidate",
    "Plan",
    "PlanEffort",
    "plan",
]
