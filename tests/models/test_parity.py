"""Parity models: their score against a plain account, and training end to end."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from nercc_models import load_data, load_model
from nercc_models.parity import ParityRecipe, base_outputs, score_parity, train_parity
from nercc_models.registry import ParityModel
from nercc_models.weights import named_arrays

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def base():
    return load_model("lenet5-digits")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "train"), load_data("digits", "test")


def short_recipe(**changes):
    """40 steps."""
    numbers = {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3, **changes}
    return ParityRecipe("lenet5-digits", 2, "logits", **numbers)


def arrays(trained):
    state = trained.model.network.state
    return {name: np.asarray(array) for name, array in named_arrays(state).items()}


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
@pytest.mark.parametrize("k", [2, 3])
def test_the_score_is_what_it_says(base, digits, k, outputs):
    """The untrained parity model, on 31 images: every image of a full tuple is missing once."""
    data = digits[1].take(slice(31))
    model = ParityModel(base, k, outputs)
    known = base(base.preprocess(data.images))
    known = np.asarray(jax.nn.softmax(known) if outputs == "probabilities" else known)
    score = score_parity(model, data, known, seed=3)
    order = np.random.default_rng((3, 0)).permutation(31)[: 31 // k * k].reshape(-1, k)
    correct = agreeing = base_correct = 0
    errors = []
    for group in order:
        answer = model(sum(base.preprocess(data.images[i : i + 1]) for i in group))[0]
        for i in group:
            rebuilt = answer - sum(known[j] for j in group if j != i)
            errors.append(np.mean((rebuilt - known[i]) ** 2))
            correct += np.argmax(rebuilt) == data.labels[i]
            agreeing += np.argmax(rebuilt) == np.argmax(known[i])
            base_correct += np.argmax(known[i]) == data.labels[i]
    assert (score.correct, score.agreeing, score.base_correct) == (correct, agreeing, base_correct)
    assert score.total == order.size
    np.testing.assert_allclose(score.mse, np.mean(errors), rtol=1e-3)
    np.testing.assert_allclose(
        score.relative_mse, np.mean(errors) / known.var(axis=0).mean(), rtol=1e-3
    )
    assert json.dumps(score.numbers())


@pytest.mark.slow
@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_training_improves_on_the_base_model_and_repeats(base, digits, outputs):
    recipe = dataclasses.replace(short_recipe(), outputs=outputs)
    train_data, test_data = digits
    known = base_outputs(base, test_data, outputs)
    before = score_parity(ParityModel(base, 2, outputs), test_data, known)
    trained, again = (train_parity(recipe, base, train_data) for _ in "12")
    after = score_parity(trained.model, test_data, known)
    assert after.mse < 0.9 * before.mse
    assert after.agreement > before.agreement
    assert trained.train_images + trained.held_out_images == len(train_data)
    assert trained.history[1]["held_out_loss"] < trained.history[0]["held_out_loss"]
    for name, array in arrays(trained).items():
        np.testing.assert_array_equal(arrays(again)[name], array, err_msg=name)
    assert any(np.any(a != named_arrays(base.state)[n]) for n, a in arrays(trained).items())


def test_what_cannot_be_trained_is_refused(base, digits):
    with pytest.raises(ValueError, match="the sum of 2 or more inputs, not 1"):
        ParityRecipe("lenet5-digits", 1, "logits")
    with pytest.raises(ValueError, match=r"A batch of 32 times 2 is more than the 57 training"):
        train_parity(short_recipe(), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match=r"held_out=0\.0 of 60 images are 0: they make no tuple"):
        train_parity(short_recipe(held_out=0.0), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match="1 images make no tuple of 2"):
        score_parity(ParityModel(base, 2, "logits"), digits[1].take(slice(1)), np.zeros((1, 10)))
