"""Models by name, as every command takes them, and their data."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_jax.cli import Options
from nercc_models import (
    HubModel,
    TorchModel,
    example_inputs,
    find_callable,
    find_model,
    hub_file,
    load_data,
    load_hub_model,
    load_model,
    load_pretrained,
)

OWN = """
import numpy as np

def double(x):
    return 2 * np.asarray(x)

def scaled(path):
    scale = np.load(path)
    return lambda x: scale * np.asarray(x)

def example_inputs():
    return np.ones((3, 2))

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder to work in, with a module."""
    (tmp_path / "own_found.py").write_text(OWN)
    (tmp_path / "own_raises.py").write_text("def example_inputs():\n    raise KeyError('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_found", raising=False)


def test_a_shipped_model_returns_logits_or_probabilities_and_has_its_data():
    model = load_model("lenet5-digits", outputs="probabilities")
    x, labels = model.images("test", None, 20, 1)
    data = load_data("digits", "test").shuffled(1)
    np.testing.assert_array_equal(labels, data.labels[:20])
    np.testing.assert_array_equal(x, model.preprocess(data.images[:20]))
    logits = find_model("lenet5-digits")(x)
    np.testing.assert_allclose(model(x), jax.nn.softmax(logits), rtol=1e-5)
    np.testing.assert_array_equal(find_model("lenet5-digits", outputs="probabilities")(x), model(x))


def test_a_model_of_ones_own_is_found_in_the_working_directory(own):
    assert find_model("own_found:double")([2.0]).tolist() == [4.0]
    np.save("three.npy", 3.0)
    assert find_model("own_found:scaled", "three.npy")([2.0]).tolist() == [6.0]
    shares = find_model("own_found:double", outputs="probabilities")(np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(shares, jax.nn.softmax(2 * np.eye(2)), rtol=1e-5)
    assert example_inputs("own_found:double").shape == (3, 2)


@pytest.mark.parametrize(
    ("find", "arguments", "message"),
    [
        (find_model, ("nothing",), "There is no model 'nothing'"),
        (find_model, ("lenet5-digits", "w.npy"), "weights are for a model of your own"),
        (find_callable, ("own_found",), "named module:function, not 'own_found'"),
        (find_callable, ("own_found:nothing",), "has no attribute 'nothing'"),
        (find_callable, ("own_found:number",), "is a int, not a callable"),
        (find_callable, ("own_found:scaled", "no.npy"), "own_found:scaled raises of no.npy File"),
        (find_callable, ("no_module:x",), "No module named 'no_module'"),
        (example_inputs, ("own_raises:x",), r"example_inputs\(\) raises KeyError: 'no'"),
    ],
)
def test_what_is_not_found_is_named(own, find, arguments, message):
    with pytest.raises(ValueError, match=message):
        find(*arguments)


# -- Models of a hub -------------------------------------------------------------------------------

COMMIT = "0" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Gives the folder of a repository in a cache, offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def repository(name):
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        return folder / "snapshots" / COMMIT

    return repository


@pytest.fixture
def of_timm(hub):
    """Saves an architecture of timm's with random weights as `owner/name`, and gives it."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")

    def save(architecture):
        torch.manual_seed(0)
        module = timm.create_model(architecture, num_classes=5).eval()
        timm.models.save_for_hf(module, hub("owner/name"), safe_serialization=True)
        return module

    return save


def test_an_architecture_of_ours_is_jaxs(of_timm):
    """With the arrays that `load_pretrained` reads, which answers as timm's do."""
    state = of_timm("vit_tiny_patch16_224").state_dict()
    model = find_model("hf:owner/name", None, "logits")
    assert isinstance(model, HubModel)
    expected = nnx.state(load_pretrained("vit_tiny_patch16_224", state).model)
    jax.tree.map(np.testing.assert_array_equal, model.state, expected)
    images = jax.ShapeDtypeStruct((2, 300, 260, 3), np.uint8)
    answer = jax.eval_shape(lambda x: model(model.preprocess(x)), images)
    assert (model.input_shape, answer.shape) == ((224, 224, 3), (2, 5))


def test_other_architectures_are_pytorchs(of_timm):
    torch, original = pytest.importorskip("torch"), of_timm("test_resnet")
    model = find_model("hf:owner/name", None, "logits")
    assert isinstance(model, TorchModel)
    assert model.input_shape == (160, 160, 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 200, 180, 3), np.uint8)
    batch = model.preprocess(images)
    expected = original(torch.from_numpy(np.array(batch).transpose(0, 3, 1, 2))).detach().numpy()
    found = jax.jit(lambda x: model(x))(batch)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_weights_by_name_are_given_as_a_path(hub, tmp_path, monkeypatch):
    (hub("owner/net") / "net.npy").write_bytes(b"")
    (tmp_path / "hub_own.py").write_text("def load(path):\n    return lambda x: x + len(path.name)")
    monkeypatch.chdir(tmp_path)
    model = find_callable("hub_own:load", Path("hf:owner/net/net.npy"))
    assert model(1) == 1 + len("net.npy")


def test_what_cannot_be_had_is_told(hub):
    with pytest.raises(ValueError, match=r"config\.json of 'no/thing' cannot be had"):
        load_hub_model("no/thing")
    folder = hub("owner/text")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="no model of timm's"):
        load_hub_model("owner/text")
    assert hub_file("owner/text", "config.json").read_text() == '{"model_type": "bert"}'
    for name in ("hf:owner", "hf:owner/name/file", "hf:/name"):
        with pytest.raises(ValueError, match="named hf:owner/name"):
            Options(name)


def test_pytorch_behind_jax_may_be_mapped():
    """`jax.vmap` over groups, as codes do it."""
    torch = pytest.importorskip("torch")
    model = TorchModel(torch.nn.Flatten(), 12, (2, 2, 3), jnp.asarray)
    x = np.arange(48, dtype=np.float32).reshape(2, 2, 2, 2, 3)
    found = jax.vmap(lambda group: model(group))(x)
    np.testing.assert_array_equal(found, np.moveaxis(x, -1, 2).reshape(2, 2, 12))
