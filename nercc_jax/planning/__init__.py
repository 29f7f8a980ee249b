"""Which code, how many workers, which rule of waiting, or nothing."""

from ._candidates import Candidate, make_candidate, waits
from ._codes import Codes, Half
from ._plan import ALIKE, LAYOUTS, Plan, load_plan, plan

__all__ = [
    "ALIKE",
    "LAYOUTS",
    "Candidate",
    "Codes",
    "Half",
    "Plan",
    "load_plan",
    "make_candidate",
    "plan",
    "waits",
]
