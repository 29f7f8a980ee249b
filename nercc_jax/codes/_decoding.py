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
from ..splines.arrays import working_dtype
from ._products import multiply, multiply_sets
from ._trees import is_float, same_within_group

# Above this sum of a decoder row's magnitudes the product with the matrix loses digits that the
# regression itself keeps. Two close workers then carry the spline over a wide gap: their entries
# are large and of opposite sign. 32 roundings of a unit are 2e-6 in float32.
AMPLIFICATION = 32.0

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


@runtime_checkable
class Decoder(Protocol):
    """The part of a code's interface that decoding needs; `AbstractCode` has it."""

    def decoder_map(self, available: Any) -> DecoderMap: ...

    def recovered(self, available: Any) -> Bool[Array, " num_data"]: ...


def decode_vectors(
    code: Decoder,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decode the answers of many groups, each with its own workers.

    `given` are the matrices of these workers where they are made already. A derivative makes them
    again, since it is the code's too; so does an answer that is not finite, for those that are.
    """
    decode = _from_scratch if given is None else _from_matrices
    return _derived(decode, _carefully, code, y, available, given, merges=True)


def _from_matrices(code: Decoder, y: Array, available: Array, given: Matrices) -> Decoded:
    attempt, sound = multiplied(y, available, given)
    return _unless(sound, attempt, lambda: _carefully(code, y, available))


def _from_scratch(code: Decoder, y: Array, available: Array, given: None) -> Decoded:
    """Decode as the platform likes.

    A CPU likes small programs, an accelerator few conditions that the host must wait for.
    """
    del given
    return jax.lax.platform_dependent(
        y,
        available,
        cpu=lambda y, available: _in_a_loop(code, y, available),
        default=lambda y, available: _in_two_attempts(code, y, available),
    )


def _in_two_attempts(code: Decoder, y: Array, available: Array) -> Decoded:
    """Decode with a second regression in the program for what the first does not do for."""
    maps, recovered = _fitted(code, available)
    return _from_matrices(code, y, available, Matrices(maps.matrix, recovered))


def _in_a_loop(code: Decoder, y: Array, available: Array) -> Decoded:
    """Decode with one regression in the program, which a loop turns to again for a broken answer.

    A program's size is the time it takes to compile, and the regression is most of it.
    """

    def attempt(state: tuple[Decoded, Array, Array]) -> tuple[Decoded, Array, Array]:
        responded, first = state[0].responded, state[2]
        maps, recovered = _fitted(code, responded)
        decoded = _multiplied(y, responded, maps.matrix, recovered)
        broken = first & ~_finite(decoded)
        known = _unless(~broken, responded, lambda: responded & all_finite(y))
        steady = _is_steady(maps.matrix)
        # Else the product still holds an answer that is left out, or what is not recovered.
        done = broken | (first & steady & jnp.all(recovered))
        decoded = _unless(done, decoded, lambda: _accurately(maps, y, responded, recovered, steady))
        return Decoded(decoded.predictions, known, recovered), broken, jnp.zeros_like(first)

    start, again = _alike((_nothing(code, y.shape[:1], y, available), jnp.ones((), bool)))
    return jax.lax.while_loop(lambda state: state[1], attempt, (start, again, again))[0]


def _nothing(code: Decoder, lead: tuple[int, ...], y: Array, responded: Array) -> Decoded:
    """Return the state that a loop of attempts starts from."""
    workers, size = y.shape[1:]
    mask = jax.ShapeDtypeStruct((workers,), bool)
    (points,) = jax.eval_shape(lambda mask: code.recovered(mask), mask).shape
    dtype = working_dtype(y.dtype)
    return Decoded(
        jnp.zeros((*lead, points, size), dtype),
        jnp.broadcast_to(responded, (*lead, workers)),
        jnp.zeros((*lead, points), bool),
    )


def multiplied(
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode by the product with these matrices; return also whether that is sound."""
    matrices = jnp.asarray(given.decoder)
    decoded = _multiplied(y, available, matrices, jnp.asarray(given.recovered))
    return decoded, _finite(decoded) & _exact(decoded, matrices)


def _multiplied(y: Array, available: Array, matrices: Array, recovered: Array) -> Decoded:
    recovered = jnp.broadcast_to(recovered, (y.shape[0], recovered.shape[1]))
    return Decoded(multiply(matrices, y), available, recovered)


def decode_sets_in_program(
    code: Decoder,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "sets num_workers"],
) -> Decoded:
    """Decode all groups under each straggler set, as part of a program: axes (sets, groups).

    Each set's matrix is made once. An answer that is not finite makes its worker a straggler in its
    own group only, as everywhere; if there is one, or for a derivative, the groups get matrices of
    their own.
    """
    return _derived(_sets_from_scratch, _sets_carefully, code, y, available)


def _sets_from_scratch(code: Decoder, y: Array, available: Array, given: None) -> Decoded:
    """Decode with one regression in the program: for all groups, then, if need be, for each."""
    del given
    groups = y.shape[0]

    def attempt(state: tuple[Decoded, Array]) -> tuple[Decoded, Array]:
        so_far, turn = state
        first, group = turn < 0, jnp.maximum(turn, 0)
        own = jax.lax.dynamic_index_in_dim(y, group, keepdims=False)
        responded = available & (first | all_finite(own))
        maps, recovered = _fitted(code, responded)

        def of_all() -> Decoded:
            return sets_multiplied(y, available, Matrices(maps.matrix, recovered))[0]

        def with_group() -> Decoded:
            every = jnp.broadcast_to(own, (len(responded), *own.shape))
            return jax.tree.map(
                lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, group, 1),
                so_far,
                _accurately(maps, every, responded, recovered),
            )

        made = _unless(first, _unless(~first, so_far, of_all), with_group)
        done = first & _finite(made) & _exact(made, maps.matrix)
        return made, jnp.where(done, groups, turn + 1)

    start = _nothing(code, (len(available), groups), y, jnp.zeros((), bool))
    start, turn, _ = _alike((start, jnp.full((), -1), y))
    return jax.lax.while_loop(lambda state: state[1] < groups, attempt, (start, turn))[0]


def sets_multiplied(
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "sets num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Return `multiplied` under each straggler set, with a matrix for each: axes (sets, groups)."""
    matrices, recovered = jnp.asarray(given.decoder), jnp.asarray(given.recovered)
    shape = (available.shape[0], y.shape[0])
    decoded = Decoded(
        multiply_sets(matrices, y),
        jnp.broadcast_to(available[:, None], (*shape, available.shape[1])),
        jnp.broadcast_to(recovered[:, None], (*shape, recovered.shape[1])),
    )
    return decoded, _finite(decoded) & _exact(decoded, matrices)


def mask_mixed_groups(
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None,
) -> tuple[Bool[Array, "groups num_workers"], Matrices | None]:
    """Mask out groups in which parts that are not coded differ; return their matrices if given."""
    if all(map(is_float, jax.tree.leaves(x))):
        return available, given
    return available & same_within_group(x, 2)[:, None], None


def _derived(
    decode: Callable[[Decoder, Array, Array, Any], Decoded],
    carefully: Callable[[Decoder, Array, Array], Decoded],
    code: Decoder,
    y: Array,
    available: Array,
    given: Matrices | None = None,
    *,
    merges: bool = False,
) -> Decoded:
    """Decode, with the derivative of the careful way in the code and the answers.

    With `merges`, `jax.vmap` makes further groups.
    """
    # As an argument: what `custom_jvp` closes over must not be traced.
    leaves, rest = eqx.partition(code, eqx.is_array)

    def alike(leaves: PyTree, *arrays: PyTree) -> tuple[Any, ...]:
        leaves, *others = _alike((leaves, *arrays))
        return eqx.combine(leaves, rest), *others

    def plain(leaves: PyTree, *arrays: PyTree) -> Decoded:
        return decode(*alike(leaves, *arrays))

    @jax.custom_jvp
    def decoded(leaves, y, available, given):
        return (_merging(plain) if merges else plain)(leaves, y, available, given)

    def derivative(primals, tangents):
        # With the tangents that there are: those of a code take half of the program.
        values, structure = jax.tree.flatten(primals[:2])
        moves = [not isinstance(t, SymbolicZero) for t in jax.tree.leaves(tangents[:2])]
        moving, still = eqx.partition(values, moves)

        def of_moving(moving: list[Any]) -> Decoded:
            leaves, y = jax.tree.unflatten(structure, eqx.combine(moving, still))
            return carefully(*alike(leaves, y, primals[2]))

        change, _ = eqx.partition(jax.tree.leaves(tangents[:2]), moves)
        return jax.jvp(of_moving, (moving,), (change,))

    decoded.defjvp(derivative, symbolic_zeros=True)
    return decoded(leaves, y, available, given)


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


def _carefully(code: Decoder, y: Array, available: Array) -> Decoded:
    """Decode answers of which some may be broken, or whose matrix would lose digits."""
    responded = available & all_finite(y)
    maps, recovered = _fitted(code, responded)
    return _accurately(maps, y, responded, recovered)


def _sets_carefully(code: Decoder, y: Array, available: Array) -> Decoded:
    def of_set(mask: Array) -> Decoded:
        return _carefully(code, y, jnp.broadcast_to(mask, y.shape[:2]))

    return jax.vmap(of_set)(available)


def _accurately(
    maps: Any, y: Array, responded: Array, recovered: Array, steady: Array | None = None
) -> Decoded:
    """Decode the answers that came: by the product where that is `steady`, else accurately."""

    def of_group(group: tuple[Any, ...]) -> Array:
        one, y, responded, recovered = group
        clean = jnp.where(responded[:, None], y, 0).astype(working_dtype(y.dtype))
        if steady is None:
            predictions = one.apply(clean)
        else:
            ways = (lambda x: multiply(one.matrix, x)), (lambda x: one.apply(x))
            predictions = jax.lax.cond(steady, *ways, clean)
        return jnp.where(recovered[:, None], predictions, jnp.nan)

    groups = maps, y, responded, recovered
    if steady is None or y.shape[0] == 1:
        predictions = jax.vmap(of_group)(groups)
    else:
        # One by one: this is seldom run, but each call gets the memory of all branches. With all at
        # once that was 74 MiB instead of 6 for 64 groups of (100, 20) and 1,000 coordinates, and
        # every call took 11.0 ms instead of 9.0 on two CPU cores.
        predictions = jax.lax.map(of_group, groups)
    return Decoded(predictions, responded, recovered)


def _fitted(code: Decoder, responded: Bool[Array, "sets num_workers"]) -> tuple[Any, Array]:
    """Return the decoder's map of each set, and what it recovers."""
    return jax.vmap(lambda mask: (code.decoder_map(mask), code.recovered(mask)))(responded)


def all_finite(y: Float[Array, "*groups num_workers m"]) -> Bool[Array, "*groups num_workers"]:
    return jnp.all(jnp.isfinite(y), axis=-1)


def _finite(attempt: Decoded) -> Bool[Array, ""]:
    """Return whether all answers behind a product are finite."""
    return jnp.all(jnp.isfinite(attempt.predictions[..., 0, :]))


def _exact(attempt: Decoded, matrices: Array) -> Bool[Array, ""]:
    """Return whether decoding of finite answers is what one product made of it."""
    return _is_steady(matrices) & jnp.all(attempt.recovered)


def _is_steady(matrices: Array) -> Bool[Array, ""]:
    """Return whether the product with these matrices loses no digits."""
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), initial=0) <= AMPLIFICATION


def _unless(sound: Bool[Array, ""], attempt: State, otherwise: Callable[[], State]) -> State:
    """Return what was attempted, or, where that is not sound, what is made otherwise.

    As `jax.lax.cond`, but a loop of no or one turn: XLA passes a loop's buffers on, and copies a
    branch's (150,528 coordinates from 20 workers on two CPU cores: 1.2 ms against 2.9 ms, of which
    the product is 0.7 ms). And under `jax.vmap` a `cond` always does both.
    """
    done = jnp.ones_like(sound)
    return jax.lax.while_loop(
        lambda state: ~state[1], lambda _: (otherwise(), done), (attempt, sound)
    )[0]


def _alike(tree: State) -> State:
    """Return the tree with arrays that all vary over the same manual axes, as loops want it."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, alike_in_shard_map(*leaves))
