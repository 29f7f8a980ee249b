"""Checks of arguments that are numbers."""

import operator
from typing import Any

import numpy as np


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return the value as Python's integer, from NumPy's or JAX's as well.

    Raises:
        ValueError: It is not an integer (a bool is not one), or less than `least`.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool) or count < least:
        wanted = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
    return count


def check_counts(**counts: Any) -> tuple[int, ...]:
    """Check several counts by name, and return them in this order (`check_count`)."""
    return tuple(check_count(name, value) for name, value in counts.items())


def check_fields(record: Any, *names: str, least: int = 1) -> None:
    """Check counts among a frozen dataclass's fields, which become Python's integers."""
    for name in names:
        object.__setattr__(record, name, check_count(name, getattr(record, name), least))


def check_positive(**numbers: float) -> None:
    """Raise ValueError for numbers that are not positive and finite."""
    for name, value in numbers.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError for numbers that are negative or not finite."""
    for name, value in numbers.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be 0 or positive, and finite, not {value}")
