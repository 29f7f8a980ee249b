"""The results of a training run: weights in half precision, and a card."""

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from .weights import num_parameters, save_weights

# Who made the data that models are trained on, and on which terms, as far as is known.
DATA_TERMS = {
    "digits": "scikit-learn's copy of the test part of Optical Recognition of Handwritten Digits, "
    "E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998; CC BY 4.0",
    "mnist": "MNIST, Yann LeCun, Corinna Cortes and Christopher J.C. Burges; distributors name "
    "different terms, such as CC BY-SA 3.0, or none",
    "cifar10": "CIFAR-10, Alex Krizhevsky, Vinod Nair and Geoffrey Hinton, University of Toronto, "
    "2009; no explicit licence",
}


def store(folder: str | Path, name: str, state: nnx.State) -> dict[str, Any]:
    """Write `<name>.safetensors`, and return what the card says about the file."""
    path = Path(folder) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    size = save_weights(path, state, np.float16)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "num_parameters": num_parameters(state),
        "bytes": size,
        "sha256": digest,
        "precision": "float16",
    }


def write_card(folder: str | Path, card: dict[str, Any]) -> None:
    """Write the card as `<name>.json`; the name is in it. Known data's terms come with it."""
    path, data = Path(folder) / f"{card['name']}.json", card.get("data")
    terms = {"data_terms": DATA_TERMS[data]} if data in DATA_TERMS else {}
    path.write_text(json.dumps({"name": card["name"]} | terms | card, indent=1) + "\n")


def made_on() -> str:
    """Return the machine and the JAX that run this."""
    kind = jax.devices()[0].device_kind
    return f"{platform.machine()}, {os.cpu_count()} cores, {kind}, jax {jax.__version__}"
