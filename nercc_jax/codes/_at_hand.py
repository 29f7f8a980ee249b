"""Decoding where code, answers and mask are at hand: outside of any trace, nothing but a product.

The matrix is kept, or made on the host, and one program multiplies and says whether that is all
there is to it. It nearly always is. If not, an answer was broken or the matrix is ill-conditioned,
and the host decodes, in float64, which loses no digit of float32. So a first decode compiles in a
fraction of a second, and a broken answer compiles nothing.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._decoding import Decoded, Matrices, multiplied, sets_multiplied
from ._kept import kept_matrices, known_decoders
from ._meshes import coded_on_mesh
from ._trees import any_tracer, check_floats, check_leading, join

# Up to this many straggler sets, all their matrices on the host (0.3 ms each) take less than the
# compilation of a program that makes them.
MANY_SETS = 4096


def decode_at_hand(code: Any, y: PyTree, available: ArrayLike) -> Decoded | None:
    """Return `try_decode` of one group, or None where it takes a program with a regression.

    That is where something is traced, or a broken answer meets a code without matrices on the host.

    Raises: ValueError where answers are not one for each worker, or no floats.
    """
    if any_tracer(code, y, available):
        return None
    mask = np.asarray(available)
    given = known_decoders(code, mask) if mask.ndim == 1 else None
    if given is None:
        return None
    decoded, sound = _one_multiplied(code.num_workers, y, mask, given)
    if sound:
        return decoded
    vectors, form = join(jax.tree.map(lambda leaf: np.asarray(leaf)[None], y), 2)
    found = vectors_on_host(code, np.asarray(vectors), mask[None])
    if found is None:
        return None
    found = Decoded(form.split(found.predictions), found.heard, found.recovered)
    return jax.tree.map(lambda leaf: leaf[0], found)


def vectors_on_host(
    code: Any,
    y: Float[np.ndarray, "groups num_workers m"],
    available: Bool[np.ndarray, "groups num_workers"],
) -> Decoded | None:
    """Return `decode_vectors` by NumPy in float64, or None for a code without matrices there."""
    kept = kept_matrices(code)
    if kept is None or not kept.on_host:
        return None
    heard = available & np.isfinite(y).all(axis=-1)
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    predictions, recovered = [], []
    for answers, mask in zip(y, heard, strict=True):
        made = kept.exact_decoder(mask)
        assert made is not None
        with np.errstate(all="ignore"):  # what overflows becomes infinite, as in the program
            values = made.decoder[0] @ np.where(mask[:, None], answers, 0).astype(np.float64)
            values = np.where(made.recovered[0][:, None], values, np.nan).astype(dtype)
        predictions.append(values)
        recovered.append(made.recovered[0])
    parts = np.stack(predictions), heard, np.stack(recovered)
    return Decoded(*(jnp.asarray(part) for part in parts))


def decode_sets_at_hand(
    code: Any,
    y: Float[Array, "groups num_workers m"],
    available: Bool[ArrayLike, "sets num_workers"],
) -> Decoded | None:
    """Return `decode_sets`, or None where it takes a program with a regression."""
    if any_tracer(code, y, available):
        return None
    kept, masks = kept_matrices(code), np.asarray(available)
    if kept is None or not kept.on_host or len(masks) > MANY_SETS:
        return None
    given = kept.decoders(masks, MANY_SETS)
    if given is None:
        return None
    decoder, recovered = (
        np.broadcast_to(a, (len(masks), *a.shape[1:])) for a in (given.decoder, given.recovered)
    )
    decoded, sound = _sets_multiplied(y, masks, Matrices(decoder, recovered))
    return decoded if sound else None


@eqx.filter_jit
def _one_multiplied(
    num_workers: int, y: PyTree, available: ArrayLike, given: Matrices
) -> tuple[Decoded, Bool[Array, ""]]:
    y = jax.tree.map(jnp.asarray, y)
    check_leading("y", y, (num_workers,), "workers")
    check_floats("y", y)

    def decoded(y: PyTree, available: Array, given: Matrices) -> tuple[Decoded, Array]:
        with jax.named_scope("nercc.decode"):
            vectors, form = join(y, 1)
            made, sound = multiplied(vectors[None], available[None], given)
            made = jax.tree.map(lambda leaf: leaf[0], made)
            return Decoded(form.split(made.predictions), made.heard, made.recovered), sound

    def specs(names: Any) -> Any:
        predictions = jax.tree.map(lambda leaf: (None, *names(leaf)[1:]), y)
        return Decoded(predictions, (None,), (None,)), ()

    return coded_on_mesh(decoded, (y, jnp.asarray(available), given), specs)


_sets_multiplied = eqx.filter_jit(sets_multiplied)
