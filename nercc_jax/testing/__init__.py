"""Checks for extensions, the contract that every code keeps, and simulated pools and clocks."""

from ._codes import check_code
from ._simulated import SimulatedClock, SimulatedPool

__all__ = ["SimulatedClock", "SimulatedPool", "check_code"]
