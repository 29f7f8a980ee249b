"""Matrices that are made once: a code's encoder, and its decoder for each straggler set.

They depend on the code and on who answered, never on data. So where a code is known before a
program runs, its matrices are made beforehand and are arguments of the program: the regression's
loops over knots would be a thousand launches on a GPU in each call, the model's twenty. They are
made on the host by NumPy, which compiles nothing, wherever the code lies, for codes that say how
(`AbstractCode.decoder_on_host`). The matrices of others are part of each program.
"""

import collections
import dataclasses
import functools
import threading
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from ._decoding import Matrices
from ._trees import any_tracer


class CachedMatrices(eqx.Module):
    """A code's matrices that are there before a program runs; None where the program makes them."""

    encoder: Float[ArrayLike, "num_workers num_data"] | None = None
    decoders: Matrices | None = None


@dataclasses.dataclass(frozen=True)
class Lookups:
    """Counts of decoder matrices that were there, that had to be made, and that are kept."""

    hits: int
    misses: int
    kept: int


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
        self._code = eqx.combine(jax.tree.map(_as_numpy, arrays), rest)
        # That of the code's numbers, or JAX's default.
        floats = [a.dtype for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
        default = jax.dtypes.canonicalize_dtype(float)
        self._dtype = np.dtype(jnp.result_type(*floats) if floats else default)
        self._encoder: np.ndarray | None = None
        self._decoders: collections.OrderedDict[bytes, Matrices] = collections.OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def lookups(self) -> Lookups:
        return Lookups(self._hits, self._misses, len(self._decoders))

    @functools.cached_property
    def on_host(self) -> bool:
        """True for a code that has its decoder's matrices by NumPy."""
        return self._on_host("decoder_on_host", np.ones(self._code.num_workers, bool)) is not None

    def encoder(self) -> Float[np.ndarray, "num_workers num_data"] | None:
        """Return the encoder's matrix, or None for a code that has none by NumPy."""
        with self._lock:
            if self._encoder is None and (made := self._on_host("encoder_on_host")) is not None:
                self._encoder = made.astype(self._dtype)
            return self._encoder

    def decoders(
        self, available: Bool[np.ndarray, "groups num_workers"], most: int = few_sets
    ) -> Matrices | None:
        """Return the matrices for these straggler sets: once if they are all the same.

        Returns None if there are more than `most` different ones, or none by NumPy.
        """
        names = [row.tobytes() for row in available]
        sets = dict(zip(names, available, strict=True))
        if not 1 <= len(sets) <= most or not self.on_host:
            return None
        found = {name: self._decoder(name, mask) for name, mask in sets.items()}
        if len(found) == 1:
            return found[names[0]]
        return Matrices(*map(np.concatenate, zip(*(found[name] for name in names), strict=True)))

    def exact_decoder(self, available: Bool[np.ndarray, " num_workers"]) -> Matrices:
        """Return the matrix in float64, whose product loses no digit of float32."""
        decoder, recovered = self._on_host("decoder_on_host", available)
        return Matrices(decoder[None], recovered[None])

    def variances(
        self, available: Bool[np.ndarray, " num_workers"]
    ) -> tuple[Float[np.ndarray, " num_data"], Float[np.ndarray, "num_workers num_workers"]]:
        """Return what a `NeRCC` or `LearnedDecoder` has as `variances_on_host`, in float64."""
        return self._on_host("variances_on_host", available)

    def _on_host(self, method: str, *args: Any) -> Any:
        """Return what a method of the code says; it is not bound, which takes 0.1 ms."""
        with np.errstate(all="ignore"):  # infinite lambdas are valid
            return getattr(type(self._code), method)(self._code, *args)

    def _decoder(self, name: bytes, mask: Bool[np.ndarray, " num_workers"]) -> Matrices:
        with self._lock:
            found = self._decoders.get(name)
            if found is not None:
                self._hits += 1
                self._decoders.move_to_end(name)
                return found
            self._misses += 1
        exact = self.exact_decoder(mask)
        made = Matrices(exact.decoder.astype(self._dtype), exact.recovered)
        with self._lock:
            self._decoders[name] = made
            while len(self._decoders) > max(self.most_bytes // made.decoder.nbytes, 1):
                self._decoders.popitem(last=False)
        return made


def known_decoders(
    code: Any, available: ArrayLike, most: int = KeptMatrices.few_sets
) -> Matrices | None:
    """Return the decoder's matrices for a mask, or one for each group, where they are known.

    They are where code and masks are known, and the masks are at most so many different ones.
    """
    kept = None if isinstance(available, Tracer) else kept_matrices(code)
    masks = np.atleast_2d(np.asarray(available)) if kept is not None else np.zeros(0)
    fits = masks.dtype == bool and masks.shape[1:] == (code.num_workers,)
    return kept.decoders(masks, most) if kept is not None and fits else None


def known_encoder(code: Any) -> np.ndarray | None:
    """Return the encoder's matrix, where the code is known and has it by NumPy."""
    kept = kept_matrices(code)
    return None if kept is None else kept.encoder()


def encoder_of(code: Any) -> Any:
    """Return the encoder's matrix: NumPy's where the code is known, else part of the program."""
    known = known_encoder(code)
    made = code.encoder_matrix() if known is None else known
    return made if any_tracer(made) else np.asarray(made)


def kept_matrices(code: Any) -> KeptMatrices | None:
    """Return a code's matrices, or None while JAX traces the code.

    Then they are part of its program.
    """
    if any_tracer(code):
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


def _as_numpy(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """Return an array as NumPy's; a random key as it is."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)
