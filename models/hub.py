"""Models of Hugging Face's hub by name: timm's architectures, in JAX where we have them."""

import json
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .hub_files import hub_file
from .pretrained import PRETRAINED_NAMES, Preprocessing, load_pretrained


class HubModel(eqx.Module):
    """`model(images)` are logits of a batch (B, *input_shape), as `preprocess` makes it of images.

    A pytree whose leaves are the model's arrays, as `ReadyModel`.
    """

    state: nnx.State
    graphdef: Any = eqx.field(static=True)
    input_shape: tuple[int, ...] = eqx.field(static=True)
    preprocess: Callable[..., Array] = eqx.field(static=True)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Return logits."""
        model: Any = nnx.merge(self.graphdef, self.state)
        return model(images)


class TorchModel:
    """A PyTorch module on images as functions of JAX see it: run by PyTorch, without gradients.

    `module` maps (B, channels, height, width) to (B, classes); `input_shape` has its channels last.
    """

    def __init__(
        self,
        module: Any,
        classes: int,
        input_shape: tuple[int, ...],
        preprocess: Callable[..., Array],
    ):
        self._module, self._classes = module.eval(), classes
        self.input_shape, self.preprocess = input_shape, preprocess

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Return logits."""
        answer = jax.ShapeDtypeStruct((len(images), self._classes), np.float32)
        return jax.pure_callback(self._run, answer, images, vmap_method="sequential")

    def _run(self, images: Any) -> np.ndarray:
        import torch  # pyright: ignore[reportMissingImports]

        channels_first = np.ascontiguousarray(np.moveaxis(np.asarray(images, np.float32), -1, 1))
        with torch.inference_mode():
            return self._module(torch.from_numpy(channels_first)).float().numpy()


def load_hub_model(repository: str) -> HubModel | TorchModel:
    """Load a model of Hugging Face's hub by its name `owner/name`; it must be one of timm's.

    Architectures of `PRETRAINED_NAMES` become JAX's, and have gradients; all others are run by
    PyTorch, which the extra `torch` brings.

    Raises:
        ImportError: An extra is missing; the message names it.
        ValueError: There is no such model, its files cannot be had, or it is none of timm's.

    Example:
        `model = load_hub_model("timm/repvgg_a0.rvgg_in1k"); model(model.preprocess(images))`
    """
    config = json.loads(hub_file(repository, "config.json").read_text())
    architecture = config.get("architecture")
    if architecture is None:
        raise ValueError(
            f"{repository!r} of Hugging Face's hub is no model of timm's: its config.json names no "
            "architecture. Load it in a module of your own, and give that its file"
        )
    if architecture in PRETRAINED_NAMES:
        weights = hub_file(repository, "model.safetensors")
        found = load_pretrained(architecture, weights, deploy=architecture.startswith("repvgg"))
        graphdef, state = nnx.split(found.model)
        return HubModel(state, graphdef, (224, 224, 3), found.preprocess)
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"{architecture}, of {repository!r}, runs in PyTorch: pip install '.[torch]' in a clone"
        ) from error
    module = timm.create_model(f"hf_hub:{repository}", pretrained=True)
    from timm.data.config import resolve_model_data_config  # pyright: ignore[reportMissingImports]

    return _of_timm(module, resolve_model_data_config(module))


def _of_timm(module: Any, summary: dict[str, Any]) -> TorchModel:
    """Return the preprocessing that timm's configuration states."""
    channels, height, width = summary["input_size"]
    kind = {"bilinear": "linear", "bicubic": "cubic"}[summary["interpolation"]]
    preprocess = Preprocessing(height, summary["crop_pct"], kind, summary["mean"], summary["std"])  # pyright: ignore[reportArgumentType]
    return TorchModel(module, module.num_classes, (height, width, channels), preprocess)
