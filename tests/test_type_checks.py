"""The tests' run-time type checks find what they are there for."""

import beartype
import numpy as np
import pytest
import type_checks

from nercc_jax import NeRCC
from nercc_jax.risk import RiskMonitor

CHECKER = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def test_what_is_no_array():
    with pytest.raises(TypeError, match="violates type hint"):
        RiskMonitor("0.1")


def test_arrays_whose_axes_have_other_sizes():
    code = NeRCC(4, 8)
    with pytest.raises(TypeError, match="violates type hint"):
        code.decode(np.zeros((8, 3), np.float32), np.ones(7, bool))


def test_functions_that_are_made_anew():
    """They share a check, and run as themselves."""
    made = [_local(number) for number in (1, 2)]
    assert [each(10) for each in made] == [11, 12]
    assert [each(10, more=5) for each in made] == [16, 17]
    for each in made:
        with pytest.raises(TypeError, match=r"plus\(\) parameter x='10' violates type hint"):
            each("10")


def _local(number):
    def plus(x: int, *, more: int = 0) -> int:
        return x + number + more

    return type_checks._checked(plus, typechecker=CHECKER)


def test_they_can_be_switched_off(untyped):
    with pytest.raises(ValueError, match="mask"):
        NeRCC(4, 8).decode(np.zeros((8, 3), np.float32), np.ones(7, bool))
