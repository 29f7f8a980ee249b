"""Models by name, as every command takes them, and their data."""

import builtins
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from nercc_jax.cli import Options
from nercc_models import (
    Data,
    HubModel,
    TorchModel,
    example_inputs,
    find_callable,
    find_model,
    hub_file,
    list_data,
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


# -- Loading data ----------------------------------------------------------------------------------


def tiny(count: int = 7) -> Data:
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2, 1)
    return Data(images, np.arange(count, dtype=np.int32), ("a", "b"), "tiny")


def test_digits_are_what_scikit_learn_has_in_two_splits_by_a_seed():
    from sklearn.datasets import load_digits

    def rows(data):
        return {image.tobytes() for image in data.images}

    train, test = splits = load_data("digits", "train"), load_data("digits", "test")
    whole = np.bincount(np.concatenate([data.labels for data in splits]))
    for data, count in zip(splits, (1347, 450), strict=True):
        assert data.images.shape == (count, 8, 8, 1)
        assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int32)
        assert data.images.max() == 16
        assert data.classes == tuple("0123456789")
        # Stratified: each of the ten classes has its share, to within one image in fifty.
        shares = np.bincount(data.labels) / count
        np.testing.assert_allclose(shares, whole / whole.sum(), atol=0.02)
    everything = load_digits().images.astype(np.uint8)[..., None]
    assert rows(train) | rows(test) == {image.tobytes() for image in everything}
    assert not rows(train) & rows(test)
    np.testing.assert_array_equal(test.images, load_data("digits", "test").images)
    assert not np.array_equal(test.labels, load_data("digits", "test", seed=1).labels)
    sized = load_data("digits", size=(16, 12), limit=5)
    assert (sized.images.shape, sized.images.dtype) == ((5, 16, 12, 1), np.uint8)
    assert sized.images.max() <= 16


def test_shuffling_depends_on_the_seed_alone_and_keeps_images_with_labels():
    once, again, other = (tiny().shuffled(seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(once.labels, again.labels)
    assert not np.array_equal(once.labels, other.labels)
    np.testing.assert_array_equal(once.images[:, 0, 0, 0] // 4, once.labels)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 1]), (True, [3, 3])])
def test_batches_cover_the_data_in_order(drop_last, sizes):
    batches = list(tiny().batches(3, drop_last=drop_last))
    assert [len(batch) for batch in batches] == sizes
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(sum(sizes)))
    with pytest.raises(ValueError, match="size=0 was given"):
        list(tiny().batches(0))


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("cifar", "test", {}, "Unknown data set 'cifar'.*" + ".*".join(list_data())),
        *(
            (name, "dev", {}, r"no split 'dev'; it has: .*test")
            for name in ("digits", "mnist", "imagenet1k-sample")
        ),
        ("digits", "test", {"limit": 0}, "`limit` must be at least 1; 0 was given"),
        ("imagefolder", "test", {"data_dir": None}, "give data_dir"),
    ],
)
def test_what_there_is_not_is_refused(name, split, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_data(name, split, **{"data_dir": tmp_path} | options)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet1k-sample"])
def test_a_missing_folder_names_every_place_searched(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No data set '{name}' was found") as caught:
        load_data(name, data_dir=tmp_path / name)
    message = str(caught.value)
    stem = "validation" if name == "imagenet1k-sample" else "test"
    for folder in (tmp_path / name / name, tmp_path / name / name / "data", tmp_path / name):
        assert f"{folder}/{stem}*.parquet" in message
    assert ("hf download" in message) == (name != "imagenet1k-sample")
    if name == "imagenet1k-sample":
        with pytest.raises(FileNotFoundError, match=r"give data_dir=.*validation\*\.parquet"):
            load_data(name)


def test_an_unreachable_hub_is_reported_with_its_name(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'ylecun/mnist'.*no network.*data_dir"):
        load_data("mnist")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("digits", "sklearn", "demo"), ("mnist", "datasets", "data"), ("mnist", "PIL", "data")],
)
def test_a_missing_package_names_the_extra(monkeypatch, name, module, extra):
    real_import = builtins.__import__

    def without(wanted, *args, **options):
        if wanted.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        return real_import(wanted, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
        load_data(name)


def write_images(folder, sizes):
    for label, size in enumerate(sizes):
        (folder / f"class{label}").mkdir(parents=True)
        pixels = np.full((*size, 3), 50 * label, np.uint8)
        Image.fromarray(pixels).save(folder / f"class{label}" / "image.png")


def test_an_image_folder(tmp_path):
    """Without splits and with them, with images of several sizes, not there, and empty."""
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        load_data("imagefolder", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No labelled images were found"):
        load_data("imagefolder", data_dir=tmp_path)
    plain, split = tmp_path / "plain", tmp_path / "split"
    write_images(plain, [(8, 8), (8, 8)])
    data = load_data("imagefolder", data_dir=plain)
    assert data.images.shape == (2, 8, 8, 3)
    assert data.classes == ("class0", "class1")
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], 50 * data.labels)
    write_images(split / "train", [(8, 8), (8, 8), (8, 8)])
    write_images(split / "test", [(8, 8), (16, 12), (20, 10)])
    assert len(load_data("imagefolder", "train", data_dir=split)) == 3
    with pytest.raises(ValueError, match=r"differ in size.*give size=\(height, width\)"):
        load_data("imagefolder", "test", data_dir=split)
    data = load_data("imagefolder", "test", data_dir=split, size=(6, 4))
    assert data.images.shape == (3, 6, 4, 3)


def test_the_hubs_parquet_layout_is_read_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((28, 28), value, np.uint8)) for value in (0, 200)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "label": [3, 5]}, features=features)
    (tmp_path / "mnist" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "mnist" / "data" / "test-00000-of-00001.parquet")
    data = load_data("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], [0, 200])
    np.testing.assert_array_equal(data.labels, [3, 5])
