"""A scheme on a pool: what it decides before coded data points are sent, and after answers came."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import Decoded, Known, known_decoders, known_encoder, points_of
from ..surrogates import Prepared, Scheme
from ._encoding import encode_on_host


class Judged(NamedTuple):
    """Predictions of groups, each one's doubt and its deviation, where there are such."""

    decoded: Decoded
    doubt: Float[np.ndarray, "groups num_data"] | None = None
    deviation: Float[np.ndarray, "groups num_data"] | None = None


class Sent(NamedTuple):
    """What workers get, worker by worker, and, of a scheme, what it was made from."""

    coded: PyTree[Shaped[np.ndarray, "num_workers groups ..."]]
    points: PyTree[Shaped[np.ndarray, "points ..."]] | None = None
    prepared: Prepared | None = None


def scheme_steps(
    scheme: Scheme,
) -> tuple[Callable[[PyTree], Sent], Callable[[Sent, PyTree, np.ndarray], Judged]]:
    """Two functions: of groups, what to send; of that and (N, groups, ...) answers, predictions.

    The scheme is an argument of both programs: one that has learned more compiles nothing.
    """
    code = scheme.code
    encoder = known_encoder(code)

    def send(x: PyTree[Shaped[np.ndarray, "groups num_data ..."]]) -> Sent:
        points = points_of(x)
        prepared, encoders = _prepare(scheme, points)
        rows = np.asarray(encoder if encoders is None else encoders)
        groups = scheme.groups(points, jax.tree.map(np.asarray, prepared))
        return Sent(jax.tree.map(lambda leaf: encode_on_host(rows, leaf), groups), points, prepared)

    def judge(sent: Sent, values: PyTree, available: Bool[np.ndarray, " num_workers"]) -> Judged:
        assert sent.prepared is not None
        given = None if sent.prepared.points is not None else known_decoders(code, available)
        known = Known(encoder, given)
        found = _conclude(scheme, sent.points, sent.prepared, values, available, known)
        decoded, doubt, deviation = jax.tree.map(np.asarray, found)
        return Judged(decoded, None if scheme.doubt is None else doubt, deviation)

    return send, judge


@eqx.filter_jit
def _prepare(scheme: Scheme, points: PyTree) -> tuple[Prepared, Array | None]:
    points = jax.tree.map(jnp.asarray, points)
    prepared = scheme.prepare(points)
    return prepared, scheme.encoders(prepared)


@eqx.filter_jit
def _conclude(
    scheme: Scheme,
    points: PyTree,
    prepared: Prepared,
    values: PyTree,
    available: ArrayLike,
    known: Known,
) -> tuple[Decoded, Array, Array]:
    points = jax.tree.map(jnp.asarray, points)
    y = jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), values)
    groups = len(jax.tree.leaves(y)[0])
    masks = jnp.broadcast_to(available, (groups, scheme.code.num_workers))
    assessed = scheme.conclude(points, prepared, y, masks, known)

    def by_group(leaf: Array) -> Array:
        return leaf.reshape(groups, scheme.code.num_data, *leaf.shape[1:])

    decoded = assessed.decoded
    predictions = jax.tree.map(by_group, decoded.predictions)
    status = Decoded(predictions, decoded.heard, by_group(decoded.recovered))
    return status, by_group(assessed.doubt), by_group(assessed.deviation)
