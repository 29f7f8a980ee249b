"""Decoding where code, answers and masks are at hand: outside of any trace, nothing but a product.

The matrices are kept, or made on the host, and one program multiplies and says whether that is all
there is to it. It nearly always is. If not, an answer was broken or a matrix is ill-conditioned,
and the host decodes, in float64, which loses no digit of float32. So a first decode compiles in a
fraction of a second, and a broken answer compiles nothing.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ._decoding import Decoded, Matrices, sets_multiplied
from ._groups import decode_groups, multiply_groups
from ._kept import KeptMatrices, kept_matrices, known_decoders
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
    y = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), y)
    check_leading("y", y, (code.num_workers,), "workers")
    check_floats("y", y)
    decoded, sound = _multiply_group(y, mask, given)
    if sound:
        return decoded
    found = _groups_on_host(code, jax.tree.map(lambda leaf: leaf[None], y), mask[None])
    return None if found is None else jax.tree.map(lambda leaf: leaf[0], found)


def decode_groups_at_hand(
    code: Any,
    y: PyTree[Float[ArrayLike, "groups num_workers ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
) -> Decoded:
    """Return `decode_groups`, by as little compilation as there can be."""
    masks = np.asarray(available)
    given = known_decoders(code, masks)
    if given is not None:
        decoded, sound = _multiply_groups(y, jnp.asarray(masks), given)
        if sound:
            return decoded
    found = _groups_on_host(code, y, masks)
    if found is not None:
        return found
    return _decode_groups(code, jax.tree.map(jnp.asarray, y), jnp.asarray(masks))


def decode_sets_at_hand(
    code: Any,
    y: Float[Array, "groups num_workers m"],
    available: Bool[ArrayLike, "sets num_workers"],
) -> Decoded | None:
    """Return `decode_sets`, or None where it takes a program with a regression."""
    kept = None if any_tracer(code, y, available) else kept_matrices(code)
    if kept is None or not kept.on_host:
        return None
    masks = np.asarray(available)
    given = kept.decoders(masks, MANY_SETS)
    if given is None:
        return None
    sets = len(masks)
    given = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (sets, *leaf.shape[1:])), given)
    decoded, sound = _multiply_sets(y, jnp.asarray(masks), given)
    return decoded if sound else None


@eqx.filter_jit
def _multiply_group(
    y: PyTree[Float[ArrayLike, "num_workers ..."]],
    available: Bool[ArrayLike, " num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    groups = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y)
    decoded, sound = multiply_groups(groups, jnp.asarray(available)[None], given)
    return jax.tree.map(lambda leaf: leaf[0], decoded), sound


_multiply_groups = eqx.filter_jit(multiply_groups)
_decode_groups = eqx.filter_jit(decode_groups)
_multiply_sets = eqx.filter_jit(sets_multiplied)


def _groups_on_host(code: Any, y: PyTree, available: np.ndarray) -> Decoded | None:
    """`decode_groups` by NumPy in float64, or None for a code without matrices there."""
    kept = kept_matrices(code)
    there = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(y) if isinstance(leaf, Array))
    if kept is None or not kept.on_host or not there:
        return None
    vectors, form = join(jax.tree.map(jnp.asarray, y), 2)
    made = [_one_on_host(kept, *each) for each in zip(np.asarray(vectors), available, strict=True)]
    parts = (jnp.asarray(np.stack(part)) for part in zip(*made, strict=True))
    predictions, heard, recovered = parts
    return Decoded(form.split(predictions), heard, recovered)


def _one_on_host(
    kept: KeptMatrices,
    y: Float[np.ndarray, "num_workers m"],
    available: Bool[np.ndarray, " num_workers"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions of one group, which workers they rest on, and which are recovered."""
    heard = available & np.isfinite(y).all(axis=-1)
    made = kept.exact_decoder(heard)
    assert made is not None
    matrix, recovered = made.decoder[0], np.asarray(made.recovered[0])
    with np.errstate(all="ignore"):  # what overflows becomes infinite, as in a program
        values = matrix @ np.where(heard[:, None], y, 0).astype(np.float64)
        values = np.where(recovered[:, None], values, np.nan)
        return values.astype(jnp.promote_types(y.dtype, jnp.float32)), heard, recovered
