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
    reexecute,
)
from nercc_jax.surrogates import Surrogate

K, N, OUTPUTS = 4, 7, 3
LAWS = {"three": ExactStragglers(3)}
_WEIGHTS = np.random.default_rng(0).normal(size=(2, 3, OUTPUTS))


def model(x):
    return jnp.sin(1.5 * x.reshape(len(x), -1) @ jnp.asarray(_WEIGHTS.reshape(6, -1), x.dtype))


def rough(x):
    return 0.9 * model(x)


def points(seed, groups=6):
    return np.random.default_rng(seed).normal(size=(groups * K, 2, 3)).astype("float32")


def decode_with_deviation(model, scheme, **options):
    return coded_inference(model, scheme, with_status=True, **options)


CODE = NeRCC(K, N, lambda_dec=0.0, points="repeated")
MASKS = np.random.default_rng(5).permuted(np.tile(np.arange(N) > 2, (6, 1)), axis=1)


def test_without_extras_it_is_coded_inference():
    x = points(0)
    assessed = decode_with_deviation(model, Scheme(CODE))(x, MASKS)
    expected = coded_inference(model, CODE)(x.reshape(-1, K, 2, 3), MASKS)
    np.testing.assert_array_equal(assessed.predictions, expected.reshape(-1, OUTPUTS))
    assert assessed.recovered.all()
    assert assessed.error_probability is None
    np.testing.assert_array_equal(assessed.responded, MASKS)
    one = decode_with_deviation(model, Scheme(CODE))(x, MASKS[0])
    np.testing.assert_array_equal(one.responded, np.tile(MASKS[0], (6, 1)))


@pytest.mark.parametrize("order", [None, "pixels", "surrogate", model])
def test_predictions_come_back_where_data_points_came(order):
    x = points(1)
    scheme = Scheme(CODE, Surrogate(rough, theta=0.5, kappa=1.0), order=order, buffer_size=3 * K)
    everyone = decode_with_deviation(model, scheme)(x, np.ones(N, bool))
    np.testing.assert_allclose(everyone.predictions, model(jnp.asarray(x)), atol=1e-5)
    arranged = np.asarray(scheme.arrange(x))
    assert sorted(arranged[: 3 * K]) == list(range(3 * K)), "buffers are not mixed"
    by_hand = Scheme(CODE, scheme.surrogate)
    expected = decode_with_deviation(model, by_hand)(x[arranged], MASKS)
    assessed = decode_with_deviation(model, scheme)(x, MASKS)
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
        return 2 * rough(x)

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
    assessed = decode_with_deviation(model, scheme)(x, MASKS)
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
    assessed = decode_with_deviation(model, scheme)(x, MASKS)
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
    assessed = decode_with_deviation(model, Scheme(CODE, error_probability=error_probability))(
        x, masks
    )
    lost = np.arange(len(x)) // K == 2
    np.testing.assert_array_equal(assessed.recovered, ~lost)
    assert np.isnan(np.asarray(assessed.predictions)[lost]).all()
    np.testing.assert_array_equal(np.asarray(assessed.error_probability)[lost], 1)
    fixed = reexecute(model, x, assessed, limit=0.999)
    assert fixed.recovered.all()
    own = np.asarray(model(jnp.asarray(x)))
    np.testing.assert_allclose(np.asarray(fixed.predictions)[lost], own[lost], atol=1e-5)
