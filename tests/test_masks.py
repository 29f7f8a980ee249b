"""Decoding under straggler sets: the objective, scores and plain decoding are one mechanism."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import errors_of_sets

from nercc_jax import Berrut, NeRCC, Replication, nested_objective
from nercc_jax.codes import decode_groups
from nercc_jax.codes._groups import decode_sets
from nercc_jax.evaluation import Answers, record_answers

K, N, GROUPS = 3, 7, 4
CODES = {
    "nercc": lambda: NeRCC(K, N),
    "berrut": lambda: Berrut(K, N),
    "replication": lambda: Replication(K, N),
}
random = np.random.default_rng(3)
SETS = random.permuted(np.tile(np.arange(N) > 2, (5, 1)), axis=1)
Y = random.normal(size=(GROUPS, N, 2)).astype("float32")
decode = eqx.filter_jit(decode_sets)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_sets_of_groups_are_groups_one_by_one(name, bad):
    """An answer that is not finite makes a straggler in its own group, under every set."""
    code, y = CODES[name](), Y.copy()
    if bad is not None:
        y[1, 4, 0] = bad
    got = decode(code, jnp.asarray(y), jnp.asarray(SETS))
    for number, mask in enumerate(SETS):
        masks = jnp.broadcast_to(mask, (GROUPS, N))
        alone = eqx.filter_jit(decode_groups)(code, jnp.asarray(y), masks)
        np.testing.assert_array_equal(got.responded[number], alone.responded)
        np.testing.assert_array_equal(got.recovered[number], alone.recovered)
        np.testing.assert_allclose(got.predictions[number], alone.predictions, atol=2e-6)
        matrix = np.asarray(code.decoder_matrix(mask), np.float64)
        if bad is None:
            kept = np.asarray(alone.recovered[0])
            expected = matrix @ np.where(mask[:, None], Y[2].astype(float), 0)
            np.testing.assert_allclose(got.predictions[number, 2][kept], expected[kept], atol=1e-5)


@pytest.mark.parametrize("name", CODES)
def test_vmap_is_each_group_alone(name):
    """In groups that a mask, answers, or both differ by; a broken answer is missed by its own."""
    code, masks = CODES[name](), SETS[:GROUPS]
    y = np.where(masks[..., None], Y, np.nan)
    y[1, np.flatnonzero(masks[1])[-1], 0] = np.inf

    def alone(y, mask):
        mask = mask & np.isfinite(y).all(axis=1)
        matrix = np.asarray(code.decoder_matrix(mask), np.float64)
        kept = np.asarray(code.recovered(mask))[:, None]
        return np.where(kept, matrix @ np.where(mask[:, None], y.astype(float), 0), np.nan)

    def predictions(y, mask):
        return code.try_decode(y, mask).predictions

    nested = jax.jit(jax.vmap(jax.vmap(predictions)))
    pairs = [alone(*pair) for pair in zip(y, masks, strict=True)]
    halves = (np.stack(np.split(each, 2)) for each in (y, masks))
    found = np.concatenate(nested(*halves))
    np.testing.assert_allclose(found, pairs, atol=1e-5)
    found = jax.jit(jax.vmap(predictions, (None, 0)))(Y[0], masks)
    np.testing.assert_allclose(found, [alone(Y[0], mask) for mask in masks], atol=1e-5)
    found = jax.jit(jax.vmap(lambda y: predictions(y, masks[0]), out_axes=1))(y)
    expected = [alone(each, masks[0]) for each in y]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=1e-5)


def test_vmap_makes_more_groups_of_one_program():
    """Not conditions and loops over groups, of which each does what any of them needs."""
    y, masks = jnp.asarray(Y), jnp.asarray(SETS[:GROUPS])
    groups, each = (
        jax.jit(way).lower(NeRCC(K, N), y, masks).compile().memory_analysis().temp_size_in_bytes
        for way in (decode_groups, lambda code, *args: jax.vmap(code.try_decode)(*args))
    )
    assert each <= groups


def test_codes_of_which_each_has_a_group():
    codes = [NeRCC(K, N, lambda_dec=each) for each in (1e-3, 1e-1)]
    leaves = [eqx.filter(code, eqx.is_array) for code in codes]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *leaves)
    rest = eqx.filter(codes[0], eqx.is_array, inverse=True)
    mask = jnp.asarray(SETS[0])
    found = jax.jit(jax.vmap(lambda own: eqx.combine(own, rest).decode(Y[0], mask)))(stacked)
    expected = [code.decode(Y[0], mask) for code in codes]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def broken_above(limit):
    """A model that cannot stand large coded data points."""

    def model(batch):
        y = jnp.stack([jnp.sin(batch.sum(axis=1)), batch[:, 0] ** 2], axis=1)
        return jnp.where(jnp.max(jnp.abs(batch), axis=1, keepdims=True) > limit, jnp.nan, y)

    return model


@pytest.mark.parametrize("name", ["nercc", "replication"])
def test_the_objective_leaves_out_what_decoding_leaves_out(name):
    code = CODES[name]()
    x = random.normal(size=(GROUPS, K, 3)).astype("float32")
    coded = np.asarray(jax.vmap(code.encode)(jnp.asarray(x)))
    sizes = np.sort(np.abs(coded).max(axis=2).ravel())
    model = broken_above(float(sizes[-3]))  # two answers are broken, maybe of data points' own
    originals = broken_above(np.inf)(x.reshape(-1, 3)).reshape(GROUPS, K, 2)
    options = {"originals": originals}
    errors = errors_of_sets(model, code, x, SETS, **options)
    for mask, error in zip(SETS, errors, strict=True):
        squares = []
        for group, own in zip(coded, originals, strict=True):
            decoded = code.try_decode(model(jnp.asarray(group)), mask)
            kept = np.asarray(decoded.recovered)
            squares += [*np.mean((np.asarray(decoded.predictions)[kept] - own[kept]) ** 2, axis=1)]
        np.testing.assert_allclose(error, np.mean(squares), rtol=1e-4)
    # And so do its gradients.
    slope = eqx.filter_jit(eqx.filter_grad(lambda x: nested_objective(
        model, code, x, SETS, **options)))(jnp.asarray(x))  # fmt: skip
    assert np.isfinite(slope).all()


def test_the_objective_takes_the_accurate_way():
    """Close workers carry the spline over a wide gap: the product would lose digits."""
    beta = np.concatenate([np.linspace(-1, -0.9, 30), np.linspace(0.9, 1, 30)]).astype("float32")
    points = (np.array([-0.5, 0.1, 0.6], "float32"), beta)
    code = NeRCC(3, 60, lambda_dec=0.0, points=points)
    everyone = np.ones(60, bool)
    assert np.abs(code.decoder_matrix(everyone)).sum(axis=1).max() > 100
    y = np.sin(5 * beta.astype(float)).astype("float32")
    with jax.enable_x64(True):
        wide = NeRCC(3, 60, lambda_dec=0.0, points=tuple(p.astype(float) for p in points))
        exact = np.asarray(wide.decode(y.astype(float), everyone))
    known = Answers(code, jnp.asarray(y)[None, :, None], jnp.zeros((1, 3, 1)))
    mse = known.losses(jnp.asarray(everyone)[None], "mse")
    np.testing.assert_allclose(mse, np.mean(exact**2), rtol=3e-6)


def test_what_a_record_says_of_sets_is_said_of_each(key):
    code = CODES["nercc"]()
    x = random.normal(size=(2 * K + 1, 3)).astype("float32")
    model = broken_above(np.inf)
    known = record_answers(model, code, x)
    assert known.coded.shape == (2, N, 2), "a remainder is left out"
    np.testing.assert_allclose(known.own, model(x[: 2 * K]).reshape(2, K, 2), atol=1e-6)
    sets = jnp.asarray(SETS[:2])
    for criterion in ("mse", "disagreement"):
        each = [known.losses(mask[None], criterion)[0] for mask in sets]
        np.testing.assert_allclose(known.losses(sets, criterion), each, rtol=1e-5)
    same = [known.same_labels(known.decode(mask).predictions).mean() for mask in sets]
    np.testing.assert_allclose(known.losses(sets, "disagreement"), 1 - np.array(same), atol=1e-6)
