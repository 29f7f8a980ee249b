"""The nested objective: exact expectations and finite differences.

`test_answers.py` has it for every code and criterion against a plain loop.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import decoded_by_hand, errors_of_sets

import nercc_jax as nj

K, N, GROUPS = 3, 7, 2
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 1, 1],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
FIRST = np.array([[0.4, -1.1, 0.7, 0.3], [-0.8, 0.5, 0.9, -0.6]])
SECOND = np.array([[1.2, 0.3, -0.7], [0.2, -1.4, 0.5], [-0.3, 0.8, 1.1], [0.6, 0.4, -0.9]])


def numpy_model(x):
    return np.tanh(x @ FIRST) @ SECOND


def model(x):
    return jnp.tanh(x @ FIRST.astype(x.dtype)) @ SECOND.astype(x.dtype)


CODES = {
    "nercc": lambda: nj.NeRCC(
        K, N, lambda_enc=1e-4, lambda_dec=1e-6, gap_exponent=2.0, end_penalty=5.0
    ),
    "berrut": lambda: nj.Berrut(K, N),
}


def groups_of(code, groups=GROUPS, dtype=float):
    x = np.random.default_rng(3).normal(size=(groups, code.num_data, 2))
    return x.astype(dtype)


def plain_errors(code, x, masks):
    """The mean squared errors by both matrices in float64."""
    own = numpy_model(x.reshape(-1, 2).astype(float)).reshape(*x.shape[:2], -1)
    decoded = decoded_by_hand(code, numpy_model, x, masks)
    return np.array([np.nanmean((each - own) ** 2) if m.any() else np.nan
                     for each, m in zip(decoded, np.asarray(masks), strict=True)])  # fmt: skip


# Compiled once for each code, precision and loss. A spline's program takes long to compile, so that
# what does not depend on the code is tested with a cheap one.
compiled_errors = eqx.filter_jit(errors_of_sets)
compiled_objective = eqx.filter_jit(nj.nested_objective)


def test_the_objective_is_the_mean_of_sets_that_recover_anything(dtype):
    code = CODES["berrut"]()
    x = groups_of(code, dtype=dtype)
    errors = np.asarray(compiled_errors(model, code, x, MASKS), float)
    mean = compiled_objective(model, code, x, MASKS)
    np.testing.assert_allclose(mean, errors[:4].mean(), rtol=TOLERANCE[dtype])
    nobody = compiled_objective(model, code, x, np.zeros((5, N), bool))
    assert float(nobody) == 0


def test_the_mean_over_all_sets_is_the_expectation(key):
    with jax.enable_x64(True):
        code = CODES["nercc"]()
        x = groups_of(code)
        every = nj.stragglers.straggler_sets(nj.ExactStragglers(2), key, N, 100)
        got = compiled_objective(model, code, x, every)
        gone = itertools.combinations(range(N), 2)
        masks = np.stack([~np.isin(np.arange(N), each) for each in gone])
        np.testing.assert_allclose(got, plain_errors(code, x, masks).mean(), rtol=1e-10)
        keys = jax.random.split(key, 3)
        drawn = jnp.concatenate(
            [nj.stragglers.straggler_sets(nj.IndependentStragglers(0.2), k, N, 7) for k in keys]
        )
        np.testing.assert_allclose(
            compiled_objective(model, code, x, drawn),
            np.nanmean(plain_errors(code, x, drawn)),
            rtol=1e-10,
        )


def test_one_compilation_serves_every_mask_and_every_number(key):
    traces = []

    def counting(batch):
        traces.append(1)
        return model(batch)

    compiled = eqx.filter_jit(nj.nested_objective)
    x = groups_of(CODES["nercc"](), dtype="float32")
    values = []
    for i in range(4):
        masks = jax.random.bernoulli(jax.random.fold_in(key, i), 0.7, (5, N))
        layout = ("chebyshev", "approxifer", "uniform", "interleaved")[i]
        code = nj.NeRCC(K, N, lambda_enc=1e-3 * i, lambda_dec=1e-3 * i, points=layout)
        values.append(float(compiled(counting, code, x, masks)))
    assert len(traces) == 2, "the model on data points and on coded data points, once each"
    assert len(set(values)) == 4


# -- Gradients ------------------------------------------------------------------------------------

NUMBERS = ("lambda_enc", "lambda_dec", "gap_exponent", "end_penalty", "alpha", "beta")


def numbers_of(code):
    return {name: getattr(code, name) for name in NUMBERS}


def objective(numbers, x, masks):
    code = nj.NeRCC(K, N)
    code = eqx.tree_at(lambda c: [getattr(c, n) for n in numbers], code, list(numbers.values()))
    return nj.nested_objective(model, code, x, masks)


# Compiled once a precision.
value_and_gradient = jax.jit(jax.value_and_grad(objective))
forward_of = jax.jit(jax.jacfwd(objective))


def inner_code():
    """Points inside (-1, 1), where the angle has a derivative; some masks leave out the ends."""
    beta = [0.97, 0.8, 0.35, 0.05, -0.4, -0.75, -0.93]
    return nj.NeRCC(
        K,
        N,
        lambda_enc=2e-3,
        lambda_dec=1e-4,
        gap_exponent=1.5,
        end_penalty=3.0,
        points=([0.85, 0.1, -0.7], beta),
    )


def test_gradients_match_finite_differences():
    with jax.enable_x64(True):
        numbers, masks = numbers_of(inner_code()), jnp.asarray(MASKS)
        x = jnp.asarray(groups_of(inner_code()))
        _, reverse = value_and_gradient(numbers, x, masks)
        forward = forward_of(numbers, x, masks)
        for name, value in numbers.items():
            np.testing.assert_allclose(forward[name], reverse[name], rtol=1e-8, atol=1e-14)
            size = np.abs(reverse[name]).max()
            assert size > 0, name
            for i in np.ndindex(value.shape):
                step = 3e-5 * float(jnp.abs(value[i])) if value.ndim == 0 else 3e-6
                up, down = (
                    float(value_and_gradient({**numbers, name: value.at[i].add(s)}, x, masks)[0])
                    for s in (step, -step)
                )
                slope = (up - down) / (2 * step)
                np.testing.assert_allclose(reverse[name][i], slope, atol=2e-6 * size, err_msg=name)


# -- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": np.zeros((2, K + 1, 2))},
            rf"x has shape \(2, {K + 1}, 2\); its first 2 axes must be",
        ),
        ({"x": np.zeros((0, K, 2))}, "x must be"),
        ({"x": np.zeros(K)}, "its first 2 axes must be"),
        ({"available": MASKS[0]}, rf"available must be masks \(sets, {N}\), not bool\(7,\)"),
        ({"available": MASKS[:, :-1]}, r"not bool\(5, 6\)"),
        ({"available": MASKS.astype(float)}, r"not float\d\d"),
        (
            {"criterion": "mae"},
            "criterion must be one of mse, cross_entropy, disagreement or a function, not 'mae'",
        ),
        ({"criterion": None}, "criterion must be one of .* or a function, not None"),
    ],
)
def test_errors(change, message, untyped):
    given = {"x": np.zeros((2, K, 2)), "available": MASKS, **change}
    x, masks = given.pop("x"), given.pop("available")
    with pytest.raises(ValueError, match=message):
        # All that is checked are shapes and names.
        eqx.filter_eval_shape(nj.nested_objective, model, nj.Berrut(K, N), x, masks, **given)


def test_a_missing_model_is_reported():
    with pytest.raises(ValueError, match="the workers of this code run 2 models, but 1 came"):
        nj.nested_objective(model, nj.Parity(6, 7), groups_of(nj.Parity(6, 7)), MASKS)
