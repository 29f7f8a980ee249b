"""The cache file of a shipped model's calibration, named after all that it depends on."""

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from ..codes import AbstractCode
from ..codes._kept import x64_enabled
from ..inference._conditions import current_conditions
from ..serving._settings import ModelSettings

# Packages whose every line may matter, and those whose version does.
_SOURCES = ("nercc_jax", "nercc_models")
_VERSIONS = ("jax", "jaxlib", "numpy", "flax", "scikit-learn")


def calibration_file(settings: ModelSettings, code: AbstractCode) -> Path | None:
    """Return the cache file, beside the compiled programs.

    None where those are not kept, and for a model of your own: its name does not say what it
    computes.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    assert settings.model is not None
    if not folder or "://" in folder or ":" in settings.model:
        return None
    digest = hashlib.sha256()
    for part in _parts(settings, code):
        digest.update(part)
    return Path(folder) / "calibrations" / f"{settings.model}-{digest.hexdigest()[:32]}.npz"


def _parts(settings: ModelSettings, code: AbstractCode) -> Iterator[bytes]:
    """Yield all that calibration depends on: the model, its code, how it runs, and our sources."""
    leaves, structure = jax.tree.flatten(code)
    conditions = current_conditions(settings.worker_dtype)
    yield repr((settings.outputs, conditions, x64_enabled(), structure)).encode()
    for leaf in leaves:
        yield np.asarray(leaf).tobytes()
    for package in _SOURCES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for folder in map(Path, spec.submodule_search_locations or ()):
            weights = folder.glob(f"weights/{settings.model}.*")
            for path in (*sorted(folder.rglob("*.py")), *sorted(weights)):
                yield path.read_bytes()
    for name in _VERSIONS:
        try:
            yield importlib.metadata.version(name).encode()
        except importlib.metadata.PackageNotFoundError:
            yield b"-"
