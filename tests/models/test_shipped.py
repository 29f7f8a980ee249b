"""What is shipped: models, their students and parity models; and the scores that cards claim."""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_models import (
    evaluate_model,
    list_models,
    list_parity_models,
    load_data,
    load_model,
    load_parity_model,
    model_card,
    parity_card,
    score,
)
from nercc_models.distill import STUDENT_RECIPES
from nercc_models.distillation import score_student
from nercc_models.lenet5 import LeNet5
from nercc_models.parity import base_outputs, fingerprint, score_parity
from nercc_models.recipes import RECIPES
from nercc_models.registry import WEIGHTS_DIR
from nercc_models.students import (
    SHARE,
    list_students,
    load_student,
    load_student_file,
    multiplications,
    student_card,
)
from nercc_models.weights import load_weights, named_arrays, save_weights, with_arrays

pytest.importorskip("safetensors")

SHARED_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
# Least accuracy on test images, and least agreement of a student with its model: what issue 3 asks
# for, except where a comment says otherwise.
WANTED = {
    "lenet5-digits": (0.98, 0.97),
    "lenet5-mnist": (0.988, 0.975),
    "repvgg-cifar10": (0.85, 0.7),
    "vit-cifar10": (0.70, 0.6),
}
# The first test images that these models label right, of 1,000: all 5,000 take five times as long.
RIGHT = {"repvgg-cifar10": 850, "vit-cifar10": 718}


class Shipped(NamedTuple):
    """A model, its student or a parity model, with its base and its file."""

    kind: str
    model: Any
    network: Any  # with the number of its parameters
    card: dict[str, Any]
    base: str
    file: str


NAMES = [
    *((kind, name) for kind in ("model", "student") for name in list_models()),
    *(("parity", which) for which in list_parity_models()),
]


def id_of(each):
    return f"{each[0]}-{each[1]}"


@pytest.fixture(params=NAMES, ids=id_of)
def shipped(request):
    kind, name = request.param
    if kind == "parity":
        model = load_parity_model(*name)
        return Shipped(kind, model, model.network, parity_card(*name), name[0], model.network.name)
    load, card = {"model": (load_model, model_card), "student": (load_student, student_card)}[kind]
    file = name if kind == "model" else f"{name}-student"
    return Shipped(kind, model := load(name), model, card(name), name, file)


def data_of(model, limit=None):
    """Its test data; the test skips where they are not."""
    if model.data == "digits":
        return load_data("digits", "test", limit=limit)
    pytest.importorskip("datasets", reason="needs the extra `data`")
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data: {SHARED_DATA.resolve()} is not there")
    return load_data(model.data, "test", data_dir=SHARED_DATA, limit=limit)


def test_every_model_has_a_recipe_weights_a_card_and_a_student():
    assert set(list_models()) == set(RECIPES) == set(WANTED)
    assert set(WANTED) == set(STUDENT_RECIPES) == set(list_students())
    assert {base for base, _, _ in list_parity_models()} <= set(list_models())
    assert not any("parity" in name for name in list_models())
    assert sum(path.stat().st_size for path in WEIGHTS_DIR.iterdir()) <= 10e6


def test_a_model_is_a_function_of_a_batch_and_a_pytree_of_arrays(shipped):
    model, network = shipped.model, shipped.network
    images = np.random.default_rng(0).uniform(size=(3, *network.input_shape))
    images = jnp.asarray(images, jnp.float32)
    outputs = model(images)
    assert (outputs.shape, outputs.dtype) == ((3, len(load_model(shipped.base).classes)), "float32")
    assert all(eqx.is_array(leaf) for leaf in jax.tree.leaves(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == network.num_parameters
    jitted = jax.jit(lambda model, x: model(x))(model, images)
    tolerance = 1e-4 if shipped.kind == "model" else 1e-3
    np.testing.assert_allclose(jitted, outputs, rtol=tolerance, atol=tolerance)
    gradient = jax.jit(jax.grad(lambda model, x: jnp.sum(jnp.sin(model(x)))))(model, images)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all()
        assert np.any(np.asarray(leaf) != 0), f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.parametrize("name", list_models())
def test_one_compilation_serves_every_load(name):
    traces = []

    @jax.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    for _ in range(2):
        model = load_model(name)
        run(model, jnp.ones((2, *model.input_shape)))
    assert len(traces) == 1


def test_the_card_says_what_is_there(shipped):
    card, base = shipped.card, load_model(shipped.base)
    assert card["bytes"] == (WEIGHTS_DIR / f"{shipped.file}.safetensors").stat().st_size
    assert card["num_parameters"] == shipped.network.num_parameters
    if shipped.kind == "model":
        assert tuple(card["classes"]) == base.classes
        assert card["data"] == base.data == RECIPES[shipped.base].data
        assert card["score"]["accuracy"] >= WANTED[shipped.base][0]
        assert card["training_seconds"] > 0
        return
    assert card["base_sha256"] == fingerprint(WEIGHTS_DIR / f"{shipped.base}.safetensors"), (
        "the base model was trained again: train what was made from it again too"
    )
    if shipped.kind == "student":
        assert card["bytes"] <= 300e3
        assert card["score"]["agreement"] >= WANTED[shipped.base][1]
        assert shipped.model.input_shape == base.input_shape
        assert card["multiplications"] == multiplications(shipped.model, base.input_shape)
        assert card["base_multiplications"] == multiplications(base, base.input_shape)
        assert card["multiplications"] <= SHARE * card["base_multiplications"]


# Scores.


@pytest.mark.parametrize("name", [name for name in list_models() if name not in RIGHT])
def test_the_shipped_weights_score_what_is_claimed(name):
    data_of(load_model(name), limit=1)
    result = evaluate_model(name, None if RECIPES[name].data == "digits" else SHARED_DATA)
    claimed = model_card(name)["score"]
    assert result.total == claimed["total"]
    assert result.accuracy >= WANTED[name][0]
    # Stored in half precision: a borderline image or two may fall to the other side.
    assert abs(result.correct - claimed["correct"]) <= 0.002 * result.total


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_the_shipped_weights_label_the_first_images_as_they_did(name):
    model = load_model(name)
    classify = eqx.filter_jit(lambda model, images: model(model.preprocess(images)))
    result = score(lambda images: classify(model, images), data_of(model, limit=1000))
    assert result.total == 1000
    assert abs(result.correct - RIGHT[name]) <= 2
    claimed = model_card(name)["score"]["accuracy"]
    assert abs(result.accuracy - claimed) <= 4 * np.sqrt(claimed * (1 - claimed) / 1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shipped", [each for each in NAMES if each[0] != "model"], ids=id_of, indirect=True
)
def test_students_and_parity_models_score_as_is_claimed(shipped):
    base, model = load_model(shipped.base), shipped.model
    data = data_of(base, limit=500 if shipped.kind == "student" else 1000)
    if shipped.kind == "student":
        found = score_student(base, model, np.asarray(base.preprocess(data.images)))
        shares, errors = ("agreement", "mixed_agreement"), ("relative_mse", "mixed_relative_mse")
    else:
        found = score_parity(model, data, base_outputs(base, data, model.outputs))
        shares, errors = ("accuracy", "agreement"), ("relative_mse",)
    claimed = shipped.card["score"]
    # A share of the test images: within four standard errors of what all of them gave.
    for metric in shares:
        error = np.sqrt(claimed[metric] * (1 - claimed[metric]) / found.total)
        assert abs(getattr(found, metric) - claimed[metric]) <= 4 * error
    for metric in errors:
        tolerance = 0.4 if shipped.kind == "student" else 0.3
        np.testing.assert_allclose(getattr(found, metric), claimed[metric], rtol=tolerance)


# Files that are not as they were.


def test_damaged_weights_are_refused_by_name(tmp_path):
    path, random = tmp_path / "s.safetensors", np.random.default_rng(0)
    card = (WEIGHTS_DIR / "lenet5-digits-student.json").read_text()
    whole = (WEIGHTS_DIR / "lenet5-digits-student.safetensors").read_bytes()
    (tmp_path / "s.json").write_text(card)
    for case in range(40):
        place, bit = int(random.integers(len(whole))), 1 << int(random.integers(8))
        rest = bytes([whole[place] ^ bit]) + whole[place + 1 :] if case % 4 else b""
        path.write_bytes(whole[:place] + rest)
        with pytest.raises(ValueError, match=r"s\.safetensors is damaged.*; restore"):
            load_student_file(path)
    path.write_bytes(whole)
    load_student_file(path)
    (tmp_path / "s.json").write_text(card[:100])
    with pytest.raises(ValueError, match=r"s\.json is no card: .*; restore"):
        load_student_file(path)


def test_unknown_names_list_what_exists(tmp_path):
    for ask in (load_model, model_card, evaluate_model):
        with pytest.raises(ValueError, match=r"no model 'lenet'.*Known: lenet5-digits"):
            ask("lenet")
    with pytest.raises(ValueError, match="Known: none"):
        load_model("lenet5-digits", weights_dir=tmp_path)


def test_weights_survive_the_file_and_misfits_are_named(tmp_path):
    state = nnx.state(LeNet5(rngs=nnx.Rngs(0)))
    save_weights(tmp_path / "w.safetensors", state, np.float32)
    for name, array in named_arrays(load_weights(tmp_path / "w.safetensors", state)).items():
        np.testing.assert_array_equal(array, named_arrays(state)[name])
    arrays = named_arrays(state)
    arrays["fc9.bias"] = arrays.pop("fc3.bias")
    arrays["fc2.bias"] = np.zeros(3)
    expected = r"fc2.bias has shape \(3,\), the model wants \(84,\).*missing: fc3.bias.*fc9.bias"
    with pytest.raises(ValueError, match=expected):
        with_arrays(state, arrays)


def test_values_beyond_half_precision_are_refused(tmp_path):
    model = LeNet5(rngs=nnx.Rngs(0))
    model.fc3.bias[...] = jnp.full(10, 1e6)
    with pytest.raises(ValueError, match=r"fc3\.bias holds a value that is not finite as float16"):
        save_weights(tmp_path / "w.safetensors", nnx.state(model))


def test_scores_count_every_image_once(tmp_path):
    data = load_data("digits", limit=7)

    def classify(images):
        assert images.shape[0] == 4
        return jnp.full((4, 10), -1.0).at[:, int(data.labels[0])].set(1.0)

    result = score(classify, data, batch_size=4)
    assert result.total == 7
    assert result.correct == int(np.sum(data.labels == data.labels[0]))
    with pytest.raises(ValueError, match="is empty"):
        score(classify, data.take(slice(0)))
