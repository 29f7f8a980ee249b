"""Planning: the code, the number of workers, and the rule of waiting for a service; or none."""

from ._plan import ALIKE, Candidate, Plan, plan

__all__ = ["ALIKE", "Candidate", "Plan", "plan"]
