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
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..splines.arrays import native
from ._decoding import Decoded, Matrices, decode_sets_in_program, sets_multiplied
from ._groups import decode_groups_in_program, multiply_groups
from ._kept import KeptMatrices, kept_matrices, known_decoders
from ._trees import any_tracer, check_floats, check_leading, join, to_device

# Up to this many straggler sets, all their matrices on the host (0.3 ms each) take less than the
# compilation of a program that makes them.
MANY_SETS = 4096


def decode_at_hand(code: Any, y: PyTree, available: ArrayLike) -> Decoded | None:
    """Return `try_decode` of one group, or None where it takes a program with a regression.

    That is where something is traced, or a broken answer meets a code without matrices on the host.

    Raises:
        ValueError: Answers are not one for each worker, or no floats.
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
    if isinstance(sound, Tracer):  # in a trace, of something else
        return None
    if sound:
        return decoded
    found = _groups_on_host(code, jax.tree.map(lambda leaf: leaf[None], y), mask[None])
    return None if found is None else jax.tree.map(lambda leaf: leaf[0], found)


def decode_groups(
    code: Any,
    y: PyTree[Float[ArrayLike, "groups num_workers ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decode many groups, each with its own workers.

    Answers may be a pytree of arrays, whose predictions come in the same form. In a program
    (`jax.jit`) this is part of it; outside, as little as possible is compiled.

    Args:
        code: The code.
        y: The answers of all groups. An unavailable worker's may hold anything, and one that is not
            finite makes its worker a straggler in its own group.
        available: The workers of each group that answered.
        given: The decoder's matrices for these workers, where they are made already.
    """
    y = native(y, "y")

    def in_program() -> Decoded:
        answers = jax.tree.map(jnp.asarray, y)
        return decode_groups_in_program(code, answers, jnp.asarray(available), given)

    if any_tracer(code, y, available, given):
        return in_program()
    masks = np.asarray(available)
    given = known_decoders(code, masks) if given is None else given
    if given is not None:
        decoded, sound = _multiply_groups(y, masks, given)
        if isinstance(sound, Tracer):
            return in_program()
        if sound:
            return decoded
    elif isinstance(jnp.zeros(()), Tracer):
        return in_program()
    found = _groups_on_host(code, y, masks)
    if found is not None:
        return found
    return _decode_groups(code, to_device(y), to_device(masks))


def decode_sets(
    code: Any,
    y: Float[Array, "groups num_workers m"],
    available: Bool[ArrayLike, "sets num_workers"],
) -> Decoded:
    """Decode the answers of all groups under each straggler set: leading axes (sets, groups).

    In a program each set's matrix is made once, outside on the host. An answer that is not finite
    makes its worker a straggler in its own group only, as everywhere.
    """
    y = native(y, "y")
    if any_tracer(code, y, available):
        return decode_sets_in_program(code, y, jnp.asarray(available))
    kept, masks = kept_matrices(code), np.asarray(available)
    if kept is None or not kept.on_host or not _is_here(y) or len(masks) > MANY_SETS:
        return _decode_sets(code, y, to_device(masks))
    given = kept.decoders(masks, MANY_SETS)
    assert given is not None
    sets = len(masks)
    given = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (sets, *leaf.shape[1:])), given)
    decoded, sound = _multiply_sets(y, masks, given)
    if isinstance(sound, Tracer):
        return decode_sets_in_program(code, y, jnp.asarray(masks))
    if sound:
        return decoded
    groups = np.tile(np.arange(len(y)), sets)
    made = _on_host(kept, np.asarray(y), groups, masks.repeat(len(y), axis=0))
    return Decoded(*to_device([part.reshape(sets, len(y), *part.shape[1:]) for part in made]))


@jax.jit
def _multiply_group(
    y: PyTree[Float[ArrayLike, "num_workers ..."]],
    available: Bool[ArrayLike, " num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    groups = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], y)
    decoded, sound = multiply_groups(groups, jnp.asarray(available)[None], given)
    return jax.tree.map(lambda leaf: leaf[0], decoded), sound


_multiply_groups = jax.jit(multiply_groups)
_decode_groups = eqx.filter_jit(decode_groups_in_program)
_multiply_sets = jax.jit(sets_multiplied)
_decode_sets = eqx.filter_jit(decode_sets_in_program)


def _groups_on_host(code: Any, y: PyTree, available: np.ndarray) -> Decoded | None:
    """`decode_groups` by NumPy in float64, or None for a code without matrices there."""
    kept = kept_matrices(code)
    if kept is None or not kept.on_host or not _is_here(y):
        return None
    vectors, form = join(to_device(y), 2)
    made = _on_host(kept, np.asarray(vectors), np.arange(len(vectors)), available)
    predictions, responded, recovered = to_device(made)
    return Decoded(form.split(predictions), responded, recovered)


def _is_here(y: PyTree) -> bool:
    """Return whether this process holds all of the answers."""
    return all(leaf.is_fully_addressable for leaf in jax.tree.leaves(y) if isinstance(leaf, Array))


def _on_host(
    kept: KeptMatrices,
    y: Float[np.ndarray, "groups num_workers m"],
    group: Int[np.ndarray, " rows"],
    available: Bool[np.ndarray, "rows num_workers"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return predictions, which workers they rest on, and which are recovered, of these groups."""
    finite = np.all(np.isfinite(y), axis=-1, keepdims=True)
    responded = available & finite[group][..., 0]
    matrices: dict[bytes, Matrices] = {}
    dtype = jnp.promote_types(y.dtype, jnp.float32)
    predictions, recovered = [], []
    with np.errstate(all="ignore"):  # what overflows becomes infinite, as in a program
        for place, mask in zip(group, responded, strict=True):
            name = mask.tobytes()
            made = matrices.get(name) or kept.exact_decoder(mask)
            assert made is not None
            matrices[name] = made
            answers = np.where(finite[place], y[place], 0).astype(np.float64)
            values = made.decoder[0] @ answers
            known = np.asarray(made.recovered[0])
            predictions.append(np.where(known[:, None], values, np.nan).astype(dtype))
            recovered.append(known)
    return np.stack(predictions), responded, np.stack(recovered)
