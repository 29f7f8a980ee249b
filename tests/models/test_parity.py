"""Parity models: their score against a plain account, training end to end, and what is shipped."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_models import (
    list_models,
    list_parity_models,
    load_data,
    load_model,
    load_parity_model,
    parity_card,
)
from nercc_models.parity import (
    ParityRecipe,
    base_outputs,
    fingerprint,
    main,
    score_parity,
    summed,
    train_parity,
)
from nercc_models.registry import WEIGHTS_DIR, ParityModel
from nercc_models.weights import named_arrays

pytest.importorskip("safetensors")

SHARED_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


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


def test_summed_images_are_preprocessed_first(base, digits):
    images = digits[0].images[:6].reshape(2, 3, 8, 8, 1)
    expected = [sum(base.preprocess(image[None])[0] for image in group) for group in images]
    np.testing.assert_allclose(summed(base.preprocess, images), np.stack(expected), rtol=1e-5)


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


@pytest.mark.slow
def test_an_interrupted_run_goes_on(base, digits, tmp_path):
    recipe, data = short_recipe(), digits[0]
    expected = train_parity(recipe, base, data)

    def interrupt(step, total):
        if step == total // 2 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_parity(recipe, base, data, checkpoint_dir=tmp_path, on_step=interrupt)
    steps = []
    got = train_parity(
        recipe, base, data, checkpoint_dir=tmp_path, on_step=lambda step, total: steps.append(step)
    )
    assert steps[0] == steps[-1] // 2
    for name, array in arrays(expected).items():
        np.testing.assert_array_equal(arrays(got)[name], array, err_msg=name)
    other = dataclasses.replace(recipe, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"other numbers.*learning_rate"):
        train_parity(other, base, data, checkpoint_dir=tmp_path)


def test_what_cannot_be_trained_is_refused(base, digits):
    with pytest.raises(ValueError, match="the sum of 2 or more inputs, not 1"):
        ParityRecipe("lenet5-digits", 1, "logits")
    with pytest.raises(ValueError, match=r"A batch of 32 times 2 is more than the 57 training"):
        train_parity(short_recipe(), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match=r"held_out=0\.0 of 60 images are 0: they make no tuple"):
        train_parity(short_recipe(held_out=0.0), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match="1 images make no tuple of 2"):
        score_parity(ParityModel(base, 2, "logits"), digits[1].take(slice(1)), np.zeros((1, 10)))


@pytest.mark.slow
def test_the_command_writes_weights_that_load_and_a_card(tmp_path, capsys):
    pytest.importorskip("rich")
    command = (
        "lenet5-digits --k 3 --outputs probabilities --epochs 1 "
        "--learning-rate 0.002 --batch-size 32 --seed 4"
    )
    folders = ["--checkpoint-dir", str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")]
    main([*command.split(), *folders])
    assert "of 450 test images, rebuilt one at a time" in capsys.readouterr().out
    which = ("lenet5-digits", 3, "probabilities")
    assert list_parity_models(tmp_path / "out") == (which,)
    model = load_parity_model(*which, weights_dir=tmp_path / "out")
    assert (model.k, model.outputs) == which[1:]
    np.testing.assert_allclose(model(jnp.ones((2, 32, 32, 1))).sum(axis=1), 3, rtol=1e-5)
    card = parity_card(*which, weights_dir=tmp_path / "out")
    assert card["made_by"] == f"python -m nercc_models.parity {command}"
    assert card["score"]["total"] == 450
    with pytest.raises(ValueError, match=r"no parity model.*Known: lenet5-digits, k=3, probab"):
        load_parity_model("lenet5-digits", 2, "logits", weights_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="Known: none"):
        parity_card("lenet5-digits", 2, "logits", weights_dir=tmp_path / "run")


# -- What is shipped -------------------------------------------------------------------------------


def test_shipped_parity_models_are_no_models_of_their_own():
    shipped = list_parity_models()
    assert shipped
    assert {base for base, _, _ in shipped} <= set(list_models())
    assert not any("parity" in name for name in list_models())


@pytest.mark.parametrize("which", list_parity_models(), ids=str)
def test_the_card_says_what_is_there(which):
    card, model = parity_card(*which), load_parity_model(*which)
    name = model.network.name
    assert card["bytes"] == (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size
    assert card["num_parameters"] == model.network.num_parameters
    assert card["base_sha256"] == fingerprint(WEIGHTS_DIR / f"{which[0]}.safetensors"), (
        "the base model was trained again: train its parity models again too"
    )
    images = jnp.zeros((2, *model.network.input_shape))
    gradient = jax.jit(jax.grad(lambda model, x: jnp.sum(jnp.sin(model(x)))))(model, images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(model))


@pytest.mark.slow
@pytest.mark.parametrize("which", list_parity_models(), ids=str)
def test_the_shipped_weights_score_what_is_claimed(which):
    base, parity, card = load_model(which[0]), load_parity_model(*which), parity_card(*which)
    data_dir = None
    if base.data != "digits":
        pytest.importorskip("datasets", reason="needs the extra `data`")
        data_dir = SHARED_DATA
        if not SHARED_DATA.is_dir():
            pytest.skip(f"no data: {SHARED_DATA.resolve()} is not there")
    data = load_data(base.data, "test", data_dir=data_dir, limit=1000)
    score = score_parity(parity, data, base_outputs(base, data, parity.outputs))
    claimed = card["score"]
    # A share of the test images: within four standard errors of what all of them gave.
    for metric in ("accuracy", "agreement"):
        share = claimed[metric]
        error = np.sqrt(share * (1 - share) / score.total)
        assert abs(getattr(score, metric) - share) <= 4 * error
    np.testing.assert_allclose(score.relative_mse, claimed["relative_mse"], rtol=0.3)
