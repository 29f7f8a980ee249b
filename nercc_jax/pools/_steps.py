"""Both steps of coded inference on a pool: encoding on the host, and decoding of the answers.

A code by itself and a scheme have the same two steps, so that a pool carries out either.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import AbstractCode, Decoded, decode_groups
from ..codes._kept import CachedMatrices, encoder_of, known_decoders
from ..codes._trees import is_float, points_of, to_device
from ..risk import Accuracy, ErrorBars
from ..risk._error_bars import error_bars
from ..schemes import Scheme
from ..schemes._scheme import PreparedInputs


class ScoredPredictions(NamedTuple):
    """Predictions of groups, with error probabilities and deviations where there are any."""

    decoded: Decoded
    error_probability: Float[np.ndarray, "groups num_data"] | None = None
    deviation: Float[np.ndarray, "groups num_data"] | None = None


def score_of(
    target: Accuracy, bars: ErrorBars | None, predictions: ScoredPredictions
) -> Float[np.ndarray, "groups num_data"] | None:
    """Return error bars or error probabilities; None where all predictions will do."""
    if target.tolerance is None:
        return predictions.error_probability if target.max_disagreement is not None else None
    assert predictions.deviation is not None
    bar = np.asarray(error_bars(jnp.asarray(predictions.deviation), bars, target.coverage))
    return np.where(predictions.decoded.recovered, bar, np.inf)


class Outgoing(NamedTuple):
    """Inputs of the workers, worker by worker, and for a scheme what they were made from.

    `encoders` are the groups' own, where they have such.
    """

    coded: PyTree[Shaped[np.ndarray, "num_workers groups ..."]]
    points: PyTree[Shaped[np.ndarray, "points ..."]] | None = None
    prepared: PreparedInputs | None = None
    encoders: Float[np.ndarray, "groups num_workers num_data"] | None = None


Encode: TypeAlias = Callable[[PyTree], Outgoing]
Decode: TypeAlias = Callable[[Outgoing, PyTree, np.ndarray], ScoredPredictions]


def encode_on_host(
    encoder: Float[np.ndarray, "*groups num_workers num_data"],
    x: Shaped[np.ndarray, "groups num_data ..."],
) -> Shaped[np.ndarray, "num_workers groups ..."]:
    """Return coded data points, worker by worker; each group may have an encoder of its own."""
    groups, num_data, *shape = x.shape
    num_workers = encoder.shape[-2]
    if not is_float(x):  # it is the same for all data points of a group, and goes to all workers
        return np.broadcast_to(x[:, 0], (num_workers, groups, *shape))
    encoder, vectors = encoder.astype(x.dtype), x.reshape(groups, num_data, -1)
    if encoder.ndim == 2:  # one product for all groups
        coded = encoder @ np.moveaxis(vectors, 1, 0).reshape(num_data, -1)
    else:
        coded = np.moveaxis(encoder @ vectors, 1, 0)
    return coded.reshape(num_workers, groups, *shape)


def code_steps(code: AbstractCode) -> tuple[Encode, Decode]:
    """Return both steps of a code by itself, as `scheme_steps` does; nothing is compiled."""
    encoder, decode = encoder_of(code), shared_decoder(code)

    def encode(x: PyTree) -> Outgoing:
        return Outgoing(jax.tree.map(lambda leaf: encode_on_host(encoder, leaf), x))

    def decoded(_: Outgoing, values: PyTree, available: np.ndarray) -> ScoredPredictions:
        return ScoredPredictions(jax.tree.map(np.asarray, decode(values, available)))

    return encode, decoded


def shared_decoder(code: AbstractCode) -> Callable[[PyTree, np.ndarray], Decoded]:
    """Return a function that decodes (N, groups, ...) answers that share a mask."""

    def decode(values: PyTree, available: np.ndarray) -> Decoded:
        y = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), values)
        groups = len(jax.tree.leaves(y)[0])
        masks = np.broadcast_to(np.asarray(available), (groups, code.num_workers))
        return decode_groups(code, y, masks)

    return decode


def scheme_steps(scheme: Scheme) -> tuple[Encode, Decode]:
    """Return both steps of a scheme.

    The scheme is an argument of both programs: one that has learned more compiles nothing.

    Returns:
        A function from groups (groups, K, ...) to what is sent, and one from that, answers
        (N, groups, ...) and their mask to predictions.
    """
    code = scheme.code
    encoder = encoder_of(code)

    def encode(x: PyTree[Shaped[np.ndarray, "groups num_data ..."]]) -> Outgoing:
        points = points_of(x)
        prepared, encoders = _prepare(scheme, points)
        rows = np.asarray(encoder if encoders is None else encoders)
        groups = scheme.groups(points, jax.tree.map(np.asarray, prepared))
        coded = jax.tree.map(lambda leaf: encode_on_host(rows, leaf), groups)
        return Outgoing(coded, points, prepared, None if encoders is None else rows)

    def decode(
        outgoing: Outgoing, values: PyTree, available: Bool[np.ndarray, "*groups num_workers"]
    ) -> ScoredPredictions:
        assert outgoing.prepared is not None
        given = None if outgoing.prepared.points is not None else known_decoders(code, available)
        known = CachedMatrices(encoder, given)
        found = _decode(scheme, outgoing.points, outgoing.prepared, values, available, known)
        decoded, error_probability, deviation = jax.tree.map(np.asarray, found)
        return ScoredPredictions(
            decoded, None if scheme.error_probability is None else error_probability, deviation
        )

    return encode, decode


@eqx.filter_jit
def _prepare(scheme: Scheme, points: PyTree) -> tuple[PreparedInputs, Array | None]:
    points = to_device(points)
    prepared = scheme.prepare(points)
    return prepared, scheme.encoders(prepared)


@eqx.filter_jit
def _decode(
    scheme: Scheme,
    points: PyTree,
    prepared: PreparedInputs,
    values: PyTree,
    available: ArrayLike,
    known: CachedMatrices,
) -> tuple[Decoded, Array, Array]:
    points = to_device(points)
    y = jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), values)
    groups = len(jax.tree.leaves(y)[0])
    masks = jnp.broadcast_to(available, (groups, scheme.code.num_workers))
    assessed = scheme.decode(points, prepared, y, masks, known)

    def by_group(leaf: Array) -> Array:
        return leaf.reshape(groups, scheme.code.num_data, *leaf.shape[1:])

    decoded = assessed.decoded
    predictions = jax.tree.map(by_group, decoded.predictions)
    status = Decoded(predictions, decoded.responded, by_group(decoded.recovered))
    return status, by_group(assessed.error_probability), by_group(assessed.deviation)
