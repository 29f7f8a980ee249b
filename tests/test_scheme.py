"""Order, code, surrogate and doubt together, and the model where there is doubt."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import (
    ExactStragglers,
    NeRCC,
    Scheme,
    calibrate_error_probability,
    coded_inference,
    fit_surrogate,
    reexecute,
)
from nercc_jax.surrogates import Surrogate
from nercc_jax.surrogates.interface import AbstractGroupPrior
from nercc_jax.surrogates.surrogate import decode_with_deviation

K, N, OUTPUTS = 4, 7, 3
LAWS = {"three": ExactStragglers(3)}
_WEIGHTS = np.random.default_rng(0).normal(size=(2, 3, OUTPUTS))


def model(x):
    return jnp.sin(1.5 * x.reshape(len(x), -1) @ jnp.asarray(_WEIGHTS.reshape(6, -1), x.dtype))


def shrunk(x):
    return 0.9 * model(x)


def points(seed, groups=6):
    return np.random.default_rng(seed).normal(size=(groups * K, 2, 3)).astype("float32")


def assess(model, scheme, **options):
    return coded_inference(model, scheme, with_status=True, **options)


CODE = NeRCC(K, N, lambda_dec=0.0, points="repeated")
MASKS = np.random.default_rng(5).permuted(np.tile(np.arange(N) > 2, (6, 1)), axis=1)


def test_without_extras_it_is_coded_inference():
    x = points(0)
    assessed = assess(model, Scheme(CODE))(x, MASKS)
    expected = coded_inference(model, CODE)(x.reshape(-1, K, 2, 3), MASKS)
    np.testing.assert_array_equal(assessed.predictions, expected.reshape(-1, OUTPUTS))
    assert assessed.recovered.all()
    assert assessed.error_probability is None
    np.testing.assert_array_equal(assessed.responded, MASKS)
    one = assess(model, Scheme(CODE))(x, MASKS[0])
    np.testing.assert_array_equal(one.responded, np.tile(MASKS[0], (6, 1)))


@pytest.mark.parametrize("order", [None, "pixels", "surrogate", model])
def test_predictions_come_back_where_data_points_came(order):
    x = points(1)
    scheme = Scheme(CODE, Surrogate(shrunk, theta=0.5, kappa=1.0), order=order, buffer_size=3 * K)
    everyone = assess(model, scheme)(x, np.ones(N, bool))
    np.testing.assert_allclose(everyone.predictions, model(jnp.asarray(x)), atol=1e-5)
    arranged = np.asarray(scheme.arrange(x))
    assert sorted(arranged[: 3 * K]) == list(range(3 * K)), "buffers are not mixed"
    by_hand = Scheme(CODE, scheme.surrogate)
    expected = assess(model, by_hand)(x[arranged], MASKS)
    assessed = assess(model, scheme)(x, MASKS)
    np.testing.assert_allclose(
        np.asarray(assessed.predictions)[arranged], expected.predictions, atol=1e-5
    )
    np.testing.assert_allclose(
        np.asarray(assessed.deviation)[arranged], expected.deviation, atol=1e-4
    )
    assert (order is None) == (list(arranged) == list(range(len(x))))


@pytest.mark.parametrize("order", [None, "surrogate"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_copies_go_to_the_data_points_whose_label_the_student_doubts(order, share):
    x = points(3)

    def logits(x):
        return 2 * shrunk(x)

    def probabilities(x) -> Any:
        return {
            "label": jax.nn.softmax(logits(x)),
            "sure": jnp.array([[0.0, 30]]).repeat(len(x), 0),
        }

    options: Any = {"order": order, "redundancy": "uncertain", "straggler_share": share}
    scheme = Scheme(CODE, Surrogate(logits, theta=0.5, kappa=1.0), **options)
    order = np.asarray(scheme.arrange(x))
    raised = np.exp(np.asarray(logits(x), np.float64))[order]
    doubt = (1 - raised.max(-1) / raised.sum(-1)).reshape(-1, K)
    holds = [list(range(K)) for _ in doubt]
    for group, worth in zip(holds, doubt, strict=True):
        for _ in range(N - K):  # greedily, by the drop in the probability that all copies are lost
            group.append(int(np.argmax(worth)))
            worth[group[-1]] *= share
    options["order"] = options["order"] and logits
    for each in (scheme, Scheme(CODE, Surrogate(probabilities), **options)):
        encoders = np.asarray(each.encoders(each.prepare(jnp.asarray(x))))
        np.testing.assert_array_equal(np.argmax(encoders, axis=2), holds)
    # What all copies of are lost, the student answers, whatever its theta and kappa.
    assessed = assess(model, scheme)(x, MASKS)
    known = [
        np.isin(range(K), np.array(group)[mask]) for group, mask in zip(holds, MASKS, strict=True)
    ]
    own, cheap = (np.asarray(each(x))[order] for each in (model, logits))
    expected = np.where(np.ravel(known)[:, None], own, cheap)
    assert 0 < np.mean(known) < 1
    np.testing.assert_allclose(assessed.predictions[order], expected, atol=1e-5)
    np.testing.assert_array_equal(assessed.deviation[order] == 0, np.ravel(known))
    plain = Scheme(CODE, scheme.surrogate)  # copies only where they are asked for
    assert plain.prepare(jnp.asarray(x)).beta is None


def test_what_is_uncertain_becomes_the_models_own(key):
    scheme = Scheme(CODE, order="pixels")
    data = points(2, 60)
    error_probability = calibrate_error_probability(
        model, CODE, data[np.asarray(scheme.arrange(data))], LAWS, key=key
    )
    scheme = eqx.tree_at(
        lambda s: s.error_probability, scheme, error_probability, is_leaf=lambda leaf: leaf is None
    )
    x = points(3)
    assessed = assess(model, scheme)(x, MASKS)
    own = np.asarray(model(jnp.asarray(x)))
    unsure = np.asarray(assessed.error_probability) > 0
    assert 0 < unsure.sum() < len(x)
    np.testing.assert_allclose(np.asarray(assessed.predictions)[~unsure], own[~unsure], atol=1e-5)
    fixed = reexecute(model, x, assessed)
    np.testing.assert_allclose(fixed.predictions, own, atol=1e-5)
    np.testing.assert_array_equal(fixed.error_probability, np.zeros(len(x)))
    limit = float(np.sort(np.asarray(assessed.error_probability))[-3])
    limited = reexecute(model, x, assessed, limit=limit)
    assert (
        np.sum(np.asarray(limited.error_probability) != np.asarray(assessed.error_probability)) == 2
    )
    assert reexecute(model, x, assessed, limit=1.0) is assessed


def test_without_any_answer_all_is_executed_again(key):
    error_probability = calibrate_error_probability(model, CODE, points(2, 20), LAWS, key=key)
    x = points(4)
    masks = MASKS.copy()
    masks[2] = False
    assessed = assess(model, Scheme(CODE, error_probability=error_probability))(x, masks)
    lost = np.arange(len(x)) // K == 2
    np.testing.assert_array_equal(assessed.recovered, ~lost)
    assert np.isnan(np.asarray(assessed.predictions)[lost]).all()
    np.testing.assert_array_equal(np.asarray(assessed.error_probability)[lost], 1)
    fixed = reexecute(model, x, assessed, limit=0.999)
    assert fixed.recovered.all()
    own = np.asarray(model(jnp.asarray(x)))
    np.testing.assert_allclose(np.asarray(fixed.predictions)[lost], own[lost], atol=1e-5)
    assert reexecute(model, x, assessed, limit=1.0).recovered.all()  # whatever the limit


# -- A cheap model beside the coded one: the formula, its limits, the search for its numbers -------


GROUPS = 6
_MIX = np.random.default_rng(0).normal(size=(2, 5, OUTPUTS))
EPS = {"float32": 2e-5, "float64": 1e-10}


def fixed_outputs(own, coded):
    """Return the prior of a surrogate that has these outputs."""
    return Surrogate(lambda x: x).group_prior(own, coded)


@eqx.filter_jit
def decode(code, surrogate, y, masks, cheap, cheap_coded):
    return decode_with_deviation(code, surrogate, y, masks, fixed_outputs(cheap, cheap_coded))


def wave(x):
    return jnp.sin(2 * x @ jnp.asarray(_MIX[0], x.dtype))


def rough(x):
    """Right in the main, on the model's scale."""
    return 0.8 * wave(x) + 0.1 * jnp.cos(x @ jnp.asarray(_MIX[1], x.dtype))


def useless(x):
    return jnp.cos(40 * x @ jnp.asarray(_MIX[1], x.dtype))


CODES = {
    "chebyshev": lambda: NeRCC(K, N),
    "interleaved": lambda: NeRCC(K, N, lambda_dec=0.0, points="interleaved"),
    "exact": lambda: NeRCC(K, N, lambda_dec=1e-2, points="repeated", exact=True),
}


def inputs(code, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(GROUPS, K, 5)), float)
    coded = jnp.einsum("nk,gkd->gnd", code.encoder_matrix(), x)
    mask = np.random.default_rng(seed + 1).permuted(np.tile(np.arange(N) > 2, (GROUPS, 1)), axis=1)
    return x, wave(coded), jnp.asarray(mask), rough(x), rough(coded)


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
        error = np.abs(decoded.predictions - wave(x)).max(axis=-1)
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
            return jnp.mean((decoded.predictions - wave(x)) ** 2)

        here, step = jnp.array([0.5, kappa]), 1e-6
        gradient = jax.grad(error)(here)
        for i, shift in enumerate(np.eye(2) * step):
            ahead = (error(here + shift) - error(here)) / step
            np.testing.assert_allclose(gradient[i], ahead, rtol=1e-3, atol=1e-7)


BOTH = {"two": ExactStragglers(2), "three": ExactStragglers(3)}


def vectors(seed, groups=40):
    return np.random.default_rng(seed).normal(size=(groups * K, 5)).astype("float32")


def disagreement_and_mse(code, surrogate, x, key):
    """By every set of the laws, with NumPy's argmax."""
    groups = jnp.asarray(x.reshape(-1, K, 5))
    coded = jnp.einsum("nk,gkd->gnd", code.encoder_matrix(), groups)
    wrong, square = [], []
    for law in BOTH.values():
        masks_of_law = law.every_set(N, 100)
        assert masks_of_law is not None
        for mask in masks_of_law:
            masks = jnp.broadcast_to(jnp.asarray(mask), (len(groups), N))
            cheap, cheap_coded = surrogate.model(groups), surrogate.model(coded)
            decoded = decode(code, surrogate, wave(coded), masks, cheap, cheap_coded)
            difference = decoded.predictions - wave(groups)
            labels = np.argmax(wave(groups), axis=-1)
            wrong.append(np.mean(np.argmax(decoded.predictions, axis=-1) != labels))
            square.append(float(jnp.mean(difference**2)))
    return np.mean(wrong), np.mean(square)


@pytest.mark.parametrize(("cheap", "criterion"), [(rough, "disagreement"), (useless, "mse")])
def test_what_is_found_is_no_worse_than_either(criterion, cheap, key):
    code, x = CODES["exact"](), vectors(0)
    found = fit_surrogate(wave, cheap, code, x, BOTH, key=key, num_sets=100, criterion=criterion)
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
    found = fit_surrogate(wave, wave, CODES["chebyshev"](), vectors(1), BOTH, key=key)
    disagreement, _ = disagreement_and_mse(CODES["chebyshev"](), found, vectors(2), key)
    assert disagreement == 0
