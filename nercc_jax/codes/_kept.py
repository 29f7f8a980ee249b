"""Matrices that are made once: a code's encoder, and its decoder for each straggler set.

They depend on the code and on who answered, never on data. So where a code is known before a
program runs, its matrices are made beforehand and are arguments of the program: the regression's
loops over knots would be a thousand launches on a GPU in each call, the model's twenty. They are
made on the host's CPU, wherever the code lies: the numbers are few, and a loop is nothing there.
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
# A call with more straggler sets than this makes its matrices itself, all at once: one by one on
# the host they would take longer (0.3 ms each), and so many differ that few come again.
_FEW = 4


class Known(eqx.Module):
    """A code's matrices that are there before a program runs; None where the program makes them."""

    encoder: Float[ArrayLike, "num_workers num_data"] | None = None
    decoders: Matrices | None = None


@dataclasses.dataclass(frozen=True)
class Lookups:
    """How often a decoder's matrix was there, how often it had to be made, how many are kept."""

    hits: int
    misses: int
    kept: int


class KeptMatrices:
    """One code's matrices; threads may share it."""

    def __init__(self, code: Any):
        # A copy: what keeps the code itself alive would keep its own entry alive.
        arrays, rest = eqx.partition(code, eqx.is_array)
        self._arrays = _plainly(lambda: jax.tree.map(_on_host, arrays))
        leaves, structure = jax.tree.flatten(rest)
        self._static = structure, tuple(leaves)
        self._encoder: np.ndarray | None = None
        self._decoders: collections.OrderedDict[bytes, Matrices] = collections.OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()

    @property
    def lookups(self) -> Lookups:
        return Lookups(self._hits, self._misses, len(self._decoders))

    def encoder(self) -> Float[np.ndarray, "num_workers num_data"]:
        with self._lock:
            encoder = self._made(_encoder) if self._encoder is None else self._encoder
            self._encoder = encoder
            return encoder

    def decoders(self, available: Bool[np.ndarray, "groups num_workers"]) -> Matrices | None:
        """For these straggler sets, once if they are all the same; None if they are many."""
        names = [row.tobytes() for row in available]
        sets = dict(zip(names, available, strict=True))
        if not 1 <= len(sets) <= _FEW:
            return None
        found = {name: self._decoder(name, mask) for name, mask in sets.items()}
        if len(found) == 1:
            return found[names[0]]
        each = [found[name] for name in names]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *each)

    def _decoder(self, name: bytes, mask: Bool[np.ndarray, " num_workers"]) -> Matrices:
        with self._lock:
            found = self._decoders.get(name)
            if found is not None:
                self._hits += 1
                self._decoders.move_to_end(name)
                return found
            self._misses += 1
        made = self._made(_decoder, mask)
        with self._lock:
            self._decoders[name] = made
            while (
                len(self._decoders) * made.decoder.nbytes > _MOST_BYTES and len(self._decoders) > 1
            ):
                self._decoders.popitem(last=False)
        return made

    def _made(self, make: Any, *args: Any) -> Any:
        """What `make` gives, as NumPy's arrays."""
        return _plainly(lambda: jax.tree.map(np.asarray, make(self._static, self._arrays, *args)))


def known_matrices(code: Any, available: ArrayLike) -> Known:
    """The encoder's where the code is known, and the decoder's where the masks are known, too."""
    return Known(known_encoder(code), known_decoders(code, available))


def known_decoders(code: Any, available: ArrayLike) -> Matrices | None:
    """The decoder's matrices for a mask, or one for each group, where code and masks are known."""
    if isinstance(available, Tracer):
        return None
    kept, masks = kept_matrices(code), np.atleast_2d(np.asarray(available))
    fits = masks.dtype == bool and masks.shape[1:] == (code.num_workers,)
    return kept.decoders(masks) if kept is not None and fits else None


def known_encoder(code: Any) -> np.ndarray | None:
    """The encoder's matrix, where the code is known."""
    kept = kept_matrices(code)
    return None if kept is None else kept.encoder()


def encoder_of(code: Any) -> Float[Array | np.ndarray, "num_workers num_data"]:
    """The encoder's matrix: kept where the code is known, else part of the program."""
    known = known_encoder(code)
    return code.encoder_matrix() if known is None else known


def encoder_rows(code: Any) -> Float[np.ndarray, "num_workers num_data"]:
    """The encoder's matrix of a code that is known."""
    return np.asarray(encoder_of(code))


def kept_matrices(code: Any) -> KeptMatrices | None:
    """A code's matrices, or None while JAX traces the code: then they are part of its program."""
    if any_tracer(code):
        return None
    place = id(code), x64_enabled()
    found = _KEPT.get(place)
    if found is None:
        # Codes have no hash (their arrays have none), so it goes by which object it is.
        weakref.finalize(code, _KEPT.pop, place, None).atexit = False
        found = _KEPT.setdefault(place, KeptMatrices(code))
    return found


_KEPT: dict[tuple[int, bool], KeptMatrices] = {}


def x64_enabled() -> bool:
    """Whether this thread works in float64."""
    return bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]


def _plainly(run: Callable[[], Any]) -> Any:
    """What `run` gives, as if nothing else were going on.

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


def _on_host(leaf: Array | np.ndarray) -> Array | np.ndarray:
    """An array on the CPU, and computed with there; as it is where JAX_PLATFORMS leaves it out."""
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


def _code(static: Any, arrays: PyTree) -> Any:
    structure, leaves = static
    return eqx.combine(arrays, jax.tree.unflatten(structure, leaves))
