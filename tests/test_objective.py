"""The nested objective against a plain loop in NumPy, exact expectations and finite differences."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from matrices import decoder_matrix, encoder_matrix, errors_of_sets

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


def parity_model(x):
    return 1.1 * model(x) + 0.2


def numpy_parity_model(x):
    return 1.1 * numpy_model(x) + 0.2


def numpy_mse(decoded, original):
    return ((decoded - original) ** 2).mean()


def numpy_divergence(decoded, original):
    p, q = scipy.special.softmax(original), scipy.special.softmax(decoded)
    return scipy.special.rel_entr(p, q).sum()


def worst(decoded, original):
    return jnp.max(jnp.abs(decoded - original))


def numpy_worst(decoded, original):
    return np.abs(decoded - original).max()


LOSSES = {
    "mse": ("mse", numpy_mse),
    "cross_entropy": ("cross_entropy", numpy_divergence),
    "own": (worst, numpy_worst),
}
CODES = {
    "nercc": lambda: nj.NeRCC(
        K, N, lambda_enc=1e-4, lambda_dec=1e-6, gap_exponent=2.0, end_penalty=5.0
    ),
    "berrut": lambda: nj.Berrut(K, N),
    "lagrange": lambda: nj.Lagrange(K, N, degree=2),
    "replication": lambda: nj.Replication(K, N),
    "parity": lambda: nj.Parity(6, 7),
}


def groups_of(code, groups=GROUPS, dtype=float):
    x = np.random.default_rng(3).normal(size=(groups, code.num_data, 2))
    return x.astype(dtype)


def models_of(code):
    """The served model, for Parity with its parity model; for the library and for NumPy."""
    if code.worker_models.max() == 0:
        return model, [numpy_model]
    return (model, parity_model), [numpy_model, numpy_parity_model]


def plain_errors(code, models, x, masks, loss):
    """The errors by both matrices in float64, a set, a group and a data point at a time."""
    encoder, errors = encoder_matrix(code), []
    for mask in masks:
        decoder = decoder_matrix(code, mask)
        losses = []
        for group in x.astype(float):
            coded = encoder @ group
            y = np.stack(
                [
                    models[kind](point[None])[0]
                    for kind, point in zip(code.worker_models, coded, strict=True)
                ]
            )
            rows = zip(decoder, decoder @ y, models[0](group), strict=True)
            losses += [loss(got, wanted) for row, got, wanted in rows if row.any()]
        errors.append(np.mean(losses) if losses else np.nan)
    return np.array(errors)


# Compiled once for each code, precision and loss. A spline's program takes long to compile, so that
# what does not depend on the code is tested with a cheap one.
compiled_errors = eqx.filter_jit(errors_of_sets)
compiled_objective = eqx.filter_jit(nj.nested_objective)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("nercc", "mse"),
        ("berrut", "cross_entropy"),
        ("berrut", "own"),
        ("lagrange", "mse"),
        ("replication", "own"),
        ("parity", "mse"),
        ("parity", "cross_entropy"),
    ],
)
def test_errors_are_those_of_a_plain_loop(name, loss, dtype):
    code = CODES[name]()
    x, (ours, plain) = groups_of(code, dtype=dtype), models_of(code)
    ours_loss, plain_loss = LOSSES[loss]
    masks = np.vstack([MASKS, np.arange(7) == 6])
    expected = plain_errors(code, plain, x, masks, plain_loss)
    assert np.isnan(expected[4]), "nobody answered"
    assert np.isnan(expected[5]) == (name in ("lagrange", "parity")), "a parity alone tells nothing"
    assert np.nanmin(expected[:3]) >= 0
    got = compiled_errors(ours, code, x, masks, criterion=ours_loss)
    assert got.dtype == dtype
    expected = np.nan_to_num(expected)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_the_objective_is_the_weighted_sum(dtype):
    code = CODES["berrut"]()
    x = groups_of(code, dtype=dtype)
    errors = np.asarray(compiled_errors(model, code, x, MASKS), float)
    mean = compiled_objective(model, code, x, MASKS)
    np.testing.assert_allclose(mean, errors[:4].mean(), rtol=TOLERANCE[dtype])
    weights = np.array([0.5, 2.0, 0.0, 1.0, 7.0], dtype)
    weighted = compiled_objective(model, code, x, MASKS, weights=weights)
    np.testing.assert_allclose(weighted, weights[:4] @ errors[:4], rtol=TOLERANCE[dtype])
    nobody = compiled_objective(model, code, x, np.zeros((5, N), bool))
    assert float(nobody) == 0


def test_known_originals_are_taken(dtype):
    code = CODES["berrut"]()
    x = groups_of(code, dtype=dtype)
    originals = numpy_model(x.astype(float)).astype(dtype)
    asked = []

    def counting(batch):
        asked.append(batch.shape[0])
        return model(batch)

    plain = errors_of_sets(counting, code, x, MASKS)
    assert sorted(asked) == [GROUPS * K, GROUPS * N]
    asked.clear()
    known = errors_of_sets(counting, code, x, MASKS, originals=originals)
    assert asked == [GROUPS * N]
    np.testing.assert_allclose(known, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    shifted = nj.nested_objective(model, code, x, MASKS[:1], originals=originals + 10)
    assert abs(float(shifted) - 100) < 10, "they are what is compared with"


def test_the_mean_over_all_sets_is_the_expectation(key):
    with jax.enable_x64(True):
        code = CODES["nercc"]()
        x = groups_of(code)
        every = nj.stragglers.straggler_sets(nj.ExactStragglers(2), key, N, 100)
        got = compiled_objective(model, code, x, every)
        expected, count = 0.0, 0
        for gone in itertools.combinations(range(N), 2):
            mask = ~np.isin(np.arange(N), gone)
            expected += plain_errors(code, [numpy_model], x, mask[None], numpy_mse)[0]
            count += 1
        np.testing.assert_allclose(got, expected / count, rtol=1e-10)
        keys = jax.random.split(key, 3)
        drawn = jnp.concatenate(
            [nj.stragglers.straggler_sets(nj.IndependentStragglers(0.2), k, N, 7) for k in keys]
        )
        np.testing.assert_allclose(
            compiled_objective(model, code, x, drawn),
            np.nanmean(plain_errors(code, [numpy_model], x, np.asarray(drawn), numpy_mse)),
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
        ({"originals": np.zeros((2, K, 2))}, r"would be \(2, 3, 3\)"),
        ({"originals": np.zeros((1, K, 3))}, r"originals have shape \(1, 3, 3\)"),
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
