"""The results of a training run: weights in half precision, and a card."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from .weights import num_parameters, save_weights


def store(folder: str | Path, name: str, state: nnx.State) -> dict[str, Any]:
    """Write `<name>.safetensors`, and return what the card says about the file."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    size = save_weights(Path(folder) / f"{name}.safetensors", state, np.float16)
    return {"num_parameters": num_parameters(state), "bytes": size, "precision": "float16"}


def write_card(folder: str | Path, card: dict[str, Any]) -> None:
    """Write the card as `<name>.json`; the name is in it."""
    path = Path(folder) / f"{card['name']}.json"
    path.write_text(json.dumps(card, indent=1) + "\n")


def made_on() -> str:
    """Return the machine and the JAX that run this."""
    kind = jax.devices()[0].device_kind
    return f"{platform.machine()}, {os.cpu_count()} cores, {kind}, jax {jax.__version__}"
