"""Training of models and of parity models: resumed runs end where uninterrupted ones do."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_models import (
    list_parity_models,
    load_data,
    load_model,
    load_parity_model,
    model_card,
    parity_card,
)
from nercc_models.augmentation import Augmentation, augment
from nercc_models.distill import main as distill_main
from nercc_models.distillation import distill
from nercc_models.parity import ParityRecipe, base_outputs, score_parity, train_parity
from nercc_models.parity import main as parity_main
from nercc_models.recipes import RECIPES, find_recipe
from nercc_models.registry import ParityModel
from nercc_models.students import Perceptron, load_student, student_card
from nercc_models.train import main as train_main
from nercc_models.training import batch_indices, make_optimizer, train
from nercc_models.weights import named_arrays

STEPS_PER_EPOCH = 1347 // 64


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "train"), load_data("digits", "test")


def short_recipe():
    """All that derives from (seed, step) is in it: shuffling, crops, cutout, mixup, a schedule."""
    return dataclasses.replace(
        RECIPES["lenet5-digits"],
        epochs=2,
        warmup_epochs=0.5,
        augmentation=Augmentation(padding=2, flip=True, cutout=6, mixup=0.3),
    )


def run_of_a_model(digits, **options):
    numbers = {"learning_rate": options.pop("learning_rate", 3e-3)}
    trained = train(dataclasses.replace(short_recipe(), **numbers), *digits, **options)
    return trained, nnx.state(trained.model)


def run_of_a_parity_model(digits, **options):
    recipe = parity_recipe(learning_rate=options.pop("learning_rate", 3e-3))
    trained = train_parity(recipe, load_model("lenet5-digits"), digits[0], **options)
    return trained, trained.model.network.state


def run_of_a_student(digits, **options):
    x = np.asarray(jax.random.normal(jax.random.key(0), (400, 6)))
    numbers = {"learning_rate": options.pop("learning_rate", 3e-3)}
    found = distill(
        lambda x: jnp.tanh(x[:, :3]), Perceptron((6,), 3, widths=(8,), rngs=nnx.Rngs(0)), x,
        epochs=3, num_queries=640, batch_size=64, numbers=numbers, **numbers, **options,
    )  # fmt: skip
    return found, nnx.state(found.student)


# A model in the first epoch, at a checkpoint, and in the second epoch between two checkpoints.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "stop", "begins"),
    [
        *((run_of_a_model, stop, stop // 8 * 8) for stop in (5, 16, STEPS_PER_EPOCH + 9)),
        (run_of_a_parity_model, 23, 20),
        (run_of_a_student, 14, 10),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(digits, tmp_path, run, stop, begins):
    totals, steps, options = set(), [], {"checkpoint_dir": tmp_path}
    if run is run_of_a_model:
        options["checkpoint_every"] = 8
    expected, weights = run(digits)

    def interrupt(step, total):
        totals.add(total)
        if step == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(digits, **options, on_step=interrupt)
    got, again = run(digits, **options, on_step=lambda step, total: steps.append(step))
    assert (steps[0], {steps[-1]}) == (begins, totals)
    for name, array in named_arrays(weights).items():
        np.testing.assert_array_equal(named_arrays(again)[name], array, err_msg=name)
    untimed = [[{**e, "seconds": 0} for e in t.history] for t in (got, expected)]
    assert untimed[0] == untimed[1]
    assert getattr(got, "score", None) == getattr(expected, "score", None)
    with pytest.raises(ValueError, match=r"other numbers.*learning_rate.*0\.5"):
        run(digits, **options, learning_rate=0.5)


def test_a_batch_larger_than_the_data_and_an_unknown_recipe_are_refused(digits):
    with pytest.raises(ValueError, match=r"Unknown recipe 'lenet'.*lenet5-digits"):
        find_recipe("lenet")
    train_data, test_data = digits
    with pytest.raises(ValueError, match="A batch of 64 is more than the 10 training images"):
        train(short_recipe(), train_data.take(slice(10)), test_data)


def test_an_epoch_is_a_permutation_and_the_next_is_another():
    epochs = [
        np.concatenate([batch_indices(0, step, 20, 5) for step in range(4 * e, 4 * e + 4)])
        for e in range(2)
    ]
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order), np.arange(20))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(batch_indices(0, 0, 20, 5), batch_indices(1, 0, 20, 5))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_leaves_biases_alone(optimizer):
    recipe = dataclasses.replace(
        short_recipe(), optimizer=optimizer, weight_decay=0.1, warmup_epochs=0
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    transform = make_optimizer(recipe, 10)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(grads, transform.init(params), params)
    assert np.all(np.asarray(updates["kernel"]) < 0)
    np.testing.assert_array_equal(updates["bias"], 0)


def images_and_targets(batch):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(1, 2, (batch, 8, 8, 3)), jnp.float32)
    return images, jax.nn.one_hot(jnp.arange(batch), batch)


def windows(images, changed):
    """Each is a crop of its padded image."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(changed, padded, strict=True):
        crops = [source[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(np.array_equal(image, crop) for crop in crops)


def mirrors(images, changed):
    """Some are mirrored, and the others are as they were."""
    mirrored = np.all(changed == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(changed == images, axis=(1, 2, 3))
    assert np.all(mirrored | same)
    assert mirrored.any()
    assert same.any()


def holes(images, changed):
    """At most a square of each is hidden."""
    hidden = (changed == 0).all(axis=-1)
    assert np.all(changed[~hidden] == images[~hidden])
    assert 1 <= hidden.sum(axis=(1, 2)).max() <= 16
    assert hidden.any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (Augmentation(), np.testing.assert_array_equal),
        (Augmentation(padding=2), windows),
        (Augmentation(flip=True), mirrors),
        (Augmentation(cutout=4), holes),
    ],
)
def test_an_augmentation_does_what_it_says_and_no_more(change, check):
    images, targets = images_and_targets(32)
    changed, same = augment(jax.random.key(3), images, targets, change)
    check(np.asarray(images), np.asarray(changed))
    np.testing.assert_array_equal(same, targets)
    assert np.array_equal(changed, images) == (change == Augmentation())


def test_mixup_mixes_labels_in_the_same_share():
    images, targets = images_and_targets(6)
    mixed, shares = augment(jax.random.key(4), images, targets, Augmentation(mixup=1.0))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    expected = np.einsum("bk,khwc->bhwc", np.asarray(shares), np.asarray(images))
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "command", "printed"),
    [
        (train_main, "--epochs 4", "of 450 test images are right"),
        (
            parity_main,
            "--k 3 --outputs probabilities --epochs 1 --learning-rate 0.002 --batch-size 32",
            "of 450 test images, rebuilt one at a time",
        ),
        (
            distill_main,
            "--num-queries 640 --epochs 2 --batch-size 64 --seed 4",
            "of 450 inputs that it was not trained on",
        ),
    ],
)
def test_a_command_writes_weights_that_load_and_a_card(tmp_path, capsys, main, command, printed):
    pytest.importorskip("rich")
    pytest.importorskip("safetensors")
    out, words = tmp_path / "out", ["lenet5-digits", *command.split()]
    main([*words, "--checkpoint-dir", str(tmp_path / "run"), "--output-dir", str(out)])
    assert printed in capsys.readouterr().out
    which, images = ("lenet5-digits",), jnp.ones((2, 32, 32, 1))
    if main is train_main:
        model, card = load_model(*which, weights_dir=out), model_card(*which, weights_dir=out)
        assert (model.num_parameters, card["recipe"]["epochs"]) == (61_706, 4)
    elif main is parity_main:
        which += (3, "probabilities")
        assert list_parity_models(out) == (which,)
        model = load_parity_model(*which, weights_dir=out)
        card = parity_card(*which, weights_dir=out)
        np.testing.assert_allclose(model(images).sum(axis=1), 3, rtol=1e-5)
        assert card["score"]["total"] == 450
        with pytest.raises(ValueError, match=r"no parity model.*Known: lenet5-digits, k=3, probab"):
            load_parity_model("lenet5-digits", 2, "logits", weights_dir=out)
        with pytest.raises(ValueError, match="Known: none"):
            parity_card("lenet5-digits", 2, "logits", weights_dir=tmp_path / "run")
    else:
        model, card = load_student(*which, weights_dir=out), student_card(*which, weights_dir=out)
    assert model(images).shape == (2, 10)
    if main is not train_main:
        module = main.__module__
        assert card["made_by"] == f"python -m {module} {' '.join(words)}"
    assert len(card["history"]) == int(command.split("--epochs ")[1].split()[0])
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert [card["bytes"]] == files
    assert json.dumps(card)


# -- Parity models: their score against a plain account, and training end to end -------------------

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def base():
    return load_model("lenet5-digits")


def parity_recipe(outputs="logits", **changes):
    """40 steps."""
    numbers = {"epochs": 2, "batch_size": 32, "learning_rate": 3e-3, **changes}
    return ParityRecipe("lenet5-digits", 2, outputs, **numbers)


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
def test_training_improves_on_the_base_model(base, digits, outputs):
    train_data, test_data = digits
    known = base_outputs(base, test_data, outputs)
    before = score_parity(ParityModel(base, 2, outputs), test_data, known)
    trained = train_parity(parity_recipe(outputs), base, train_data)
    after = score_parity(trained.model, test_data, known)
    assert after.mse < 0.9 * before.mse
    assert after.agreement > before.agreement
    assert trained.train_images + trained.held_out_images == len(train_data)
    assert trained.history[1]["held_out_loss"] < trained.history[0]["held_out_loss"]
    ours = named_arrays(trained.model.network.state)
    assert any(np.any(array != named_arrays(base.state)[name]) for name, array in ours.items())


def test_what_cannot_be_trained_is_refused(base, digits):
    with pytest.raises(ValueError, match="the sum of 2 or more inputs, not 1"):
        ParityRecipe("lenet5-digits", 1, "logits")
    with pytest.raises(ValueError, match=r"A batch of 32 times 2 is more than the 57 training"):
        train_parity(parity_recipe(), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match=r"held_out=0\.0 of 60 images are 0: they make no tuple"):
        train_parity(parity_recipe(held_out=0.0), base, digits[0].take(slice(60)))
    with pytest.raises(ValueError, match="1 images make no tuple of 2"):
        score_parity(ParityModel(base, 2, "logits"), digits[1].take(slice(1)), np.zeros((1, 10)))
