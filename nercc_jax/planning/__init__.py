"""Which code, how many workers, which rule of waiting, or nothing."""

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
