"""Recorded answers under straggler sets, and the objective: by NumPy."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from matrices import decoded_by_hand, errors_of_sets

from nercc_jax import (
    Berrut,
    ExactStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    nested_objective,
)
from nercc_jax.evaluation import record_answers
from nercc_jax.stragglers import straggler_sets

K, N, GROUPS = 4, 6, 5
CODES = {
    "nercc": lambda: NeRCC(
        K, N, lambda_enc=1e-4, lambda_dec=1e-6, gap_exponent=2.0, end_penalty=5.0
    ),
    "berrut": lambda: Berrut(K, N),
    "lagrange": lambda: Lagrange(K, N),
    "copies": lambda: Replication(K, N),
    "parity": lambda: Parity(K, N),
}
FIRST = np.array([[0.4, -1.1, 0.7, 0.3], [-0.8, 0.5, 0.9, -0.6], [0.5, 0.2, -0.3, 0.8]])
SECOND = np.array([[1.2, 0.3, -0.7], [0.2, -1.4, 0.5], [-0.3, 0.8, 1.1], [0.6, 0.4, -0.9]])
MASKS = np.array(
    [
        [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    bool,
)  # fmt: skip


def model(x, xp=jnp):
    return xp.tanh(x @ FIRST.astype(x.dtype)) @ SECOND.astype(x.dtype)


def broken_at_mixtures(x, xp=jnp):
    """NaN on some coded data points; data points themselves are of length 1."""
    return xp.where(xp.sum(x**2, axis=1, keepdims=True) < 0.5, xp.nan, model(x, xp))


def parity_model(x, xp=jnp):
    return 1.1 * model(x, xp) + 0.2


def models(code, served=model):
    return (served, parity_model) if code.worker_models.max() else served


def data(dtype="float32", points=22):
    """Five groups, and two data points that fill none."""
    x = np.random.default_rng(0).normal(size=(points, 3))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def by_hand(code, x, served=model):
    """Predictions under each of the sets, and the model's own."""
    groups = x[: GROUPS * K].reshape(GROUPS, K, 3).astype(float)
    both = [lambda x, one=one: one(x, np) for one in (served, parity_model)]
    return decoded_by_hand(code, both, groups, MASKS), served(groups.reshape(-1, 3), np).reshape(
        GROUPS, K, 3
    )


def divergence(decoded, own):
    p, q = scipy.special.softmax(own, -1), scipy.special.softmax(decoded, -1)
    return scipy.special.rel_entr(p, q).sum(-1)


CRITERIA = {
    "mse": lambda decoded, own: ((decoded - own) ** 2).mean(-1),
    "cross_entropy": divergence,
    "disagreement": lambda decoded, own: 1.0 * (decoded.argmax(-1) != own.argmax(-1)),
    lambda decoded, own: jnp.max(jnp.abs(decoded - own)): (
        lambda decoded, own: np.abs(decoded - own).max(-1)
    ),
}


@pytest.mark.parametrize(
    ("name", "served"), [*((name, model) for name in CODES), ("nercc", broken_at_mixtures)]
)
def test_they_tell_what_a_plain_loop_does(name, served, dtype):
    code, x = CODES[name](), data(dtype)
    known = record_answers(models(code, served), code, x, batch_size=7)
    assert known.coded.shape == (GROUPS, N, 3), "a remainder is left out"
    assert known.coded.dtype == known.own.dtype == dtype
    wanted, own = by_hand(code, x, served)
    tolerance = {"float32": 2e-5, "float64": 1e-11}[dtype]
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(known.own, own, **close)
    if served is broken_at_mixtures:
        broken = ~np.isfinite(known.coded).all(axis=2)
        assert broken.any()
        assert not broken.all(axis=1).any()
    lost = np.isnan(wanted).all(axis=-1)
    sets = known.decode_sets(jnp.asarray(MASKS))
    np.testing.assert_array_equal(sets.recovered, ~lost)
    np.testing.assert_allclose(sets.predictions, wanted, **close)
    groups = x[: GROUPS * K].reshape(GROUPS, K, 3)
    for criterion, loss in CRITERIA.items():
        losses = np.where(lost, np.nan, loss(np.nan_to_num(wanted), own))
        count = (~lost).sum(axis=(1, 2))
        expected = np.nansum(losses, axis=(1, 2)) / np.where(count, count, np.nan)
        found = known.losses(jnp.asarray(MASKS), criterion)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, **close)
        if criterion != "disagreement" and served is model:
            found = errors_of_sets(models(code), code, groups, MASKS, criterion=criterion)
            np.testing.assert_allclose(found, np.nan_to_num(expected), **close)


# -- The objective: the mean over sets, and its gradients ------------------------------------------

objective = eqx.filter_jit(nested_objective)


def grouped(dtype="float32"):
    return data(dtype)[: GROUPS * K].reshape(GROUPS, K, 3)


def test_the_objective_is_the_mean_over_the_sets_that_recover_anything(dtype, key):
    """So over all sets it is the expectation."""
    code, x = CODES["nercc"](), grouped(dtype)
    predictions, own = by_hand(code, data(dtype))
    plain = [np.nanmean((each - own) ** 2) for each in predictions[:-1]]
    tolerance = {"float32": 2e-5, "float64": 1e-10}[dtype]
    np.testing.assert_allclose(objective(model, code, x, MASKS), np.mean(plain), rtol=tolerance)
    assert float(objective(model, code, x, np.zeros_like(MASKS))) == 0
    every = straggler_sets(ExactStragglers(2), key, N, 100)
    gone = itertools.combinations(range(N), 2)
    masks = np.stack([~np.isin(np.arange(N), each) for each in gone])
    assert {row.tobytes() for row in np.asarray(every)} == {row.tobytes() for row in masks}
    both = [lambda x: model(x, np), lambda x: parity_model(x, np)]
    expected = np.mean((decoded_by_hand(code, both, x.astype(float), masks) - own) ** 2)
    np.testing.assert_allclose(objective(model, code, x, every), expected, rtol=tolerance)
