"""Decoding of many groups under straggler sets."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import decoder_matrix

from nercc_jax import Berrut, NeRCC, Replication
from nercc_jax.codes import decode_groups

K, N, GROUPS = 3, 7, 4
CODES = {
    "nercc": lambda: NeRCC(K, N),
    "berrut": lambda: Berrut(K, N),
    "replication": lambda: Replication(K, N),
}
random = np.random.default_rng(3)
SETS = random.permuted(np.tile(np.arange(N) > 2, (5, 1)), axis=1)
Y = random.normal(size=(GROUPS, N, 2)).astype("float32")


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("bad", [None, np.nan])
def test_one_mask_is_for_all_groups(bad, traced):
    code, y, mask = CODES["nercc"](), Y.copy(), SETS[:1]
    if bad is not None:
        y[1, np.flatnonzero(mask[0])[0], 0] = bad
    run = eqx.filter_jit(decode_groups) if traced else decode_groups
    one, each = run(code, y, mask), run(code, y, np.repeat(mask, GROUPS, axis=0))
    np.testing.assert_array_equal(one.responded, each.responded)
    np.testing.assert_array_equal(one.recovered, each.recovered)
    np.testing.assert_allclose(one.predictions, each.predictions, atol=2e-6)


def test_groups_with_many_masks():
    code, rng = NeRCC(4, 12), np.random.default_rng(0)
    y, masks = rng.normal(size=(40, 12, 3)).astype(np.float32), rng.random((40, 12)) < 0.7
    masks[:, 0] = True
    y[3, 1] = np.nan
    found = decode_groups(code, y, masks)
    responded = masks & np.isfinite(y).all(axis=2)
    np.testing.assert_array_equal(found.responded, responded)
    for group in range(0, 40, 3):
        exact = decoder_matrix(code, responded[group])[:, responded[group]]
        exact = exact @ y[group, responded[group]]
        np.testing.assert_allclose(found.predictions[group], exact, atol=1e-5)


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
