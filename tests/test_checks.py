"""Numbers as they come: NumPy's are integers like Python's, and nothing else is."""

import equinox as eqx
import jax
import numpy as np
import pytest

from nercc_jax import (
    Berrut,
    DevicePool,
    ExactStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    Uncoded,
)
from nercc_jax.codes import regression_points
from nercc_jax.stragglers import (
    ContiguousStragglers,
    ExponentialLatency,
    IndependentStragglers,
    TraceLatency,
    WaitFor,
    straggler_sets,
)


def static_numbers(module):
    """All integers among a module's fields."""
    numbers = [value for value in vars(module).values() if isinstance(value, int | np.integer)]
    return [number for number in numbers if not isinstance(number, bool)]


@pytest.mark.parametrize(
    "build",
    [
        lambda k, n: NeRCC(k, n),
        lambda k, n: NeRCC(k, n, points="mixed:0.5"),
        lambda k, n: Berrut(k, n),
        lambda k, n: Lagrange(k, n, degree=type(k)(2)),
        lambda k, n: Replication(k, n),
        lambda k, n: Parity(k, type(k)(6)),
        lambda k, n: Uncoded(k),
        lambda k, n: ExactStragglers(k),
        lambda k, n: ContiguousStragglers(k),
        lambda k, n: WaitFor(ExponentialLatency(1.0), k),
    ],
)
def test_modules_take_numpys_integers_without_a_warning(build, untyped):
    """Warnings are errors here: Equinox warns of arrays in static fields."""
    plain, given = build(4, 9), build(np.int64(4), np.int64(9))
    assert all(type(number) is int for number in static_numbers(given))
    assert eqx.tree_equal(plain, given)
    assert jax.tree.structure(plain) == jax.tree.structure(given), "one compilation serves both"


def test_points_and_sets_of_numpys_integers(key, untyped):
    alpha, beta = regression_points(np.int64(3), np.int32(5))
    assert alpha.shape == (3,)
    assert beta.shape == (5,)
    sets = straggler_sets(ExactStragglers(np.int64(2)), key, np.int64(5), np.int64(64))
    assert sets.shape == (10, 5)
    assert type(IndependentStragglers(np.float64(0.25)).probability) is float


def test_a_trace_from_a_list(key):
    law = TraceLatency([0.1, 0.2])
    drawn = np.asarray(law.sample(key, (2000,)))
    np.testing.assert_allclose(np.unique(drawn), [0.1, 0.2], rtol=1e-6)
    assert abs(np.mean(drawn) - 0.15) < 5 * 0.05 / np.sqrt(2000)
    mask = jax.jit(lambda key: WaitFor(law, 3).available(key, 4))(key)
    assert int(mask.sum()) == 3
    with pytest.raises(ValueError, match="finite, non-negative"):
        TraceLatency([0.1, -0.2])


def test_a_pool_takes_numpys_integers(untyped):
    with DevicePool(np.tanh, np.int64(2), max_attempts=np.int64(2), compiled=False) as pool:
        batch = pool.dispatch(np.zeros((3, 1, 2), np.float32), needed=np.int64(3))
        assert batch.wait(np.int64(3)).available.all()
    with pytest.raises(ValueError, match="num_workers must be a positive integer, not True"):
        DevicePool(np.tanh, True, compiled=False)
