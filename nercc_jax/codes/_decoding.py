"""Decoding: one product with the decoder's matrix, and what happens where that would not do.

Nearly always every value that came back is finite, the decoder well conditioned and everything
recovered; then decoding is one product. So that is tried, and what it shows decides: a broken
value leaves its mark in every row of the product (0 * NaN is NaN), so one row shows all of them.

The derivative is the plain product's: the decoder's matrix for the workers that responded times
their answers, zeros for all others. So a straggler's value reaches no gradient, and no branch or
loop is ever differentiated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ..splines._platforms import alike_in_shard_map
from ..splines.arrays import working_dtype
from ._trees import is_float, same_within_group

# TPUs and GPUs would round the factors of a float32 product.
FULL = jax.lax.Precision.HIGHEST
State = TypeVar("State", bound=PyTree)


class Decoded(eqx.Module):
    """Predictions, and what they rest on. With groups, every field has a leading axis.

    `recovered` says that answers determine a prediction, not that it is near the model's own: the
    more workers straggle, the farther it may be off. It is NaN where `recovered` is false.
    `responded` are the workers whose answers were used: available, and finite in every coordinate.
    `expected_error` is the standard deviation of each prediction, in units of the outputs, as
    `AbstractCode.decode` returns it; None where it was not asked for, or the code has none.
    """

    predictions: PyTree[Float[Array, "..."]]
    responded: Bool[Array, "... num_workers"]
    recovered: Bool[Array, "..."]
    expected_error: Float[Array, "..."] | None = None


class Matrices(NamedTuple):
    """The decoder's matrix and what it recovers, for each group's straggler set, or for all's."""

    decoder: Float[Array | np.ndarray, "sets num_data num_workers"]
    recovered: Bool[Array | np.ndarray, "sets num_data"]


class PlainMap(eqx.Module):
    """The linear map from answers to predictions for one straggler set, by its matrix alone.

    What `AbstractCode.decoder_map` returns has a `matrix`, and `apply`: its product with finite
    answers by the most accurate way there is, with the product's derivative.
    """

    matrix: Float[Array, "num_data num_workers"]

    def apply(self, y: Float[Array, "num_workers m"]) -> Float[Array, "num_data m"]:
        """Return matrix @ y."""
        return multiply(self.matrix, y)


def multiply(
    matrix: Float[Array, "... a b"], x: Float[Array, "... b m"]
) -> Float[Array, "... a m"]:
    """Return matrix @ x in x's precision, float32 at least; one matrix may be for many groups."""
    dtype = working_dtype(x.dtype)
    matrix, x = matrix.astype(dtype), x.astype(dtype)
    one = matrix.ndim == 2 or matrix.shape[0] == 1
    if x.ndim != 3 or not one:
        return jnp.matmul(matrix, x, precision=FULL)
    matrix = matrix.reshape(matrix.shape[-2:])
    if x.shape[0] == 1:
        # Without the barrier XLA may read a matrix that lies in memory by columns, which its CPU
        # product does at half the speed (60 x 20 by 20 x 3,072, and 8 x 20 by 20 x 150,528).
        return jnp.matmul(jax.lax.optimization_barrier(matrix), x[0], precision=FULL)[None]
    # Left to itself, XLA makes one product of it, and moves the data for that: 1.9 ms against 0.3
    # for 8 x 20 by 64 x 20 x 1,000 on two CPU cores.
    each = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape))
    return jax.lax.dot_general(each, x, (((2,), (1,)), ((0,), (0,))), precision=FULL)


def multiplied(
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups_or_sets num_workers"],
    given: Matrices,
    *,
    sets: bool = False,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode by the product with these matrices; return also whether that is sound.

    It is where all answers behind it are finite, the matrices lose no digits, and everything is
    recovered.
    """
    matrices, recovered = jnp.asarray(given.decoder), jnp.asarray(given.recovered)
    if sets:
        shape = (available.shape[0], y.shape[0])
        matrices = jnp.broadcast_to(matrices, (shape[0], *matrices.shape[1:]))
        # Every matrix times every group, as one product of two matrices.
        dtype = working_dtype(y.dtype)
        factors = matrices.astype(dtype), y.astype(dtype)
        predictions = jnp.moveaxis(jnp.tensordot(*factors, ((2,), (1,)), precision=FULL), 2, 1)
        available = jnp.broadcast_to(available[:, None], (*shape, available.shape[1]))
        recovered = jnp.broadcast_to(recovered[:, None], (*shape, recovered.shape[1]))
    else:
        predictions = multiply(matrices, y)
        recovered = jnp.broadcast_to(recovered, (y.shape[0], recovered.shape[1]))
    finite = jnp.all(jnp.isfinite(predictions[..., 0, :]))
    sound = finite & is_steady(matrices) & jnp.all(recovered)
    return Decoded(predictions, available, recovered), sound


def is_steady(matrices: Float[Array, "*sets num_data num_workers"]) -> Bool[Array, ""]:
    """Return whether the product with these matrices loses no digits.

    Above a sum of 32 of a row's magnitudes it loses some that the regression itself keeps. Two
    close workers then carry the spline over a wide gap: their entries are large and of opposite
    sign. 32 roundings of a unit are 2e-6 in float32.
    """
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), initial=0) <= 32


def decode_vectors(
    code: Any,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups_or_sets num_workers"],
    given: Matrices | None = None,
    *,
    sets: bool = False,
) -> Decoded:
    """Decode the answers of many groups in a program, each with its own workers.

    With `sets`, `available` are straggler sets (sets, N) and all groups are decoded under each of
    them, by one matrix a set: results have the axes (sets, groups). An answer that is not finite
    makes its worker a straggler in its own group only.

    `given` are the matrices of these workers where they are made already. A derivative makes them
    again, since it is the code's too; so does an answer that is not finite, for those that are.
    """
    return _decoded(*alike_in_shard_map((code, y, available, given)), sets=sets)


@eqx.filter_custom_jvp
def _decoded(code: Any, y: Array, available: Array, given: Matrices | None, *, sets: bool) -> Any:
    leaves, rest = eqx.partition(code, eqx.is_array)

    def decode(leaves: Any, y: Array, available: Array, given: Matrices | None) -> Decoded:
        own = eqx.combine(leaves, rest)
        if given is None:
            maps, recovered = _fitted(own, available)
            given = Matrices(maps.matrix, recovered)
        attempt, sound = multiplied(y, available, given, sets=sets)
        return _unless(
            sound, attempt, lambda: _carefully(own, y, available, sets=sets, seldom=True)
        )

    if sets:
        return decode(leaves, y, available, given)
    # `jax.vmap` gives it more groups. Else what one group needs, once more, would be done for each,
    # and selected: 64 groups of (100, 20) and 1,000 coordinates took 80 ms on two CPU cores, and 8
    # by `decode_groups`.
    merged = jax.custom_batching.custom_vmap(decode)

    @merged.def_vmap
    def _(size: int, batched: Any, leaves: Any, y: Array, available: Array, given: Any) -> Any:
        groups = y.shape[int(batched[1])]

        def merge(leaf: Array, own: bool) -> Array:
            leaf = leaf if own else leaf[None]
            leaf = jnp.broadcast_to(leaf, (size, groups, *leaf.shape[2:]))
            return leaf.reshape(size * groups, *leaf.shape[2:])

        if any(jax.tree.leaves(batched[0])):  # each group has a code of its own
            axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
            found = jax.vmap(decode, axes, axis_size=size)(leaves, y, available, given)
        else:
            one_for_all = given is not None and not batched[3].decoder and len(given.decoder) == 1
            given = given if one_for_all else jax.tree.map(merge, given, batched[3])
            found = merged(leaves, merge(y, batched[1]), merge(available, batched[2]), given)
            found = jax.tree.map(lambda leaf: leaf.reshape(size, groups, *leaf.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return merged(leaves, y, available, given)


@_decoded.def_jvp
def _(primals: Any, tangents: Any, *, sets: bool) -> Any:
    # By what has a tangent only: that of a code takes half of the program.
    (*values, available, _), changes = primals, tangents[:2]
    moves = jax.tree.map(lambda change: change is not None, changes, is_leaf=lambda t: t is None)
    moving, still = eqx.partition(tuple(values), moves)

    def of_moving(moving: Any) -> Decoded:
        code, y = eqx.combine(moving, still)
        return _carefully(code, y, available, sets=sets)

    return jax.jvp(of_moving, (moving,), (changes,))


def _carefully(
    code: Any, y: Array, available: Array, *, sets: bool = False, seldom: bool = False
) -> Decoded:
    """Decode answers of which some may be broken, or whose matrix would lose digits.

    `seldom` is for a branch that few calls take, and that is not differentiated. There, groups come
    one by one: each call gets the memory of all branches. With all at once that was 74 MiB instead
    of 6 for 64 groups of (100, 20) and 1,000 coordinates, and every call took 11.0 ms instead of
    9.0 on two CPU cores.
    """
    if sets:

        def under_all(y: Array) -> Decoded:
            every = jnp.broadcast_to(y, (len(available), *y.shape))
            return _carefully(code, every, available, seldom=seldom)

        decoded = jax.lax.map(under_all, y) if seldom else jax.vmap(under_all)(y)
        return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), decoded)

    def of_group(group: tuple[Any, ...]) -> Array:
        own, y, responded, recovered = group
        clean = jnp.where(responded[:, None], y, 0).astype(working_dtype(y.dtype))

        def accurately(y: Array) -> Array:
            return jnp.where(recovered[:, None], own.apply(y), jnp.nan)

        def as_needed(y: Array) -> Array:
            matrix = jnp.where(recovered[:, None], own.matrix, jnp.nan)  # and so is a row's product
            attempt = multiply(matrix[None], y[None])[0]
            return _unless(is_steady(own.matrix), attempt, lambda: accurately(y))

        if not seldom:
            return accurately(clean)
        # An accelerator's host would wait for the condition longer than the accurate way takes.
        return jax.lax.platform_dependent(clean, cpu=as_needed, default=accurately)

    responded = available & jnp.all(jnp.isfinite(y), axis=-1)
    maps, recovered = _fitted(code, responded)
    groups = maps, y, responded, recovered
    if not seldom:
        predictions = jax.vmap(of_group)(groups)
    elif y.shape[0] == 1:  # without a loop
        predictions = of_group(jax.tree.map(lambda leaf: leaf[0], groups))[None]
    else:
        predictions = jax.lax.map(of_group, groups)
    return Decoded(predictions, responded, recovered)


@eqx.filter_jit  # so that a program that needs it twice has it once
def _fitted(code: Any, responded: Bool[Array, "sets num_workers"]) -> tuple[Any, Array]:
    """Return the decoder's map of each set, and what it recovers."""
    return jax.vmap(lambda mask: (code.decoder_map(mask), code.recovered(mask)))(responded)


def _unless(sound: Bool[Array, ""], attempt: State, otherwise: Callable[[], State]) -> State:
    """Return what was attempted, or, where that is not sound, what is made otherwise.

    As `jax.lax.cond`, but a loop of no or one turn: XLA passes a loop's buffers on, and copies a
    branch's (150,528 coordinates from 20 workers on two CPU cores: 1.2 ms against 2.9 ms, of which
    the product is 0.7 ms). And under `jax.vmap` a `cond` always does both. For the same reason the
    attempt is made before the loop, and not in a first turn of it.
    """
    done = jnp.ones_like(sound)
    return jax.lax.while_loop(
        lambda state: ~state[1], lambda _: (otherwise(), done), (attempt, sound)
    )[0]


def mask_mixed_groups(
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None,
) -> tuple[Bool[Array, "groups num_workers"], Matrices | None]:
    """Mask out groups in which parts that are not coded differ; return their matrices if given."""
    if all(map(is_float, jax.tree.leaves(x))):
        return available, given
    return available & same_within_group(x, 2)[:, None], None
