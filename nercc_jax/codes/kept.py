"""Matrices that are made once: a code's encoder, and its decoder for each straggler set.

They depend on the code and on who answered, never on data. So where a code is known before a
program runs, its matrices are made beforehand and are arguments of the program: the regression's
loops over knots would be a thousand launches on a GPU in each call, the model's twenty. They are
made on the host by NumPy, which compiles nothing, wherever the code lies, for the codes of this
package (`AbstractNumpyCode`). The matrices of others are part of each program.
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
    """A code's matrices that are there before a program runs; None where the program makes them."""

    encoder: Float[ArrayLike, "num_workers num_data"] | None = None
    decoders: Matrices | None = None


class KeptMatrices:
    """One code's matrices by NumPy; threads may share it.

    Attributes:
        most_bytes: The size of the decoders that are kept: 4,096 of (100, 20), 340 of (100, 240).
        few_sets: A call of coded inference with more straggler sets than this makes its matrices
            itself, all at once: one by one on the host they would take longer (0.3 ms each), and
            few come again.
        many_sets: So many matrices take about as long on the host as the compilation of a program
            that makes them, which decodes then.
    """

    most_bytes = 1 << 25
    few_sets = 4
    many_sets = 4096

    def __init__(self, code: Any):
        # A copy: what keeps the code itself alive would keep its own entry alive.
        arrays, rest = eqx.partition(code, eqx.is_array)
        self._code = eqx.combine(jax.tree.map(np.asarray, arrays), rest)
        # That of the code's numbers, or JAX's default.
        floats = [a.dtype for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
        default = jax.dtypes.canonicalize_dtype(float)
        self._dtype = np.dtype(jnp.result_type(*floats) if floats else default)
        size = self._code.num_data * self._code.num_workers * self._dtype.itemsize
        # It is safe among threads, and counts.
        self._made = functools.lru_cache(max(self.most_bytes // size, 1))(self._make)

    @functools.cached_property
    def encoder(self) -> Float[np.ndarray, "num_workers num_data"]:
        """The encoder's matrix."""
        return self.by_numpy("encoder_on_host").astype(self._dtype)

    def by_numpy(self, method: str, *args: Any) -> Any:
        """Return what a method of the code with NumPy's arrays says, in float64.

        Those are `encoder_on_host`, `decoder_on_host` and, of a code that has it,
        `variances_on_host`. The method is not bound, which takes 0.1 ms.
        """
        with np.errstate(all="ignore"):  # infinite lambdas are valid
            return getattr(type(self._code), method)(self._code, *args)

    def decoders(self, available: ArrayLike, most: int = few_sets) -> Matrices | None:
        """Return the matrices for a mask, or for one of each group: once if they are all the same.

        Returns None if there are more than `most` different ones, or if they are traced or no masks
        of the code's workers.
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
    """Return the encoder's matrix, and the decoder's for masks if given, where a code is known."""
    if (kept := kept_matrices(code)) is None:
        return CachedMatrices()
    return CachedMatrices(kept.encoder, None if available is None else kept.decoders(available))


def encoder_of(code: Any) -> Any:
    """Return the encoder's matrix: NumPy's where the code is known, else part of the program."""
    known = known_matrices(code).encoder
    made = code.encoder_matrix() if known is None else known
    return made if any_tracer(made) else np.asarray(made)


def kept_matrices(code: Any) -> KeptMatrices | None:
    """Return a code's matrices, or None where they are part of its program.

    That is while JAX traces the code, and for codes without matrices by NumPy.
    """
    if not code.has_host_matrices or any_tracer(code):
        return None
    place = id(code), x64_enabled()
    found = _KEPT.get(place)
    if found is None:
        # Codes are kept by which object they are: two with the same numbers are not worth a search.
        weakref.finalize(code, _KEPT.pop, place, None).atexit = False
        found = _KEPT.setdefault(place, KeptMatrices(code))
    return found


_KEPT: dict[tuple[int, bool], KeptMatrices] = {}


def x64_enabled() -> bool:
    """Return whether this thread works in float64."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
