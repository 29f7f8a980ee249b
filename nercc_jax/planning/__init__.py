"""Planning: the code, the number of workers, and the rule of waiting for a service; or none."""

from ._candidates import Candidate, make_candidate, waits
from ._codes import Codes, Half
from ._plan import ALIKE, PLANNED, Plan, load_plan, plan

__all__ = [
    "ALIKE",
    "PLANNED",
    "Candidate",
    "Codes",
    "Half",
    "Plan",
    "load_plan",
    "make_candidate",
    "plan",
    "waits",
]
