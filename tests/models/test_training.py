"""Training: an interrupted run ends where an uninterrupted one does; and its parts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_models import load_data, load_model, model_card
from nercc_models.augmentation import Augmentation, augment
from nercc_models.recipes import RECIPES, find_recipe
from nercc_models.train import main
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


def arrays(trained):
    return {name: np.asarray(a) for name, a in named_arrays(nnx.state(trained.model)).items()}


@pytest.fixture(scope="module")
def uninterrupted(digits):
    return train(short_recipe(), *digits)


# In the first epoch, at a checkpoint, and in the second epoch between two checkpoints.
@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 16, STEPS_PER_EPOCH + 9])
def test_interrupted_and_resumed_equals_uninterrupted(digits, uninterrupted, tmp_path, stop):
    recipe, expected = short_recipe(), uninterrupted

    def interrupt(step, total):
        assert total == 2 * STEPS_PER_EPOCH
        if step == stop:
            raise Interrupted

    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 8}
    with pytest.raises(Interrupted):
        train(recipe, *digits, **options, on_step=interrupt)
    steps = []
    got = train(recipe, *digits, **options, on_step=lambda step, total: steps.append(step))
    assert steps[0] == stop // 8 * 8
    assert steps[-1] == 2 * STEPS_PER_EPOCH
    for name, array in arrays(expected).items():
        np.testing.assert_array_equal(arrays(got)[name], array, err_msg=name)
    assert got.score == expected.score
    untimed = [[{**e, "seconds": 0} for e in t.history] for t in (got, expected)]
    assert untimed[0] == untimed[1]


def test_a_finished_run_is_returned_without_a_step(digits, tmp_path):
    recipe = dataclasses.replace(short_recipe(), epochs=1)
    first = train(recipe, *digits, checkpoint_dir=tmp_path)
    steps = []
    again = train(
        recipe, *digits, checkpoint_dir=tmp_path, on_step=lambda step, total: steps.append(step)
    )
    assert steps == [STEPS_PER_EPOCH]
    assert again.score == first.score
    assert again.history == first.history
    other = dataclasses.replace(recipe, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"other numbers.*learning_rate.*0\.5"):
        train(other, *digits, checkpoint_dir=tmp_path)


@pytest.mark.slow
def test_a_run_may_start_from_the_weights_of_another(digits, tmp_path):
    recipe = dataclasses.replace(short_recipe(), epochs=1)
    first = train(recipe, *digits, checkpoint_dir=tmp_path)
    still = dataclasses.replace(recipe, learning_rate=0.0, seed=1)
    second = train(still, *digits, start_from=tmp_path)
    for name, array in arrays(first).items():
        np.testing.assert_array_equal(arrays(second)[name], array, err_msg=name)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        train(recipe, *digits, start_from=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint in"):
        train(recipe, *digits, start_from=tmp_path / "empty")


def test_a_batch_larger_than_the_data_is_refused(digits):
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


def images_and_targets(batch=6):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(1, 2, (batch, 8, 8, 3)), jnp.float32)
    return images, jax.nn.one_hot(jnp.arange(batch), batch)


def test_no_augmentation_changes_nothing():
    images, targets = images_and_targets()
    got = augment(jax.random.key(0), images, targets, Augmentation())
    np.testing.assert_array_equal(got[0], images)
    np.testing.assert_array_equal(got[1], targets)


def test_a_crop_is_a_window_of_the_padded_image():
    images, targets = images_and_targets()
    cropped, _ = augment(jax.random.key(1), images, targets, Augmentation(padding=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(np.asarray(cropped), padded, strict=True):
        windows = [source[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(np.array_equal(image, window) for window in windows)
    assert not np.array_equal(cropped, images)


def test_a_flip_mirrors_some_images_and_leaves_the_others():
    images, targets = images_and_targets(32)
    flipped, _ = augment(jax.random.key(2), images, targets, Augmentation(flip=True))
    mirrored = np.all(np.asarray(flipped) == np.asarray(images[:, :, ::-1]), axis=(1, 2, 3))
    same = np.all(np.asarray(flipped) == np.asarray(images), axis=(1, 2, 3))
    assert np.all(mirrored | same)
    assert mirrored.any()
    assert same.any()


def test_cutout_hides_at_most_its_square():
    images, targets = images_and_targets(32)
    cut, _ = augment(jax.random.key(3), images, targets, Augmentation(cutout=4))
    hidden = np.asarray(cut == 0).all(axis=-1)
    assert np.all(np.asarray(cut)[~hidden] == np.asarray(images)[~hidden])
    assert 1 <= hidden.sum(axis=(1, 2)).max() <= 16
    assert hidden.any(axis=(1, 2)).all()


def test_mixup_mixes_labels_in_the_same_share():
    images, targets = images_and_targets()
    mixed, shares = augment(jax.random.key(4), images, targets, Augmentation(mixup=1.0))
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    expected = np.einsum("bk,khwc->bhwc", np.asarray(shares), np.asarray(images))
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown recipe 'lenet'.*lenet5-digits"):
        find_recipe("lenet")


@pytest.mark.slow
def test_the_command_writes_weights_that_load_and_a_card(tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("safetensors")
    options = ["--epochs", "4", "--checkpoint-dir", str(tmp_path / "run")]
    main(["lenet5-digits", *options, "--output-dir", str(tmp_path / "out")])
    assert "of 450 test images are right" in capsys.readouterr().out
    model = load_model("lenet5-digits", weights_dir=tmp_path / "out")
    assert model.num_parameters == 61_706
    card = model_card("lenet5-digits", weights_dir=tmp_path / "out")
    assert card["recipe"]["epochs"] == 4
    assert len(card["history"]) == 4
    assert card["bytes"] == (tmp_path / "out" / "lenet5-digits.safetensors").stat().st_size
    assert json.dumps(card)
