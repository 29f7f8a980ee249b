"""A scheme on a pool: what it decides before coded data points are sent, and after answers came."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import Decoded, Known, known_decoders, known_encoder, points_of
from ..risk import ErrorBars, error_bars
from ..schemes import PreparedInputs, Scheme
from ._encoding import encode_on_host


class Judged(NamedTuple):
    """Predictions of groups, each one's doubt and its deviation, where there are such."""

    decoded: Decoded
    doubt: Float[np.ndarray, "groups num_data"] | None = None
    deviation: Float[np.ndarray, "groups num_data"] | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """When a prediction is good enough: its error bar within a tolerance, or few labels wrong.

    Neither: all are. `coverage` is the error bars'.
    """

    tolerance: float | None = None
    max_disagreement: float | None = None
    coverage: float = 0.9

    def score(
        self, bars: ErrorBars | None, judged: Judged
    ) -> Float[np.ndarray, "groups num_data"] | None:
        """What says how doubtful each is; None where nothing does."""
        if self.tolerance is None:
            return judged.doubt if self.max_disagreement is not None else None
        assert judged.deviation is not None
        bar = np.asarray(error_bars(jnp.asarray(judged.deviation), bars, self.coverage))
        return np.where(judged.decoded.recovered, bar, np.inf)


class Sent(NamedTuple):
    """What workers get, worker by worker, and, of a scheme, what it was made from.

    `encoders` are the groups' own, where they have such."""

    coded: PyTree[Shaped[np.ndarray, "num_workers groups ..."]]
    points: PyTree[Shaped[np.ndarray, "points ..."]] | None = None
    prepared: PreparedInputs | None = None
    encoders: Float[np.ndarray, "groups num_workers num_data"] | None = None


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
        coded = jax.tree.map(lambda leaf: encode_on_host(rows, leaf), groups)
        return Sent(coded, points, prepared, None if encoders is None else rows)

    def judge(
        sent: Sent, values: PyTree, available: Bool[np.ndarray, "*groups num_workers"]
    ) -> Judged:
        assert sent.prepared is not None
        given = None if sent.prepared.points is not None else known_decoders(code, available)
        known = Known(encoder, given)
        found = _conclude(scheme, sent.points, sent.prepared, values, available, known)
        decoded, doubt, deviation = jax.tree.map(np.asarray, found)
        return Judged(decoded, None if scheme.error_probability is None else doubt, deviation)

    return send, judge


@eqx.filter_jit
def _prepare(scheme: Scheme, points: PyTree) -> tuple[PreparedInputs, Array | None]:
    points = jax.tree.map(jnp.asarray, points)
    prepared = scheme.prepare(points)
    return prepared, scheme.encoders(prepared)


@eqx.filter_jit
def _conclude(
    scheme: Scheme,
    points: PyTree,
    prepared: PreparedInputs,
    values: PyTree,
    available: ArrayLike,
    known: Known,
) -> tuple[Decoded, Array, Array]:
    points = jax.tree.map(jnp.asarray, points)
    y = jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), values)
    groups = len(jax.tree.leaves(y)[0])
    masks = jnp.broadcast_to(available, (groups, scheme.code.num_workers))
    assessed = scheme.decode(points, prepared, y, masks, known)

    def by_group(leaf: Array) -> Array:
        return leaf.reshape(groups, scheme.code.num_data, *leaf.shape[1:])

    decoded = assessed.decoded
    predictions = jax.tree.map(by_group, decoded.predictions)
    status = Decoded(predictions, decoded.heard, by_group(decoded.recovered))
    return status, by_group(assessed.error_probability), by_group(assessed.deviation)
