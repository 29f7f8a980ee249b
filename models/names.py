"""The shipped models' names and cards: all that needs no import of JAX."""

import json
from pathlib import Path
from typing import Any

WEIGHTS_DIR = Path(__file__).parent / "weights"
HUB = "hf:"  # prefix of names on Hugging Face's hub

# As `RECIPES` has them.
TRAINED = ("lenet5-digits", "lenet5-mnist", "repvgg-cifar10", "vit-cifar10")


def list_models(weights_dir: str | Path = WEIGHTS_DIR) -> tuple[str, ...]:
    """Return the names that `load_model` knows: the recipes whose weights are in `weights_dir`."""
    folder = Path(weights_dir)
    return tuple(name for name in TRAINED if (folder / f"{name}.safetensors").is_file())


def model_card(name: str, *, weights_dir: str | Path = WEIGHTS_DIR) -> dict[str, Any]:
    """Return the card of a shipped model: its making, its data, its score."""
    check_model_name(name, weights_dir)
    return read_card(name, weights_dir)


def read_card(file: str, weights_dir: str | Path) -> dict[str, Any]:
    """Return the JSON that belongs to a file of weights; raise ValueError if it is damaged."""
    path = Path(weights_dir) / f"{file}.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path} is no card: {error}; restore it from a copy") from error


def check_model_name(name: str, weights_dir: str | Path = WEIGHTS_DIR) -> None:
    """Raise ValueError, listing what exists, for a name that `load_model` does not know."""
    known = list_models(weights_dir)
    if name not in known:
        raise ValueError(
            f"There is no model {name!r} in {Path(weights_dir).resolve()}. "
            f"Known: {', '.join(known) or 'none'}."
        )
