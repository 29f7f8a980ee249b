"""What arguments that are numbers may be."""

import numpy as np


def check_positive(**numbers: float) -> None:
    """Raises: ValueError for what is not positive and finite."""
    for name, value in numbers.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")


def check_counts(**counts: int) -> None:
    """Raises: ValueError for what is no positive integer."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
