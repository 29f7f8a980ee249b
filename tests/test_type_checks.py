"""The tests' run-time type checks find what they are there for."""

import beartype
import numpy as np
import pytest
import type_checks

from nercc_jax import NeRCC
from nercc_jax.risk import WorkerMonitor


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


def test_in_each_test_the_first_calls_are_checked(monkeypatch):
    @type_checks._checked(typechecker=beartype.beartype)
    def double(x: int):
        return 2 * x

    monkeypatch.setattr(type_checks, "CALLS", 3)
    for _ in range(2):
        type_checks.begin_test()
        for _ in range(3):
            with pytest.raises(beartype.roar.BeartypeCallHintViolation):
                double("8")
        assert double("8") == "88"
