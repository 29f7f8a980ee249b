"""Models of Hugging Face's hub by name, from a cache of the hub's in a folder: no network."""

import json
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
    find_callable,
    find_model,
    hub_file,
    load_hub_model,
    load_pretrained,
)

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
