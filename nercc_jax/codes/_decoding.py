"""Decoding: one product with the decoder's matrix, and what happens where that would not do.

Nearly always every value that came back is finite, the decoder well conditioned and everything
recovered; then decoding is one product. So that is tried, and what it shows decides: a broken
value leaves its mark in every row of the product (0 * NaN is NaN), so one row tells all.

The derivative is that of the careful way, whose derivative is the plain product's: the decoder's
matrix for the workers that were heard times their answers, zeros where nobody was heard. So a
straggler's value reaches no gradient, and no branch or loop is ever differentiated.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ._products import multiply, multiply_sets
from ._trees import alike_beside, is_float

# Above this sum of a decoder row's magnitudes the product with the matrix loses digits that the
# regression itself keeps. Two close workers then carry the spline over a wide gap: their entries
# are large and of opposite sign. 32 roundings of a unit are 2e-6 in float32.
AMPLIFICATION = 32.0


class Decoded(eqx.Module):
    """Predictions, and what they rest on. With groups, every field has a leading axis.

    `predictions` are NaN where `recovered` is false. `heard` are the workers whose answers were
    used: available, and finite in every coordinate.
    """

    predictions: PyTree[Float[Array, "..."]]
    heard: Bool[Array, "... num_workers"]
    recovered: Bool[Array, "..."]


class Matrices(eqx.Module):
    """What decoding asks of a code, for the straggler set of each group, or of all groups."""

    decoder: Float[Array | np.ndarray, "sets num_data num_workers"]
    recovered: Bool[Array | np.ndarray, "sets num_data"]


@runtime_checkable
class Decoder(Protocol):
    """What decoding asks of a code; `AbstractCode` has it."""

    def decoder_matrix(self, available: Any) -> Float[Array, "num_data num_workers"]: ...

    def recovered(self, available: Any) -> Bool[Array, " num_data"]: ...

    def regress(self, y: Any, available: Any) -> Float[Array, "num_data m"]: ...


def decode_vectors(
    code: Decoder,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decodes the answers of many groups, each with its own workers.

    `given` are the matrices of these workers where they are made already. A derivative makes them
    again, since it is the code's too; so does an answer that is not finite, for those heard.
    """

    def quickly(code: Decoder, y: Array, available: Array, given: Matrices | None) -> Decoded:
        if given is None:
            matrices, recovered = _matrices(code, available)
        else:
            matrices, recovered = jnp.asarray(given.decoder), jnp.asarray(given.recovered)
        recovered = jnp.broadcast_to(recovered, (len(y), recovered.shape[1]))
        attempt = Decoded(multiply(matrices, y), available, recovered)
        return _unless(
            _sound(attempt, matrices),
            lambda: attempt,
            lambda: _in_the_loop(code, y, available),
        )

    return _derived(quickly, _carefully, code, y, available, given)


def decode_sets(
    code: Decoder,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "sets num_workers"],
) -> Decoded:
    """Decodes the answers of all groups under each straggler set: leading axes (sets, groups).

    Each set's matrix is made once. An answer that is not finite makes its worker a straggler in its
    own group only, as everywhere; if there is one, or for a derivative, the groups get matrices of
    their own.
    """

    shape = (len(available), len(y))

    def everywhere(mask: Array) -> Array:
        return jnp.broadcast_to(mask, y.shape[:2])

    def quickly(code: Decoder, y: Array, available: Array, given: None) -> Decoded:
        matrices, recovered = _matrices(code, available)
        attempt = Decoded(
            multiply_sets(matrices, y),
            jnp.broadcast_to(available[:, None], (*shape, available.shape[1])),
            jnp.broadcast_to(recovered[:, None], (*shape, recovered.shape[1])),
        )
        return _unless(
            _sound(attempt, matrices),
            lambda: attempt,
            lambda: jax.lax.map(lambda mask: _in_the_loop(code, y, everywhere(mask)), available),
        )

    def carefully(code: Decoder, y: Array, available: Array) -> Decoded:
        return jax.vmap(lambda mask: _carefully(code, y, everywhere(mask)))(available)

    return _derived(quickly, carefully, code, y, available)


def alike_only(
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None,
) -> tuple[Bool[Array, "groups num_workers"], Matrices | None]:
    """Masks without the groups in which something beside differs, and their matrices if given."""
    if all(map(is_float, jax.tree.leaves(x))):
        return available, given
    return available & alike_beside(x, 2)[:, None], None


def _derived(
    quickly: Callable[..., Decoded],
    carefully: Callable[..., Decoded],
    code: Decoder,
    y: Array,
    available: Array,
    given: Matrices | None = None,
) -> Decoded:
    """The quick way, with the derivative of the careful one, in the code and the answers."""
    # As an argument: what `custom_jvp` closes over must not be traced.
    leaves, rest = eqx.partition(code, eqx.is_array)

    @jax.custom_jvp
    def decode(leaves, y, available, given):
        return quickly(eqx.combine(leaves, rest), y, available, given)

    @decode.defjvp
    def _(primals, tangents):
        def way(leaves, y, available):
            return carefully(eqx.combine(leaves, rest), y, available)

        return jax.jvp(way, primals[:3], tangents[:3])

    return decode(leaves, y, available, given)


def _matrices(
    code: Decoder, available: Bool[Array, "sets num_workers"]
) -> tuple[Float[Array, "sets num_data num_workers"], Bool[Array, "sets num_data"]]:
    """The decoder's matrix of each set, and what it recovers."""
    return jax.vmap(lambda mask: (code.decoder_matrix(mask), code.recovered(mask)))(available)


def _sound(attempt: Decoded, matrices: Array) -> Bool[Array, ""]:
    """Whether decoding is what one product made of it."""
    finite = jnp.all(jnp.isfinite(attempt.predictions[..., 0, :]))
    return finite & jnp.all(attempt.recovered) & _well_conditioned(matrices)


def _unless(
    sound: Bool[Array, ""], attempt: Callable[[], PyTree], carefully: Callable[[], PyTree]
) -> PyTree:
    """What is attempted, or, where that is not sound, what is made carefully: as `jax.lax.cond`.

    But a loop of no or one turn: XLA passes a loop's buffers on, and copies a branch's (150,528
    coordinates from 20 workers on two CPU cores: 1.2 ms against 2.9 ms, of which the product is
    0.7 ms). And under `jax.vmap` a `cond` always does both. It pays off where the attempt, which is
    always made, nearly always is sound.
    """
    done = jnp.ones((), bool)
    return jax.lax.while_loop(
        lambda state: ~state[1], lambda _: (carefully(), done), (attempt(), sound)
    )[0]


def _well_conditioned(matrices: Float[Array, "sets num_data num_workers"]) -> Bool[Array, ""]:
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), initial=0) <= AMPLIFICATION


def _carefully(
    code: Decoder, y: Array, available: Array, choose: Callable[..., Array] = _unless
) -> Decoded:
    """Decodes answers of which some may be broken, or whose matrix would lose digits."""
    heard = available & jnp.all(jnp.isfinite(y), axis=-1)
    clean = jnp.where(heard[..., None], y, 0)
    matrices, recovered = _matrices(code, heard)
    predictions = _accurately(code, heard, matrices, clean, choose)
    return Decoded(jnp.where(recovered[..., None], predictions, jnp.nan), heard, recovered)


# Within a loop's turn a `cond` makes no product that is not wanted: 4.7 ms against 7.8 as above.
_in_the_loop = functools.partial(_carefully, choose=jax.lax.cond)


def _accurately(
    code: Decoder,
    heard: Bool[Array, "groups num_workers"],
    matrices: Float[Array, "groups num_data num_workers"],
    clean: Float[Array, "groups num_workers m"],
    choose: Callable[..., Array],
) -> Float[Array, "groups num_data m"]:
    """The product of matrices and finite answers, by the regression itself where that is better;
    with the product's derivative."""
    leaves, rest = eqx.partition(code, eqx.is_array)

    @jax.custom_jvp
    def product(leaves, heard, matrices, clean):
        def regress():
            decoded = jax.vmap(eqx.combine(leaves, rest).regress)(clean, heard)
            return decoded.astype(jnp.promote_types(clean.dtype, jnp.float32))

        return choose(_well_conditioned(matrices), lambda: multiply(matrices, clean), regress)

    @product.defjvp
    def _(primals, tangents):
        return product(*primals), jax.jvp(multiply, primals[2:], tangents[2:])[1]

    return product(leaves, heard, matrices, clean)
