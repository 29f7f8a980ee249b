"""A cache of matrices: a code's encoder, and its decoder for each straggler set.

Matrices depend on the code and on which workers answered, never on data. So if a code is known
before a program runs, its matrices are made beforehand and passed as arguments: the regression's
loops over knots would take a thousand launches on a GPU in each call, where the model takes twenty.
For the codes of this package (`AbstractNumpyCode`), NumPy makes them on the host and compiles
nothing, on whatever device the code lies. For other codes they are part of each program.
"""

import functools
import weakref
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from .trees import any_tracer


class Matrices(NamedTuple):
    """The decoder's matrix and what it recovers, for each group's straggler set, or for all's."""

    decoder: Float[Array | np.ndarray, "sets num_data num_workers"]
    recovered: Bool[Array | np.ndarray, "sets num_data"]


class CachedMatrices(eqx.Module):
    """A code's matrices that are known before a program runs; None if the program makes them."""

    encoder: Float[ArrayLike, "num_workers num_data"] | None = None
    decoders: Matrices | None = None


class KeptMatrices:
    """One code's matrices by NumPy; threads may share it.

    Attributes:
        most_bytes: The size of the cache: 4,096 decoders of (100, 20), or 340 of (100, 240).
        few_sets: A call of coded inference with more straggler sets than this makes its matrices
            within its program, all at once: one by one on the host they would take longer (0.3 ms
            each), and few are needed again.
        many_sets: With more sets than this, decoding compiles a program that makes the matrices:
            making this many on the host takes about as long as compiling it.
    """

    most_bytes = 1 << 25
    few_sets = 4
    many_sets = 4096

    def __init__(self, code: Any):
        # A copy: a reference to the code itself would keep the code, and so this entry, alive.
        arrays, rest = eqx.partition(code, eqx.is_array)
        self._code = eqx.combine(jax.tree.map(np.asarray, arrays), rest)
        # The dtype of the code's numbers, or JAX's default.
        floats = [a.dtype for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
        default = jax.dtypes.canonicalize_dtype(float)
        self._dtype = np.dtype(jnp.result_type(*floats) if floats else default)
        size = self._code.num_data * self._code.num_workers * self._dtype.itemsize
        # Safe to use from several threads, and it counts hits.
        self._made = functools.lru_cache(max(self.most_bytes // size, 1))(self._make)

    @functools.cached_property
    def encoder(self) -> Float[np.ndarray, "num_workers num_data"]:
        """The encoder's matrix."""
        return self.by_numpy("encoder_on_host").astype(self._dtype)

    def by_numpy(self, method: str, *args: Any) -> Any:
        """Return the result of a method of the code with its numbers as NumPy arrays, in float64.

        Methods are `encoder_on_host`, `decoder_on_host` and, if the code has it,
        `variances_on_host`. They are called unbound, since binding takes 0.1 ms.
        """
        with np.errstate(all="ignore"):  # infinite lambdas are valid
            return getattr(type(self._code), method)(self._code, *args)

    def decoders(self, available: ArrayLike, most: int = few_sets) -> Matrices | None:
        """Return the matrices for one mask, or for one mask a group: only one if all are the same.

        Returns None if there are more than `most` different masks, or if they are traced or not
        masks of the code's workers.
        """
        if isinstance(available, Tracer):
            return None
        masks = np.atleast_2d(np.asarray(available))
        if masks.dtype != bool or masks.shape[1:] != (self._code.num_workers,):
            return None
        names = [row.tobytes() for row in masks]
        if not 1 <= len(set(names)) <= most:
            return None
        found = {name: self._made(name) for name in dict.fromkeys(names)}
        if len(found) == 1:
            return found[names[0]]
        return Matrices(*map(np.concatenate, zip(*(found[name] for name in names), strict=True)))

    def _make(self, mask: bytes) -> Matrices:
        exact = self.by_numpy("decoder_on_host", np.frombuffer(mask, bool))[None]
        return Matrices(exact.astype(self._dtype), np.any(exact != 0, axis=2))


def known_matrices(code: Any, available: ArrayLike | None = None) -> CachedMatrices:
    """Return the encoder's matrix, and the decoder's for given masks, if the code is known."""
    if (kept := kept_matrices(code)) is None:
        return CachedMatrices()
    return CachedMatrices(kept.encoder, None if available is None else kept.decoders(available))


def encoder_of(code: Any) -> Any:
    """Return the encoder's matrix: by NumPy if the code is known, else as part of the program."""
    known = known_matrices(code).encoder
    made = code.encoder_matrix() if known is None else known
    return made if any_tracer(made) else np.asarray(made)


def copies_of(encoder: Float[np.ndarray, "rows num_data"]) -> Bool[np.ndarray, "rows num_data"]:
    """Return which coded data points equal which data points.

    The rows of a spline's encoder are one-hot only up to rounding.
    """
    return np.abs(encoder[:, None] - np.eye(encoder.shape[1])).max(axis=2) < 1e-5


def kept_matrices(code: Any) -> KeptMatrices | None:
    """Return a code's cached matrices, or None if they are part of a program.

    They are if JAX traces the code, and for codes without matrices by NumPy.
    """
    if not code.has_host_matrices or any_tracer(code):
        return None
    place = id(code), x64_enabled()
    found = _KEPT.get(place)
    if found is None:
        # The key is the object: two codes with the same numbers are too rare to search for.
        weakref.finalize(code, _KEPT.pop, place, None).atexit = False
        found = _KEPT.setdefault(place, KeptMatrices(code))
    return found


_KEPT: dict[tuple[int, bool], KeptMatrices] = {}


def x64_enabled() -> bool:
    """Return whether this thread works in float64."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
