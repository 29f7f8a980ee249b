"""Matrices that are made once: a code's encoder, and its decoder for each straggler set.

They depend on the code and on who answered, never on data. So where a code is known before a
program runs, its matrices are made beforehand and are arguments of the program: the regression's
loops over knots would be a thousand launches on a GPU in each call, the model's twenty. They are
made on the host's CPU, wherever the code lies: by NumPy, which compiles nothing, for the codes that
say how (`AbstractCode.decoder_on_host`), else by a program that is compiled once.
"""

import collections
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._decoding import Matrices
from ._trees import any_tracer

# Of one code's decoders: 4,096 of (100, 20), 340 of (100, 240).
_MOST_BYTES = 1 << 25
# A call of coded inference with more straggler sets than this makes its matrices itself, all at
# once: one by one on the host they would take longer (0.3 ms each), and few come again.
FEW_SETS = 4
# So many matrices take about as long on the host as the compilation of a program that makes many at
# once: a code for which more were made has such a program.
MANY_SETS = 4096


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
    """One code's matrices; threads may share it."""

    def __init__(self, code: Any):
        # A copy: what keeps the code itself alive would keep its own entry alive.
        arrays, rest = eqx.partition(code, eqx.is_array)
        arrays = jax.tree.map(_as_numpy, arrays)
        self._code = eqx.combine(arrays, rest)
        self._compiled = _Compiled(arrays, rest)
        self._dtype = np.dtype(_dtype_of(arrays))
        self._encoder: np.ndarray | None = None
        self._decoders: collections.OrderedDict[bytes, Matrices] = collections.OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def lookups(self) -> Lookups:
        return Lookups(self._hits, self._misses, len(self._decoders))

    @functools.cached_property
    def on_host(self) -> bool:
        """True for a code whose matrices are made by NumPy."""
        return self.exact_decoder(np.ones(self._code.num_workers, bool)) is not None

    def encoder(self) -> Float[np.ndarray, "num_workers num_data"]:
        """Return the encoder's matrix."""
        with self._lock:
            encoder = self._encoder
            if encoder is None:
                with np.errstate(all="ignore"):
                    made = self._code.encoder_on_host()
                made = self._compiled.encoder() if made is None else made
                encoder = self._encoder = made.astype(self._dtype)
            return encoder

    def decoders(
        self, available: Bool[np.ndarray, "groups num_workers"], most: int = FEW_SETS
    ) -> Matrices | None:
        """Return the matrices for these straggler sets: once if they are all the same.

        Returns None if there are more than `most` different ones.
        """
        names = [row.tobytes() for row in available]
        sets = dict(zip(names, available, strict=True))
        if not 1 <= len(sets) <= most:
            return None
        new = [name for name in sets if name not in self._decoders]
        found = {}
        if len(new) > FEW_SETS and not (self.on_host and self._misses < MANY_SETS):
            found = dict(zip(new, self._compiled.decoders([sets[n] for n in new]), strict=True))
            self._misses += len(new)
            self._keep(found)
        found |= {n: self._decoder(n, mask) for n, mask in sets.items() if n not in found}
        if len(found) == 1:
            return found[names[0]]
        each = [found[name] for name in names]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)

    def exact_decoder(self, available: Bool[np.ndarray, " num_workers"]) -> Matrices | None:
        """Return the matrix in float64, whose product loses no digit of float32.

        Returns None for a code whose matrices are compiled.
        """
        with np.errstate(all="ignore"):  # infinite lambdas are valid
            # As `self._code.decoder_on_host` would, but for binding it, which takes 0.1 ms.
            made = type(self._code).decoder_on_host(self._code, available)
        return None if made is None else Matrices(made[0][None], made[1][None])

    def variances(
        self, available: Bool[np.ndarray, " num_workers"]
    ) -> tuple[Float[np.ndarray, " num_data"], Float[np.ndarray, "num_workers num_workers"]]:
        """Return what a `NeRCC` or `LearnedDecoder` has as `variances_on_host`, in float64."""
        with np.errstate(all="ignore"):
            return type(self._code).variances_on_host(self._code, available)

    def _decoder(self, name: bytes, mask: Bool[np.ndarray, " num_workers"]) -> Matrices:
        with self._lock:
            found = self._decoders.get(name)
            if found is not None:
                self._hits += 1
                self._decoders.move_to_end(name)
                return found
            self._misses += 1
        exact = self.exact_decoder(mask)
        if exact is None:
            made = self._compiled.decoder(mask)
        else:
            made = Matrices(exact.decoder.astype(self._dtype), exact.recovered)
        self._keep({name: made})
        return made

    def _keep(self, made: dict[bytes, Matrices]) -> None:
        with self._lock:
            for name, each in made.items():
                self._decoders[name] = each
                most = max(_MOST_BYTES // each.decoder.nbytes, 1)
                while len(self._decoders) > most:
                    self._decoders.popitem(last=False)


class _Compiled:
    """A code's matrices by programs on the host's CPU."""

    def __init__(self, arrays: PyTree, rest: PyTree):
        self._arrays = arrays
        leaves, structure = jax.tree.flatten(rest)
        self._static = structure, tuple(leaves)

    def encoder(self) -> np.ndarray:
        return self._made(_encoder)

    def decoder(self, mask: Bool[np.ndarray, " num_workers"]) -> Matrices:
        return self._made(_decoder, mask)

    def decoders(self, masks: list[Bool[np.ndarray, " num_workers"]]) -> list[Matrices]:
        """Return the matrices of many masks by one program for up to a power of two of them."""
        padded = np.stack(masks + masks[:1] * ((1 << (len(masks) - 1).bit_length()) - len(masks)))
        decoder, recovered = self._made(_many_decoders, padded)
        each = zip(decoder, recovered, strict=True)
        return [Matrices(*parts) for _, parts in zip(masks, each, strict=False)]

    def _made(self, make: Any, *args: Any) -> Any:
        """Return what `make` gives, as NumPy's arrays."""

        def run() -> Any:
            arrays = jax.tree.map(_on_cpu, self._arrays)
            return jax.tree.map(np.asarray, make(self._static, arrays, *args))

        return _plainly(run)


def known_matrices(code: Any, available: ArrayLike) -> CachedMatrices:
    """Return the encoder's where the code is known, and the decoder's where the masks are, too."""
    return CachedMatrices(known_encoder(code), known_decoders(code, available))


def known_decoders(code: Any, available: ArrayLike, most: int = FEW_SETS) -> Matrices | None:
    """Return the decoder's matrices for a mask, or one for each group, where they are known.

    They are where code and masks are known, and the masks are at most so many different ones.
    """
    if isinstance(available, Tracer):
        return None
    kept, masks = kept_matrices(code), np.atleast_2d(np.asarray(available))
    fits = masks.dtype == bool and masks.shape[1:] == (code.num_workers,)
    return kept.decoders(masks, most) if kept is not None and fits else None


def known_encoder(code: Any) -> np.ndarray | None:
    """Return the encoder's matrix, where the code is known."""
    kept = kept_matrices(code)
    return None if kept is None else kept.encoder()


def decoder_at_hand(code: Any, available: ArrayLike) -> Array | None:
    """Return the decoder's matrix for one mask from the host, or None where a program makes it.

    Outside a program the regression's loops would be compiled in each call: 1.4 s for (20, 8).
    """
    given = known_decoders(code, available) if np.ndim(available) == 1 else None
    return None if given is None else jax.device_put(np.asarray(given.decoder[0]))


def encoder_at_hand(code: Any) -> Array | None:
    """Return the encoder's matrix from the host, or None where a program makes it."""
    known = known_encoder(code)
    return None if known is None else jax.device_put(known)


def encoder_of(code: Any) -> Float[Array | np.ndarray, "num_workers num_data"]:
    """Return the encoder's matrix: kept where the code is known, else part of the program."""
    known = known_encoder(code)
    return code.encoder_matrix() if known is None else known


def encoder_rows(code: Any) -> Float[np.ndarray, "num_workers num_data"]:
    """Return the encoder's matrix of a code that is known."""
    return np.asarray(encoder_of(code))


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


def _dtype_of(arrays: PyTree) -> Any:
    """Return the dtype of the matrices: that of the code's numbers, or JAX's default."""
    floats = [a.dtype for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.result_type(*floats) if floats else jax.dtypes.canonicalize_dtype(float)


def _plainly(run: Callable[[], Any]) -> Any:
    """Return what `run` gives, as if nothing else were going on.

    A trace or a mesh that the caller is in the midst of is none of its business: then it runs in
    another thread, which takes 0.4 ms more.
    """
    if jax.sharding.get_abstract_mesh().empty and not isinstance(jnp.zeros(()), Tracer):
        return run()
    x64 = x64_enabled()

    def run_there() -> Any:
        with jax.enable_x64(x64):
            return run()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run_there).result()


def _as_numpy(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """Return an array as NumPy's; a random key as it is."""
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)


def _on_cpu(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """Return an array on the CPU; as it is where JAX_PLATFORMS leaves the CPU out."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    try:
        return jax.device_put(np.asarray(leaf), jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return leaf


# As `eqx.filter_jit` of a code would be, but for what that takes apart in every call: 0.1 ms.


@functools.partial(jax.jit, static_argnums=0)
def _encoder(static: Any, arrays: PyTree) -> Array:
    return _code(static, arrays).encoder_matrix()


@functools.partial(jax.jit, static_argnums=0)
def _decoder(static: Any, arrays: PyTree, mask: Array) -> Matrices:
    code = _code(static, arrays)
    return Matrices(code.decoder_matrix(mask)[None], code.recovered(mask)[None])


_many_decoders = jax.jit(
    lambda static, arrays, masks: jax.vmap(lambda mask: _decoder(static, arrays, mask))(masks),
    static_argnums=0,
)


def _code(static: Any, arrays: PyTree) -> Any:
    structure, leaves = static
    return eqx.combine(arrays, jax.tree.unflatten(structure, leaves))
