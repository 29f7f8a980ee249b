"""The tests' run-time type checks find what they are there for."""

import numpy as np
import pytest

from nercc_jax import NeRCC
from nercc_jax.risk._monitor import WorkerMonitor


def test_what_is_no_array():
    with pytest.raises(TypeError, match="violates type hint"):
        WorkerMonitor("8")


def test_arrays_whose_axes_have_other_sizes():
    code = NeRCC(4, 8)
    with pytest.raises(TypeError, match="violates type hint"):
        code.decode(np.zeros((8, 3), np.float32), np.ones(7, bool))


def test_they_can_be_switched_off(untyped):
    with pytest.raises(ValueError, match="mask"):
        NeRCC(4, 8).decode(np.zeros((8, 3), np.float32), np.ones(7, bool))
