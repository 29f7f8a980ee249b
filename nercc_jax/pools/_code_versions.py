"""Checksums of what workers run: one that has other code or weights is refused before it answers.

A worker in another process gets its weights from the pool, but it imports code from where it runs,
which may be of another version. The workers of a `DevicePool` share the pool's own objects. Code
stays what it was when it was imported. Weights may change in memory: workers are asked for them.
"""

import hashlib
import platform
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

WEIGHTS = -1  # in place of the number of a worker's model: asks for its `weights_checksum`


def code_versions(modules: Iterable[str]) -> dict[str, str]:
    """Return a checksum of the source file of each module that is imported from one."""
    found = {}
    for name in sorted(modules):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if path.suffix == ".py" and path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """Return a checksum of contiguous arrays, which shows accidental changes."""
    found = 0
    for each in arrays:
        found = zlib.crc32(each.data, found)
    return found


def weights_checksum(models: PyTree) -> int:
    """Return a checksum of the JAX arrays of models, wherever they lie."""
    arrays = jax.tree.leaves(eqx.filter(models, eqx.is_array))
    plain = (each for each in arrays if not jnp.issubdtype(each.dtype, jax.dtypes.extended))
    return checksum(np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in plain)


def check_versions(wanted: Mapping[str, str]) -> None:
    """Raise RuntimeError if a module's source has another checksum here than where the pool is."""
    here = code_versions(wanted)
    other = [name for name in here if here[name] != wanted[name]]
    if other:
        raise RuntimeError(
            f"a worker on {platform.node()} has other code than the pool: {', '.join(other)}. "
            "Install the same version there, or send it along: --working-dir FOLDER or "
            "--py-modules FOLDER of `nercc`, runtime_env={'working_dir': FOLDER} of RayPool"
        )
