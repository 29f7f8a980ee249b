"""Weights that were trained in PyTorch: timm's RepVGG and ViT, and a plain LeNet5.

`load_pretrained` takes a file, safetensors or PyTorch's own, and returns the model with the
preprocessing that it expects. Our arrays and PyTorch's correspond one to one: `load_state_dict`
renames and transposes them, and refuses a file that does not fit exactly.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from .lenet5 import LeNet5, preprocess_mnist
from .repvgg import RepVGG, reparameterize, repvgg
from .vit import ViT, vit_base_patch16_224, vit_small_patch16_224, vit_tiny_patch16_224
from .weights import with_arrays

StateDict: TypeAlias = Mapping[str, Any]
ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """timm's evaluation transform for a batch: resize, cut out the centre, normalise.

    The shorter side becomes `floor(size / crop)` pixels (antialiased), the central `size` x `size`
    pixels are kept, and grey levels 0 to 255 become `(level / 255 - mean) / std` per channel.
    Equal to timm's own, but for the level here and there that is rounded the other way.
    """

    size: int
    crop: float
    interpolation: Literal["linear", "cubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(
        self, images: Real[Array, "batch height width 3"] | Real[np.ndarray, "batch height width 3"]
    ) -> Float[Array, "batch size size 3"]:
        """Turn images of grey levels 0 to 255, of any size, into the model's inputs."""
        levels = jnp.asarray(images, jnp.float32)
        levels = _center_crop(self._resize(levels), self.size)
        return (levels / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def _resize(self, levels: Array) -> Array:
        batch, height, width, channels = levels.shape
        target, shorter = math.floor(self.size / self.crop), min(height, width)
        if shorter == target:
            return levels
        height_after, width_after = target * height // shorter, target * width // shorter
        # As Pillow does: rows first, then columns, each rounded to whole levels and cut off where
        # the cubic kernel overshoots. One pass without these is off by six levels at sharp edges.
        for shape in (
            (batch, height, width_after, channels),
            (batch, height_after, width_after, channels),
        ):
            levels = jax.image.resize(levels, shape, self.interpolation, antialias=True)
            levels = jnp.clip(jnp.round(levels), 0, 255)
        return levels


def _center_crop(images: Array, size: int) -> Array:
    top, left = ((side - size) / 2 for side in images.shape[1:3])
    top, left = round(top), round(left)
    return images[:, top : top + size, left : left + size]


_IMAGENET = Preprocessing(
    224, crop=0.875, interpolation="linear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
_AUGREG = Preprocessing(
    224, crop=0.9, interpolation="cubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A model whose weights can be loaded: how it is built, and what its images go through."""

    build: Callable[..., nnx.Module]
    preprocess: Callable[..., Array]
    options: tuple[tuple[str, Any], ...] = ()


_ENTRIES = {
    "lenet5": _Entry(LeNet5, preprocess_mnist),
    **{
        f"repvgg_{size}": _Entry(repvgg, _IMAGENET, (("size", size),))
        for size in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")
    },
    "vit_tiny_patch16_224": _Entry(vit_tiny_patch16_224, _AUGREG),
    "vit_small_patch16_224": _Entry(vit_small_patch16_224, _AUGREG),
    "vit_base_patch16_224": _Entry(vit_base_patch16_224, _AUGREG),
}

PRETRAINED_NAMES: tuple[str, ...] = tuple(_ENTRIES)


class Pretrained(NamedTuple):
    """`model(preprocess(images))` are logits (B, num_classes) of images with levels 0 to 255."""

    model: Any
    preprocess: Callable[..., Array]


def load_pretrained(
    name: str, weights: str | Path | StateDict, *, deploy: bool = False
) -> Pretrained:
    """Load a model with weights that were trained in PyTorch, in evaluation mode.

    Args:
        name: One of `PRETRAINED_NAMES`, which are timm's names, and `lenet5`.
        weights: A file for `read_state_dict`, or the state dict itself. timm's own are
            `model.safetensors` of the hub's `timm/repvgg_a0.rvgg_in1k` and so on; a fine-tuned
            model's may have any number of classes.
        deploy: Fold a RepVGG in training form. A file in deploy form gives a deployed model anyway.

    Raises:
        ValueError: The name is unknown, `deploy` is for another family, or weights do not fit.
        ImportError: The reader that the file needs is not installed.

    Example:
        `model, preprocess = load_pretrained("repvgg_a0", "model.safetensors", deploy=True)`
    """
    if name not in _ENTRIES:
        raise ValueError(f"Unknown model {name!r}. Known: {', '.join(_ENTRIES)}.")
    entry = _ENTRIES[name]
    state = weights if isinstance(weights, Mapping) else read_state_dict(weights)
    options: dict[str, Any] = dict(entry.options)
    head = next((state[key] for key in _HEAD_BIASES if key in state), None)
    if head is not None:
        options["num_classes"] = len(head)
    if entry.build is repvgg:
        options["deploy"] = any("reparam_conv" in key for key in state)
    elif deploy:
        raise ValueError(f"deploy=True folds a RepVGG; {name!r} has one form only.")
    # Abstract, so that no initial weights are drawn only to be thrown away.
    blank = nnx.eval_shape(lambda: entry.build(rngs=nnx.Rngs(0), **options))
    model: Any = load_state_dict(blank, state)
    model.eval()
    if deploy and not options["deploy"]:
        model = reparameterize(model)
    return Pretrained(model, entry.preprocess)


_HEAD_BIASES = ("head.fc.bias", "head.bias", "fc3.bias")


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name.

    `.safetensors` is read without PyTorch. Anything else is taken for a file of `torch.save`: a
    state dict, or a checkpoint with one under `state_dict` or `model`; it is read with
    `weights_only=True`, so it cannot run code.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: safetensors or PyTorch is missing; the message names the extra.
        ValueError: The file holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at {path.resolve()}.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"Reading {path.name} needs safetensors: pip install '.[demo]' in a clone."
        ) from error
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"Reading {path.name} needs PyTorch: pip install '.[torch]' in a clone; "
            "a .safetensors file is read without it."
        ) from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} holds no state dict: it must map names to tensors.")
    # NumPy has no bfloat16, and every model here computes in float32.
    return {key: value.detach().float().numpy() for key, value in state.items()}


def load_state_dict(model: ModelT, state_dict: StateDict) -> ModelT:
    """Return `model` with the arrays of a PyTorch state dict of the same architecture.

    Args:
        model: A `LeNet5`, `RepVGG` (either form) or `ViT` of any size; may be abstract
            (`nnx.eval_shape`). It is left as it is.
        state_dict: Arrays by PyTorch's names: timm's for RepVGG and ViT, `conv1` to `fc3` for
            LeNet5. Batch norms' `num_batches_tracked`, of no use in inference, is passed over.

    Returns:
        A model of the same class and form, in the types of `model`.

    Raises:
        ValueError: Arrays are missing, unexpected or wrongly shaped; the message names them all.
        TypeError: The model is of another class.
    """
    graphdef, blank = nnx.split(model)
    arrays = {
        key: value
        for key, value in state_dict.items()
        if key.rpartition(".")[2] != "num_batches_tracked"
    }
    slots = _slots(model, blank)
    _check_fit(slots, arrays)
    ours = {slot.name: slot.convert(np.asarray(arrays[slot.key])) for slot in slots}
    return nnx.merge(graphdef, with_arrays(blank, ours))


class _Slot(NamedTuple):
    """One of our arrays by its dotted `name`, and PyTorch's: its `key`, `shape`, and conversion."""

    name: str
    key: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


_LEAF_KEYS = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_REPVGG_KEYS = {
    "conv3x3": "conv_kxk.conv",
    "bn3x3": "conv_kxk.bn",
    "conv1x1": "conv_1x1.conv",
    "bn1x1": "conv_1x1.bn",
    "bn_identity": "identity",
    "conv": "reparam_conv",
    "head": "head.fc",
}
_VIT_KEYS = {
    "patch_embedding": "patch_embed",
    "projection": "proj",
    "attention": "attn",
    "class_token": "cls_token",
    "position_embedding": "pos_embed",
}


def _slots(model: nnx.Module, state: nnx.State) -> list[_Slot]:
    keys, special = _family(model)
    slots = []
    for path, variable in nnx.to_flat_state(state):
        parts = [str(part) for part in path]
        name = ".".join(parts)
        key = ".".join((_LEAF_KEYS | keys).get(part, part) for part in parts)
        shape, convert = special.get(name) or _layout(parts[-1], tuple(variable.shape))
        slots.append(_Slot(name, key, shape, convert))
    return slots


def _family(model: nnx.Module) -> tuple[dict[str, str], dict[str, Any]]:
    """Return a family's names in PyTorch, and the layouts of its arrays that are exceptions."""
    if isinstance(model, RepVGG):
        return _REPVGG_KEYS, {}
    if isinstance(model, ViT):
        # timm calls the final norm by where it stands: before the pooling, or after.
        keys = _VIT_KEYS | ({"norm": "fc_norm"} if model.pooling == "mean" else {})
        return keys, {"patch_embedding.projection.kernel": _patch_layout(model)}
    if isinstance(model, LeNet5):
        return {}, {"fc1.kernel": _flattened_layout((16, 5, 5), 120)}
    raise TypeError(f"load_state_dict takes a LeNet5, RepVGG or ViT; got a {type(model).__name__}.")


def _layout(leaf: str, ours: tuple[int, ...]) -> tuple[tuple[int, ...], Callable]:
    """Return PyTorch's shape of one of our arrays, and the way back.

    Kernels are (out, in, rows, columns) there.
    """
    if leaf == "kernel" and len(ours) == 4:
        rows, columns, inputs, outputs = ours
        return (outputs, inputs, rows, columns), lambda kernel: kernel.transpose(2, 3, 1, 0)
    if leaf == "kernel":
        return ours[::-1], np.transpose
    return ours, lambda array: array


def _patch_layout(model: ViT) -> tuple[tuple[int, ...], Callable]:
    """Return the layout of the patches' embedding.

    timm embeds patches by a strided convolution, we by a product: rows, columns, channels.
    """
    size, width = model.patch_embedding.patch_size, model.patch_embedding.projection.out_features
    shape = (width, model.channels, size, size)
    return shape, lambda kernel: kernel.transpose(2, 3, 1, 0).reshape(-1, width)


def _flattened_layout(image: tuple[int, int, int], width: int) -> tuple[tuple[int, ...], Callable]:
    """Return the layout of a linear layer on a flattened image, channels first there, last here."""
    return (
        width,
        math.prod(image),
    ), lambda weight: weight.reshape(width, *image).transpose(2, 3, 1, 0).reshape(-1, width)


def _check_fit(slots: list[_Slot], arrays: StateDict) -> None:
    expected = {slot.key: slot.shape for slot in slots}
    missing = [key for key in expected if key not in arrays]
    unexpected = [key for key in arrays if key not in expected]
    misshapen = [
        f"{key} (is {np.shape(arrays[key])}, should be {shape})"
        for key, shape in expected.items()
        if key in arrays and np.shape(arrays[key]) != shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    problems = [f"{kind}: {', '.join(keys)}" for kind, keys in found.items() if keys]
    if problems:
        raise ValueError("The state dict does not fit the model; " + "; ".join(problems) + ".")
