"""A cheap model beside the coded one: the formula, its limits, and the search for its numbers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import ExactStragglers, NeRCC, fit_surrogate
from nercc_jax.surrogates import Surrogate
from nercc_jax.surrogates.interface import AbstractGroupPrior
from nercc_jax.surrogates.surrogate import decode_with_deviation

K, N, GROUPS, OUTPUTS = 4, 7, 6, 3
_WEIGHTS = np.random.default_rng(0).normal(size=(2, 5, OUTPUTS))
EPS = {"float32": 2e-5, "float64": 1e-10}


def fixed_outputs(own, coded):
    """Return the prior of a surrogate that has these outputs."""
    return Surrogate(lambda x: x).group_prior(own, coded)


@eqx.filter_jit
def decode(code, surrogate, y, masks, cheap, cheap_coded):
    return decode_with_deviation(code, surrogate, y, masks, fixed_outputs(cheap, cheap_coded))


def model(x):
    return jnp.sin(2 * x @ jnp.asarray(_WEIGHTS[0], x.dtype))


def rough(x):
    """Right in the main, on the model's scale."""
    return 0.8 * model(x) + 0.1 * jnp.cos(x @ jnp.asarray(_WEIGHTS[1], x.dtype))


def useless(x):
    return jnp.cos(40 * x @ jnp.asarray(_WEIGHTS[1], x.dtype))


CODES = {
    "chebyshev": lambda: NeRCC(K, N),
    "interleaved": lambda: NeRCC(K, N, lambda_dec=0.0, points="interleaved"),
    "exact": lambda: NeRCC(K, N, lambda_dec=1e-2, points="repeated", exact=True),
}


def inputs(code, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(GROUPS, K, 5)), float)
    coded = jnp.einsum("nk,gkd->gnd", code.encoder_matrix(), x)
    mask = np.random.default_rng(seed + 1).permuted(np.tile(np.arange(N) > 2, (GROUPS, 1)), axis=1)
    return x, model(coded), jnp.asarray(mask), rough(x), rough(coded)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize(("theta", "kappa"), [(0.0, 0.0), (1.0, 0.0), (0.7, 30.0), (1.0, np.inf)])
def test_it_is_the_formula(name, theta, kappa, dtype):
    code = CODES[name]()
    x, y, masks, cheap, cheap_coded = inputs(code)
    surrogate = Surrogate(rough, theta=theta, kappa=kappa)
    decoded = decode(code, surrogate, y, masks, cheap, cheap_coded)
    deviation = decoded.deviation
    assert decoded.predictions.dtype == deviation.dtype == dtype
    assert decoded.recovered.all()
    for group in range(GROUPS):
        matrix = np.asarray(code.decoder_matrix(masks[group]), np.float64)
        variance = np.asarray(code.posterior_variance(masks[group]), np.float64)
        residual = np.asarray(y[group] - theta * cheap_coded[group], np.float64)
        rho = np.where(variance > 0, 1 / (1 + kappa * np.maximum(variance, 1e-30)), 1)
        expected = theta * np.asarray(cheap[group]) + rho[:, None] * (matrix @ residual)
        np.testing.assert_allclose(decoded.predictions[group], expected, atol=EPS[dtype])
        roughness = float(code.process_variance(jnp.asarray(residual, dtype), masks[group]))
        share = variance if np.isinf(kappa) else variance / (1 + kappa * variance)
        wanted = np.sqrt(roughness * share)
        np.testing.assert_allclose(deviation[group], wanted, atol=EPS[dtype], rtol=1e-3)
    if name != "chebyshev":  # an answered data point stays exact
        own = np.isclose(code.alpha[:, None], code.beta[None, :], atol=1e-6)
        answered = (own[None] & np.asarray(masks)[:, None, :]).any(axis=-1)
        assert 0 < answered.sum() < answered.size
        error = np.abs(decoded.predictions - model(x)).max(axis=-1)
        assert error[answered].max() < 10 * EPS[dtype]
        np.testing.assert_array_equal(np.asarray(deviation) == 0, answered)


class WithDeviation(AbstractGroupPrior):
    """A surrogate's outputs, and a deviation of 0.3."""

    outputs: AbstractGroupPrior
    form: Any = eqx.field(static=True)

    def condition(self, y, available):
        found = self.outputs.condition(y, available)
        return eqx.tree_at(
            lambda one: one.deviation,
            found,
            jnp.full(found.own.shape[:2], 0.3),
            is_leaf=lambda node: node is None,
        )


def test_the_variance_is_the_mean_of_the_codes_and_the_surrogates_own():
    code = CODES["chebyshev"]()
    _, y, masks, cheap, cheap_coded = inputs(code)
    outputs = fixed_outputs(cheap, cheap_coded)
    prior = WithDeviation(outputs, outputs.form)
    compiled = eqx.filter_jit(decode_with_deviation)
    alone = compiled(code, Surrogate(rough, kappa=0.0), y, masks, outputs).deviation
    found = compiled(code, Surrogate(rough, kappa=30.0), y, masks, prior).deviation
    rho = 1 / (1 + 30 * np.stack([code.posterior_variance(mask) for mask in masks]))
    assert rho.min() < 0.5 < rho.max()
    np.testing.assert_allclose(found**2, rho * alone**2 + (1 - rho) * 0.09, rtol=1e-3)


def test_broken_answers_are_stragglers_and_without_answers_it_is_the_surrogate(dtype):
    code = CODES["chebyshev"]()
    _, y, masks, cheap, cheap_coded = inputs(code)
    surrogate = Surrogate(rough, theta=1.0, kappa=5.0)
    worker = int(np.argmax(masks[0]))
    broken = decode(code, surrogate, y.at[0, worker].set(jnp.nan), masks, cheap, cheap_coded)
    missing = decode(code, surrogate, y, masks.at[0, worker].set(False), cheap, cheap_coded)
    np.testing.assert_allclose(broken.predictions, missing.predictions, atol=1e-6)
    np.testing.assert_array_equal(broken.responded, missing.responded)
    assert not broken.responded[0, worker]
    nobody = decode(
        code, surrogate, jnp.full_like(y, jnp.nan), jnp.zeros_like(masks), cheap, cheap_coded
    )
    np.testing.assert_array_equal(nobody.predictions, cheap)
    assert nobody.recovered.all()
    spoilt = decode(code, surrogate, y, masks, cheap.at[2, 1].set(jnp.nan), cheap_coded)
    expected = np.ones((GROUPS, K), bool)
    expected[2, 1] = False
    np.testing.assert_array_equal(spoilt.recovered, expected)


@pytest.mark.parametrize("kappa", [0.0, 1e-8, 4.0])
def test_gradients_are_finite_and_right(kappa):
    with jax.enable_x64(True):
        code = CODES["interleaved"]()
        x, y, masks, cheap, cheap_coded = inputs(code)

        def error(numbers):
            surrogate = Surrogate(rough, theta=numbers[0], kappa=numbers[1])
            decoded = decode(code, surrogate, y, masks, cheap, cheap_coded)
            return jnp.mean((decoded.predictions - model(x)) ** 2)

        here, step = jnp.array([0.5, kappa]), 1e-6
        gradient = jax.grad(error)(here)
        for i, shift in enumerate(np.eye(2) * step):
            ahead = (error(here + shift) - error(here)) / step
            np.testing.assert_allclose(gradient[i], ahead, rtol=1e-3, atol=1e-7)


LAWS = {"two": ExactStragglers(2), "three": ExactStragglers(3)}


def points(seed, groups=40):
    return np.random.default_rng(seed).normal(size=(groups * K, 5)).astype("float32")


def disagreement_and_mse(code, surrogate, x, key):
    """By every set of the laws, with NumPy's argmax."""
    groups = jnp.asarray(x.reshape(-1, K, 5))
    coded = jnp.einsum("nk,gkd->gnd", code.encoder_matrix(), groups)
    wrong, square = [], []
    for law in LAWS.values():
        masks_of_law = law.every_set(N, 100)
        assert masks_of_law is not None
        for mask in masks_of_law:
            masks = jnp.broadcast_to(jnp.asarray(mask), (len(groups), N))
            cheap, cheap_coded = surrogate.model(groups), surrogate.model(coded)
            decoded = decode(code, surrogate, model(coded), masks, cheap, cheap_coded)
            difference = decoded.predictions - model(groups)
            labels = np.argmax(model(groups), axis=-1)
            wrong.append(np.mean(np.argmax(decoded.predictions, axis=-1) != labels))
            square.append(float(jnp.mean(difference**2)))
    return np.mean(wrong), np.mean(square)


@pytest.mark.parametrize(("cheap", "criterion"), [(rough, "disagreement"), (useless, "mse")])
def test_what_is_found_is_no_worse_than_either(criterion, cheap, key):
    code, x = CODES["exact"](), points(0)
    found = fit_surrogate(model, cheap, code, x, LAWS, key=key, num_sets=100, criterion=criterion)
    which = 0 if criterion == "disagreement" else 1
    best = disagreement_and_mse(code, found, x, key)[which]
    for theta, kappa in [(0.0, 0.0), (1.0, 0.0), (1.0, np.inf)]:
        other = Surrogate(cheap, theta=theta, kappa=kappa)
        assert best <= disagreement_and_mse(code, other, x, key)[which] + 1e-6
    if cheap is useless:
        assert found.theta < 0.2
    else:
        alone = disagreement_and_mse(code, Surrogate(cheap, theta=0.0), x, key)[which]
        assert best < 0.7 * alone, "it helps"


def test_a_surrogate_that_is_the_model_leaves_no_error(key):
    found = fit_surrogate(model, model, CODES["chebyshev"](), points(1), LAWS, key=key)
    disagreement, _ = disagreement_and_mse(CODES["chebyshev"](), found, points(2), key)
    assert disagreement == 0
