"""Weights from PyTorch: logits equal timm's, and files that do not fit are refused by name."""

import collections
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from flax import nnx

from nercc_models.data import load_data
from nercc_models.lenet5 import LeNet5
from nercc_models.pretrained import (
    _ENTRIES,
    PRETRAINED_NAMES,
    _slots,
    load_pretrained,
    load_state_dict,
    read_state_dict,
)
from nercc_models.vit import Attention, ViT

DATA_DIR = Path(__file__).parents[3] / "shared" / "data"
# One of each kind is computed; the others are the same classes in other sizes.
COMPUTED = ("repvgg_a0", "vit_tiny_patch16_224")
# Of the largest logit, in float32, where rounding makes 1e-6. The issue asks for 1e-4: that is near
# to what the approximate GELU makes (1e-4), and more than LayerNorm with epsilon 1e-5 (1e-5).
TOLERANCE = 5e-6


def some_images():
    """Four images (4, 256, 256, 3) of ImageNet; noise of that shape on a machine without them."""
    try:
        return load_data("imagenet1k-sample", "validation", data_dir=DATA_DIR, limit=4).images
    except (FileNotFoundError, ImportError):
        shape = (4, 256, 256, 3)
        return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def randomize(torch, model):
    """Norms, biases and running statistics as training leaves them: none 0, none 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif name.endswith("running_mean"):
                tensor.normal_(0.0, 0.3, generator=generator)
            elif name.endswith("bias") or "cls_token" in name or "pos_embed" in name:
                tensor.normal_(0.0, 0.2, generator=generator)
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.uniform_(0.3, 1.0, generator=generator)
            elif name.endswith(("attn.qkv.weight", "mlp.fc1.weight")):
                tensor.mul_(4.0)  # attention far from uniform, GELU far from linear


class Original(NamedTuple):
    """A model of PyTorch's by name, what it answers to some images, and where its weights are."""

    name: str
    module: object
    images: np.ndarray
    logits: np.ndarray
    folder: Path


def original_of(torch, name, module, images, folder=Path()):
    with torch.no_grad():
        logits = module(to_torch(torch, images)).numpy()
    return Original(name, module, np.asarray(images), logits, folder)


def to_torch(torch, images):
    return torch.from_numpy(np.ascontiguousarray(np.asarray(images).transpose(0, 3, 1, 2)))


def save_both(torch, module, folder):
    require("safetensors.torch", "torch").save_file(
        module.state_dict(), folder / "model.safetensors"
    )
    torch.save(module.state_dict(), folder / "model.pth")


@pytest.fixture(scope="module", params=COMPUTED)
def original(request, tmp_path_factory):
    torch, timm = require("torch", "torch"), require("timm", "torch")
    torch.manual_seed(0)
    module = timm.create_model(request.param).eval()
    randomize(torch, module)
    images = preprocessing_of(request.param)(some_images())
    folder = tmp_path_factory.mktemp(request.param)
    save_both(torch, module, folder)
    yield original_of(torch, request.param, module, images, folder)
    for path in folder.iterdir():
        path.unlink()


def preprocessing_of(name):
    return _ENTRIES[name].preprocess


def assert_same_logits(model, original, record_property):
    logits = np.asarray(nnx.jit(model)(jnp.asarray(original.images)))
    size = np.abs(original.logits).max()
    assert size > 0.1, "logits of this size would agree by accident"
    assert original.logits.std(axis=0).max() > 1e-3 * size, "the images make no difference"
    difference = float(np.abs(logits - original.logits).max() / size)
    record_property("largest relative difference", difference)
    print(f"{original.name}: largest difference {difference:.2e} of the largest logit {size:.3g}")
    assert difference < TOLERANCE


def num_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def arrays_of(model):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same_arrays(left, right):
    left, right = arrays_of(left), arrays_of(right)
    assert left.keys() == right.keys()
    for path, array in left.items():
        np.testing.assert_array_equal(array, right[path], err_msg=str(path))


@pytest.mark.slow
def test_logits_equal_timms(original, record_property):
    model, _ = load_pretrained(original.name, original.folder / "model.safetensors")
    assert num_parameters(model) == sum(p.numel() for p in original.module.parameters())
    assert_same_logits(model, original, record_property)
    from_torch, _ = load_pretrained(original.name, original.folder / "model.pth")
    assert_same_arrays(model, from_torch)


@pytest.mark.slow
@pytest.mark.parametrize("original", ["repvgg_a0"], indirect=True)
def test_folded_logits_equal_timms(original, record_property, tmp_path):
    model, _ = load_pretrained(original.name, original.folder / "model.safetensors", deploy=True)
    assert_same_logits(model, original, record_property)
    folded_by_timm = importlib.import_module("timm.utils").reparameterize_model(original.module)
    save_both(require("torch", "torch"), folded_by_timm, tmp_path)
    loaded, _ = load_pretrained(original.name, tmp_path / "model.safetensors")
    expected = sum(p.numel() for p in folded_by_timm.parameters())
    assert num_parameters(loaded) == num_parameters(model) == expected
    assert_same_logits(loaded, original, record_property)


def test_mean_pooling_equals_timms(record_property):
    torch, timm = require("torch", "torch"), require("timm", "torch")
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "depth": 2, "mlp_ratio": 2.0, "num_classes": 7}
    module = timm.models.VisionTransformer(
        img_size=32, embed_dim=48, num_heads=3, class_token=False, global_pool="avg", **sizes
    ).eval()
    randomize(torch, module)
    images = np.random.default_rng(0).standard_normal((10, 32, 32, 3), np.float32)
    blank = ViT(image_size=32, width=48, num_heads=3, pooling="mean", **sizes, rngs=nnx.Rngs(0))
    model = load_state_dict(blank, module.state_dict())
    assert num_parameters(model) == sum(p.numel() for p in module.parameters())
    assert_same_logits(model, original_of(torch, "mean", module, images), record_property)


def torch_lenet5(torch):
    """LeNet5 as PyTorch's tutorials write it, for MNIST's 28x28 images."""
    nn, pool = torch.nn, torch.nn.MaxPool2d(2)
    layers = {"conv1": nn.Conv2d(1, 6, 5, padding=2), "relu1": nn.ReLU(), "pool1": pool}
    layers |= {"conv2": nn.Conv2d(6, 16, 5), "relu2": nn.ReLU(), "pool2": pool}
    layers |= {"flat": nn.Flatten(), "fc1": nn.Linear(16 * 5 * 5, 120), "relu3": nn.ReLU()}
    layers |= {"fc2": nn.Linear(120, 84), "relu4": nn.ReLU(), "fc3": nn.Linear(84, 10)}
    return nn.Sequential(collections.OrderedDict(layers)).eval()


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_lenet5_equals_pytorchs(tmp_path, wrapper, record_property):
    torch = require("torch", "torch")
    torch.manual_seed(0)
    module = torch_lenet5(torch)
    state = module.state_dict()
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "lenet5.pth")
    digits = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), dtype=np.uint8)
    model, preprocess = load_pretrained("lenet5", tmp_path / "lenet5.pth")
    original = original_of(torch, "lenet5", module, digits.astype(np.float32) / 255)
    original = original._replace(images=np.asarray(preprocess(jnp.asarray(digits))))
    assert_same_logits(model, original, record_property)


@pytest.mark.parametrize("name", ["repvgg_a0", "vit_base_patch16_224"])
@pytest.mark.parametrize("size", [None, (300, 400), (401, 257)])
def test_preprocessing_is_timms(name, size):
    timm, torch = require("timm", "torch"), require("torch", "torch")
    image_module = require("PIL.Image", "torch")
    images = [image_module.fromarray(image) for image in some_images()[:3]]
    if size is not None:
        images = [image.resize(size[::-1], image_module.Resampling.BICUBIC) for image in images]
    config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**config)
    expected = torch.stack([transform(image) for image in images]).numpy().transpose(0, 2, 3, 1)
    got = preprocessing_of(name)(np.stack([np.asarray(image) for image in images]))
    assert got.shape == expected.shape == (3, 224, 224, 3)
    levels = np.abs(np.asarray(got) - expected) * np.asarray(config["std"]) * 255
    # Pillow computes in fixed point, so a tie may be rounded the other way in each of its passes.
    assert levels.max() < 2.001
    assert (levels > 0.01).mean() < 0.01


FEW = "repvgg_a2", "vit_small_patch16_224"  # the others are the same classes in other sizes
OTHERS = [name for name in PRETRAINED_NAMES if name not in ("lenet5", *FEW)]


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_every_size_has_timms_preprocessing_and_arrays(name):
    torch, timm = require("torch", "torch"), require("timm", "torch")
    config, preprocessing = timm.get_pretrained_cfg(name), preprocessing_of(name)
    assert config.input_size == (3, preprocessing.size, preprocessing.size)
    assert (config.mean, config.std) == (preprocessing.mean, preprocessing.std)
    assert (config.crop_pct, config.crop_mode) == (preprocessing.crop, "center")
    interpolation = {"linear": "bilinear", "cubic": "bicubic"}[preprocessing.interpolation]
    assert config.interpolation == interpolation
    with torch.device("meta"):  # shapes without numbers: repvgg_b3 has 123 million
        module = timm.create_model(name)
    entry = _ENTRIES[name]
    model = nnx.eval_shape(lambda: entry.build(rngs=nnx.Rngs(0), **dict(entry.options)))
    shapes = {
        key: tensor.shape
        for key, tensor in module.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    slots = _slots(model, nnx.state(model))
    assert {slot.key: slot.shape for slot in slots} == shapes
    assert num_parameters(model) == sum(p.numel() for p in module.parameters())
    # What no shape tells: into how many heads a token's numbers are cut.
    ours = [module.num_heads for _, module in nnx.iter_modules(model) if type(module) is Attention]
    assert ours == [block.attn.num_heads for block in getattr(module, "blocks", ())]


# What follows needs no PyTorch.

LENET5_SHAPES = {
    "conv1.weight": (6, 1, 5, 5),
    "conv1.bias": (6,),
    "conv2.weight": (16, 6, 5, 5),
    "conv2.bias": (16,),
    "fc1.weight": (120, 400),
    "fc1.bias": (120,),
    "fc2.weight": (84, 120),
    "fc2.bias": (84,),
    "fc3.weight": (10, 84),
    "fc3.bias": (10,),
}


def lenet5_arrays():
    random = np.random.default_rng(0)
    return {key: random.standard_normal(s, np.float32) for key, s in LENET5_SHAPES.items()}


def test_safetensors_are_read_without_pytorch(tmp_path, monkeypatch):
    arrays = lenet5_arrays()
    require("safetensors.numpy", "torch").save_file(arrays, tmp_path / "lenet5.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises from here on
    read = read_state_dict(tmp_path / "lenet5.safetensors")
    assert read.keys() == arrays.keys()
    model, _ = load_pretrained("lenet5", tmp_path / "lenet5.safetensors")
    kernel = np.asarray(model.conv2.kernel[...])
    np.testing.assert_array_equal(kernel[1, 2, 3, 4], arrays["conv2.weight"][4, 3, 1, 2])
    # PyTorch flattens (channel, row, column); here a pixel's channels lie together.
    fc1 = np.asarray(model.fc1.kernel[...])
    np.testing.assert_array_equal(
        fc1[(1 * 5 + 2) * 16 + 3], arrays["fc1.weight"][:, 3 * 25 + 1 * 5 + 2]
    )


def test_pytorchs_files_need_pytorch(tmp_path, monkeypatch):
    (tmp_path / "lenet5.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[torch\]'"):
        read_state_dict(tmp_path / "lenet5.pth")


def without(arrays):
    """A state dict with entries that miss, that are too much and that have another shape."""
    del arrays["conv1.bias"], arrays["fc2.weight"]
    arrays["fc4.weight"] = np.zeros(3, np.float32)
    return arrays | {"fc1.weight": np.zeros((120, 256), np.float32)}


MISFITS = r"does not fit.*missing: conv1.bias, fc2.weight;.*unexpected: fc4.weight;.*of the wrong "
MISFITS += r"shape: fc1.weight \(is \(120, 256\), should be \(120, 400\)\)\."


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda a: load_pretrained("resnet50", {}), "Unknown model 'resnet50'. Known: lenet5, rep"),
        (lambda a: load_pretrained("lenet5", a, deploy=True), "'lenet5' has one form only"),
        (lambda a: load_state_dict(LeNet5(rngs=nnx.Rngs(0)), without(a)), MISFITS),
        (lambda a: load_state_dict(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {}), "got a Linear"),
        (lambda a: read_state_dict("nowhere.safetensors"), "There are no weights at"),
        (lambda a: read_state_dict("text.safetensors"), "is not a readable safetensors file"),
        (lambda a: read_state_dict("list.pth"), "holds no state dict"),
    ],
)
def test_what_is_no_model_or_file_of_ours_is_refused(load, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require("safetensors", "torch")
    (tmp_path / "text.safetensors").write_text("these are no tensors at all")
    torch = require("torch", "torch")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        load(lenet5_arrays())
