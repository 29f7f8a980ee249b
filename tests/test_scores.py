"""Outputs that look like scores of labels, as a classifier's do, and a function's do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import ExactStragglers, NeRCC, Scheme, calibrate_error_probability
from nercc_jax.codes._trees import join
from nercc_jax.evaluation import record_answers
from nercc_jax.risk._outputs import ROWS, why_no_scores
from nercc_models import list_models, load_data, load_model

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def logits():
    """Of the classifier whose data come with a package."""
    network = load_model(list_models()[0])
    images = network.preprocess(load_data("digits", "test").images[:ROWS])
    return np.asarray(jax.jit(lambda x: network(x))(images))


def test_scores_of_a_classifier_look_like_scores(logits):
    forms = {
        "logits": logits,
        "scaled": 1e-3 * logits + 7,
        "softmax": jax.nn.softmax(logits),
        "log softmax": jax.nn.log_softmax(logits),
        "two classes": np.stack([logits[:, :5].max(axis=1), logits[:, 5:].max(axis=1)], axis=1),
    }
    for name, scores in forms.items():
        assert why_no_scores(np.asarray(scores)) is None, name
    doubtful = logits + RANDOM.normal(size=logits.shape) * logits.std()
    agreement = np.mean(doubtful.argmax(axis=1) == logits.argmax(axis=1))
    assert agreement < 0.85
    assert why_no_scores(doubtful.astype(np.float32)) is None


def functions(outputs):
    """Answers of functions with so many outputs: alike, of different sizes, or neighbours."""
    x = RANDOM.normal(size=(4 * ROWS, 12))
    w, v = RANDOM.normal(size=(12, 32)), RANDOM.normal(size=(32, outputs))
    phase = np.arange(outputs) * (3 / outputs)
    return {
        "network": np.tanh(x @ w) @ v,
        "prices": np.exp(x @ w[:, :1] / 4 + RANDOM.normal(size=outputs) + 0.1 * (x @ w)[:, :1]),
        "offsets": np.tanh(x @ w / 3) @ v + 10 * np.arange(outputs),
        "field": np.sin(x[:, :1] + phase),
        "turned": np.tanh(x[:, :outputs] if outputs <= 12 else x @ w @ v),
    }


@pytest.mark.parametrize("outputs", [2, 3, 10, 100])
def test_values_do_not(outputs):
    for name, values in functions(outputs).items():
        for part in np.split(values, 4):
            assert why_no_scores(part.astype(np.float32)) is not None, name


def test_pairs_with_a_constant_sum_do_not_whatever_their_law():
    draws = RANDOM.normal(size=ROWS), RANDOM.uniform(-1, 1, ROWS), RANDOM.exponential(size=ROWS)
    for draw in draws:
        assert "leads the second hardly more" in str(why_no_scores(np.stack([draw, 3 - draw], 1)))


def test_every_part_has_to_look_like_scores(logits):
    values = np.tanh(RANDOM.normal(size=(len(logits), 3)))
    for parts, scores in (
        ({"a": logits, "b": logits[:, ::-1]}, True),
        ({"a": logits, "b": values}, False),
        ({"a": logits, "b": logits[:, 0]}, False),
        ({"a": logits.reshape(len(logits), 1, 10)}, True),
        ({"a": logits, "b": logits[:, :1]}, False),
    ):
        vectors, form = join(jax.tree.map(jnp.asarray, parts), 1)
        assert (why_no_scores(np.asarray(vectors), form) is None) == scores


def single(x):
    return jnp.tanh(x[:, :1])


@pytest.mark.parametrize("scheme", [NeRCC(2, 4), Scheme(NeRCC(2, 4))])
def test_no_label_is_promised_of_a_single_number(scheme):
    x = RANDOM.normal(size=(8, 3)).astype(np.float32)
    laws = {"1": ExactStragglers(1)}
    with pytest.raises(ValueError, match="which is no label"):
        calibrate_error_probability(single, scheme, x, laws, key=jax.random.key(0), num_sets=1)


def test_no_forecast_of_labels_of_a_single_number():
    forecast = record_answers(single, NeRCC(2, 4), RANDOM.normal(size=(8, 3)).astype(np.float32))
    with pytest.raises(ValueError, match="give max_error"):
        forecast.below(max_disagreement=0.1)
    assert callable(forecast.below(max_error=10.0))
