"""NumPy's arrays and numbers at every door.

Byte orders that JAX misreads, kinds it has no type for, and integers that are not Python's.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
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
    coded_inference,
    evaluate,
    nested_objective,
    pool_inference,
)
from nercc_jax.codes import decode_groups, regression_points
from nercc_jax.inference import order_points, robust_decode
from nercc_jax.splines import process_variance, smoothing_spline
from nercc_jax.stragglers import (
    ContiguousStragglers,
    ExponentialLatency,
    IndependentStragglers,
    TraceLatency,
    WaitFor,
    straggler_sets,
)
from nercc_jax.surrogates import fit_learner
from nercc_jax.tuning import Descent, Sampling

CODE = NeRCC(4, 9)
MASK = np.arange(9) != 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=(9, 3)).astype(np.float32)
T = np.linspace(-1, 1, 9).astype(np.float32)
INFER = coded_inference(jnp.tanh, CODE)
ON_HOST = coded_inference(lambda x: np.tanh(np.asarray(x)).astype(">f4"), CODE)


def in_pool(x):
    with DevicePool(lambda batch: np.tanh(np.asarray(batch)), 9, compiled=False) as pool:
        return pool_inference(pool, CODE)(x)


DOORS = {
    "encode": lambda x, y: CODE.encode(x[:4]),
    "decode": lambda x, y: CODE.decode(y, MASK),
    "uncertainty": lambda x, y: CODE.decode(y, MASK, return_uncertainty=True)[1],
    "decode_groups": lambda x, y: decode_groups(CODE, y[None], MASK[None]).predictions,
    "coded_inference": lambda x, y: INFER(x[:4], MASK),
    "arguments of the model": lambda x, y: coded_inference(lambda x, w: x * w, CODE)(
        x[:4], MASK, y[0]
    ),
    "a model on the host": lambda x, y: ON_HOST(x[:4], MASK),
    "robust_decode": lambda x, y: robust_decode(CODE, y, MASK, max_adversaries=1)[0].predictions,
    "smoothing_spline": lambda x, y: smoothing_spline(T, y, 0.1).evaluate(T),
    "process_variance": lambda x, y: process_variance(T, y, 0.1),
    "order_points": lambda x, y: order_points(x, 4, features=x),
    "points of a code": lambda x, y: NeRCC(3, 9, points=(y[0] / 4, T.astype(y.dtype))).alpha,
    "nested_objective": lambda x, y: nested_objective(jnp.tanh, CODE, x[None, :4], MASK[None]),
    "evaluate": lambda x, y: [
        row.mse.mean
        for row in evaluate(
            jnp.tanh, {"n": CODE}, x, {"1": ExactStragglers(1)}, key=jax.random.key(0), num_sets=2
        )
    ],
    "fit_learner": lambda x, y: fit_learner(x, y[:8], capacity=16, tuning=None).predict(X)[0],
    "learner.update": lambda x, y: (
        fit_learner(X, Y[:8], capacity=16, tuning=None).update(x + 1, y[:8]).factor.spread
    ),
    "learner.predict": lambda x, y: fit_learner(X, Y[:8], capacity=16, tuning=None).predict(x)[0],
    "pool_inference": lambda x, y: in_pool(x[:4]),
}


@pytest.mark.parametrize("door", DOORS)
def test_big_endian_arrays_are_read_as_such(door):
    """JAX reads them as native ones once it has compiled a program for that shape."""
    wanted = DOORS[door](X, Y)
    np.testing.assert_array_equal(DOORS[door](X.astype(">f4"), Y.astype(">f4")), wanted)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda y: y.astype(np.longdouble), r"y is float128, .* no type for: convert it"),
        (lambda y: y.astype(object), r"y is object, .* no type for: convert it"),
        (lambda y: np.ma.array(y, mask=y > 1), r"y has \d+ masked values: fill them"),
    ],
    ids=["longdouble", "object", "masked"],
)
def test_what_jax_has_no_type_for_is_refused_by_name(kind, words, untyped):
    with pytest.raises(ValueError, match=words):
        CODE.decode(kind(Y), MASK)


@pytest.mark.parametrize(
    "kind", [np.asfortranarray, memoryview, lambda y: np.ma.array(y), lambda y: y.astype(">f8")]
)
def test_other_arrays_are_what_they_hold(kind, untyped):
    np.testing.assert_array_equal(CODE.decode(kind(Y), MASK), CODE.decode(Y, MASK))


# -- Numbers as they come: NumPy's are integers like Python's --------------------------------------


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
        lambda k, n: Descent(steps=k, check_every=n),
        lambda k, n: Sampling(groups_per_step=k),
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
    assert (alpha.shape, beta.shape) == ((3,), (5,))
    sets = straggler_sets(ExactStragglers(np.int64(2)), key, np.int64(5), np.int64(64))
    assert sets.shape == (10, 5)
    assert type(IndependentStragglers(np.float64(0.25)).probability) is float
    law = TraceLatency([0.1, 0.2])  # a list
    mask = jax.jit(lambda key: WaitFor(law, 3).available(key, 4))(key)
    assert int(mask.sum()) == 3


def test_a_pool_takes_numpys_integers(untyped):
    with DevicePool(np.tanh, np.int64(2), max_attempts=np.int64(2), compiled=False) as pool:
        batch = pool.dispatch(np.zeros((3, 1, 2), np.float32), needed=np.int64(3))
        assert batch.wait(np.int64(3)).available.all()
