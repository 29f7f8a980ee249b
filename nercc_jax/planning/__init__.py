"""Planning: whether and how to code a service: code, number of workers, and when to decode."""

from ._plan import ALIKE, Candidate, Plan, plan

__all__ = ["ALIKE", "Candidate", "Plan", "plan"]
