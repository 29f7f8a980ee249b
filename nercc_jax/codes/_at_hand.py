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
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree

from ..splines.arrays import native
from ._decoding import (
    AMPLIFICATION,
    Decoded,
    Matrices,
    all_finite,
    decode_sets_in_program,
    sets_multiplied,
)
from ._groups import decode_groups_in_program, multiply_groups
from ._kept import MANY_SETS, kept_matrices, known_decoders
from ._products import multiply
from ._trees import any_tracer, check_floats, check_leading, join, to_device


def decode_at_hand(code: Any, y: PyTree, available: ArrayLike) -> Decoded | None:
    """Return `try_decode` of one group, or None where it takes a program with a regression.

    That is where something is traced, or a broken answer meets a code without matrices on the host.

    Raises:
        ValueError: Answers are not one for each worker, or no floats.
    """
    if any_tracer(code, y, available) or (_debugs() and isinstance(jnp.zeros(()), Tracer)):
        return None
    mask = np.asarray(available)
    given = known_decoders(code, mask) if mask.ndim == 1 else None
    if given is None:
        return None
    y = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), y)
    check_leading("y", y, (code.num_workers,), "workers")
    check_floats("y", y)
    if not _debugs():
        decoded, sound = _multiply_group(y, mask, given)
        if isinstance(sound, Tracer):  # in a trace, of something else
            return None
        if sound:
            return decoded
    found = _without_broken(code, jax.tree.map(lambda leaf: leaf[None], y), mask[None])
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
    given = known_decoders(code, masks, MANY_SETS) if given is None else given
    if given is not None and not _debugs():
        decoded, sound = _multiply_groups(y, masks, given)
        if isinstance(sound, Tracer):
            return in_program()
        if sound:
            return decoded
    elif isinstance(jnp.zeros(()), Tracer):
        return in_program()
    found = _without_broken(code, y, masks)
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
    # As groups of their own: every answer once for each set.
    every = jnp.tile(to_device(y), (sets, 1, 1))
    found = _without_broken(code, every, masks.repeat(len(y), axis=0))
    assert found is not None
    return jax.tree.map(lambda leaf: leaf.reshape(sets, len(y), *leaf.shape[1:]), found)


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


def _without_broken(
    code: Any, y: PyTree, available: Bool[np.ndarray, "groups num_workers"]
) -> Decoded | None:
    """`decode_groups` where one product will not do, or None for a code without matrices there.

    Broken answers are left out, with the matrices of those that are left. Where a matrix would lose
    digits its product is NumPy's, in float64.
    """
    kept = kept_matrices(code)
    if kept is None or not kept.on_host or not _is_here(y):
        return None
    vectors, form = join(to_device(y), 2)
    responded = available & np.asarray(_all_finite(vectors))
    given = kept.decoders(responded, max(len(responded), MANY_SETS))
    assert given is not None
    predictions = _multiply_clean(vectors, responded, given)
    steady = np.abs(given.decoder).sum(axis=-1).max(axis=-1) <= AMPLIFICATION
    rough = np.flatnonzero(~np.broadcast_to(steady, len(responded)))
    if rough.size:
        predictions = np.array(predictions)
        for place in rough:
            exact = kept.exact_decoder(responded[place])
            assert exact is not None
            answers = np.where(responded[place][:, None], vectors[place], 0).astype(np.float64)
            with np.errstate(over="ignore"):  # it becomes infinite, as in a program
                values = (exact.decoder[0] @ answers).astype(predictions.dtype)
            predictions[place] = np.where(exact.recovered[0][:, None], values, np.nan)
    recovered = np.broadcast_to(given.recovered, (len(responded), code.num_data))
    predictions, *status = to_device((predictions, responded, recovered))
    return Decoded(form.split(predictions), *status)


_all_finite = jax.jit(all_finite)


@jax.jit
def _multiply_clean(
    y: Float[Array, "groups num_workers m"],
    responded: Bool[ArrayLike, "groups num_workers"],
    given: Matrices,
) -> Float[Array, "groups num_data m"]:
    """Return predictions from the answers of those that responded."""
    predictions = multiply(
        jnp.asarray(given.decoder), jnp.where(jnp.asarray(responded)[..., None], y, 0)
    )
    return jnp.where(jnp.asarray(given.recovered)[..., None], predictions, jnp.nan)


def _debugs() -> bool:
    """Return whether JAX would take a straggler's NaN in a first product for a fault."""
    config: Any = jax.config
    return config.jax_debug_nans or config.jax_debug_infs


def _is_here(y: PyTree) -> bool:
    """Return whether this process holds all of the answers."""
    return all(leaf.is_fully_addressable for leaf in jax.tree.leaves(y) if isinstance(leaf, Array))
