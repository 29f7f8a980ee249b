"""The contract of codes, to check your own, and simulated pools and clocks."""

from ._codes import check_code
from ._simulated import SimulatedClock, SimulatedPool

__all__ = ["SimulatedClock", "SimulatedPool", "check_code"]
