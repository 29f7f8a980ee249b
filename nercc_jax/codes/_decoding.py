"""Decoding: one product with the decoder's matrix, and what happens where that would not do.

Nearly always every value that came back is finite, the decoder well conditioned and everything
recovered; then decoding is one product. So that is tried, and what it shows decides: a broken
value leaves its mark in every row of the product (0 * NaN is NaN), so one row shows all of them.

The derivative is the plain product's: the decoder's matrix for the workers that responded times
their answers, zeros for all others. So a straggler's value reaches no gradient, and no branch or
loop is ever differentiated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ..splines._platforms import alike_in_shard_map
from ..splines.arrays import namespace, working_dtype
from ._products import FULL, multiply
from ._trees import is_float, same_within_group

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


@runtime_checkable
class DecoderMap(Protocol):
    """The linear map from answers to predictions for one straggler set, a pytree.

    `matrix` is (num_data, num_workers), and `apply` its product with finite answers by the most
    accurate way there is, with the product's derivative.
    """

    @property
    def matrix(self) -> Any: ...

    def apply(self, y: Any) -> Any: ...


class PlainMap(eqx.Module):
    """A `DecoderMap` that has no better way than the product with its matrix."""

    matrix: Float[Array, "num_data num_workers"]

    def apply(self, y: Float[Array, "num_workers m"]) -> Float[Array, "num_data m"]:
        """Return matrix @ y."""
        return multiply(self.matrix, y)


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
    # As an argument: what `custom_jvp` closes over must not be traced.
    leaves, rest = eqx.partition(code, eqx.is_array)

    def plain(leaves: PyTree, y: Array, available: Array, given: Matrices | None) -> Decoded:
        leaves, y, available, given = _alike((leaves, y, available, given))
        own = eqx.combine(leaves, rest)
        if sets:
            return _sets_in_turns(own, y, available)
        if given is None:
            maps, recovered = _fitted(own, available)
            given = Matrices(maps.matrix, recovered)
        attempt, sound = multiplied(y, available, given)
        return _unless(sound, attempt, lambda: _carefully(own, y, available, seldom=True))

    @jax.custom_jvp
    def decoded(leaves, y, available, given):
        return (plain if sets else _merging(plain))(leaves, y, available, given)

    def derivative(primals, tangents):
        # With the tangents that there are: those of a code take half of the program.
        values, structure = jax.tree.flatten(primals[:2])
        moves = [not isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents[:2])]
        moving, still = eqx.partition(values, moves)

        def of_moving(moving: list[Any]) -> Decoded:
            leaves, y = jax.tree.unflatten(structure, eqx.combine(moving, still))
            leaves, y, available = _alike((leaves, y, primals[2]))
            own = eqx.combine(leaves, rest)
            if not sets:
                return _carefully(own, y, available)

            def of_set(mask: Array) -> Decoded:
                return _carefully(own, y, jnp.broadcast_to(mask, y.shape[:2]))

            return jax.vmap(of_set)(available)

        change, _ = eqx.partition(jax.tree.leaves(tangents[:2]), moves)
        return jax.jvp(of_moving, (moving,), (change,))

    decoded.defjvp(derivative, symbolic_zeros=True)
    return decoded(leaves, y, available, given)


def _alike(tree: State) -> State:
    """Return the tree with arrays that all vary over the same manual axes, as loops want it."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, alike_in_shard_map(*leaves))


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


def is_steady(matrices: Float[Any, "*sets num_data num_workers"]) -> Bool[Any, ""]:
    """Return whether the product with these matrices loses no digits.

    Above a sum of 32 of a row's magnitudes it loses some that the regression itself keeps. Two
    close workers then carry the spline over a wide gap: their entries are large and of opposite
    sign. 32 roundings of a unit are 2e-6 in float32.
    """
    xp = namespace(matrices)
    return xp.max(xp.sum(xp.abs(matrices), axis=-1), initial=0) <= 32


def all_finite(y: Float[Array, "*groups num_workers m"]) -> Bool[Array, "*groups num_workers"]:
    return jnp.all(jnp.isfinite(y), axis=-1)


@eqx.filter_jit  # so that a program that needs it twice has it once
def _fitted(code: Any, responded: Bool[Array, "sets num_workers"]) -> tuple[Any, Array]:
    """Return the decoder's map of each set, and what it recovers."""
    return jax.vmap(lambda mask: (code.decoder_map(mask), code.recovered(mask)))(responded)


def _carefully(code: Any, y: Array, available: Array, *, seldom: bool = False) -> Decoded:
    """Decode answers of which some may be broken, or whose matrix would lose digits."""
    responded = available & all_finite(y)
    return _applied(_fitted(code, responded), y, responded, seldom=seldom)


def _applied(
    fitted: tuple[Any, Array], y: Array, responded: Array, *, seldom: bool = False
) -> Decoded:
    """Decode the answers that came by the most accurate way.

    `seldom` is for a branch that few calls take, and that is not differentiated. There, the way is
    a product where that will do, and groups come one by one: each call gets the memory of all
    branches. With all at once that was 74 MiB instead of 6 for 64 groups of (100, 20) and 1,000
    coordinates, and every call took 11.0 ms instead of 9.0 on two CPU cores.
    """
    maps, recovered = fitted
    steady = is_steady(maps.matrix)

    def of_group(group: tuple[Any, ...]) -> Array:
        one, y, responded, recovered = group
        clean = jnp.where(responded[:, None], y, 0).astype(working_dtype(y.dtype))

        def accurately(y: Array) -> Array:
            return jnp.where(recovered[:, None], one.apply(y), jnp.nan)

        def as_needed(y: Array) -> Array:
            matrix = jnp.where(recovered[:, None], one.matrix, jnp.nan)  # and so is a row's product
            return _unless(steady, multiply(matrix[None], y[None])[0], lambda: accurately(y))

        if not seldom:
            return accurately(clean)
        # An accelerator's host would wait for the condition longer than the accurate way takes.
        return jax.lax.platform_dependent(clean, cpu=as_needed, default=accurately)

    groups = maps, y, responded, recovered
    if not seldom:
        predictions = jax.vmap(of_group)(groups)
    elif y.shape[0] == 1:
        predictions = of_group(jax.tree.map(lambda leaf: leaf[0], groups))[None]
    else:
        predictions = jax.lax.map(of_group, groups)
    return Decoded(predictions, responded, recovered)


def _sets_in_turns(code: Any, y: Array, available: Array) -> Decoded:
    """Decode under straggler sets with one regression in the program, as it compiles.

    The first turn is of all groups. If need be, one for each group follows.
    """
    groups = y.shape[0]

    def turn(state: tuple[Decoded, Array]) -> tuple[Decoded, Array]:
        so_far, place = state
        first, group = place < 0, jnp.maximum(place, 0)
        own = jax.lax.dynamic_index_in_dim(y, group, keepdims=False)
        responded = available & (first | all_finite(own))
        fitted = _fitted(code, responded)

        def of_all() -> tuple[Decoded, Array]:
            return multiplied(y, available, Matrices(fitted[0].matrix, fitted[1]), sets=True)

        def of_group() -> tuple[Decoded, Array]:
            every = jnp.broadcast_to(own, (len(responded), *own.shape))
            parts = _applied(fitted, every, responded)
            update = jax.lax.dynamic_update_index_in_dim
            made = jax.tree.map(lambda whole, part: update(whole, part, group, 1), so_far, parts)
            return made, jnp.zeros_like(first)

        made, sound = jax.lax.cond(first, of_all, of_group)
        return made, jnp.where(sound, groups, place + 1)

    def of_all(maps: Any, recovered: Array) -> Decoded:
        return multiplied(y, available, Matrices(maps.matrix, recovered), sets=True)[0]

    shape = jax.eval_shape(lambda: of_all(*_fitted(code, available)))
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
    start, place, _ = _alike((start, jnp.full((), -1), y))
    return jax.lax.while_loop(lambda state: state[1] < groups, turn, (start, place))[0]


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


def _merging(decode: Callable[..., Decoded]) -> Callable[..., Decoded]:
    """Return a decoder of groups that `jax.vmap` gives more groups.

    Else what one group needs, once more, would be done for each, and selected: 64 groups of
    (100, 20) and 1,000 coordinates took 80 ms on two CPU cores, and 8 by `decode_groups`.
    """
    merged = jax.custom_batching.custom_vmap(decode)

    @merged.def_vmap
    def _(size, batched, leaves, y, available, given):
        of_code, of_y, of_mask, of_given = batched
        groups = y.shape[int(of_y)]

        def merge(leaf: Array, own: bool) -> Array:
            leaf = leaf if own else leaf[None]
            leaf = jnp.broadcast_to(leaf, (size, groups, *leaf.shape[2:]))
            return leaf.reshape(size * groups, *leaf.shape[2:])

        if any(jax.tree.leaves(of_code)):  # each group has a code of its own
            axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
            found = jax.vmap(decode, axes, axis_size=size)(leaves, y, available, given)
        else:
            one_for_all = given is not None and not of_given.decoder and len(given.decoder) == 1
            given = given if one_for_all else jax.tree.map(merge, given, of_given)
            found = merged(leaves, merge(y, of_y), merge(available, of_mask), given)
            found = jax.tree.map(lambda leaf: leaf.reshape(size, groups, *leaf.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return merged


def mask_mixed_groups(
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None,
) -> tuple[Bool[Array, "groups num_workers"], Matrices | None]:
    """Mask out groups in which parts that are not coded differ; return their matrices if given."""
    if all(map(is_float, jax.tree.leaves(x))):
        return available, given
    return available & same_within_group(x, 2)[:, None], None
