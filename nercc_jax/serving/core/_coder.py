"""A code prepared for a stream of queries that arrive one by one, not always K at a time.

A coded data point whose encoder row is one-hot is a query itself. It is sent as soon as the query
arrives, and its answer is exact; the other coded data points wait until their group is complete.
Interleaved and repeated codes have such a row for every query. The published layouts have none, so
they are not suitable for a server: all their answers would be approximate.

A group with fewer than K queries gets a smaller code on the same workers' points: an encoder
through some of the alphas, and the same decoder, evaluated there. This is more accurate than
filling the group with repeated or earlier queries: for 2 queries of digits with K = 4, N = 8, and
the own worker of one missing, 0.0 % of labels changed, compared with 0.4 and 12 %.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int, Shaped

from ...codes import (
    AbstractCode,
    Berrut,
    BerrutSpline,
    Decoded,
    LearnedDecoder,
    NeRCC,
    decode_groups,
)
from ...codes.berrut import berrut_matrix
from ...codes.kept import copies_of, encoder_of, kept_matrices
from ...codes.trees import Form
from ...codes.workers import encode_on_host
from ...risk import Accuracy, ErrorProbability
from ...risk.error_bars import ErrorScale
from ...risk.features import decoding_features
from ...splines.host import smoothing_matrix_on_host
from ._request import repeat_rows

Score: TypeAlias = ErrorProbability | ErrorScale


# Straggler sets whose variances are cached: 20 MB with 100 workers.
_FEW_MASKS = 256

_ON_A_LINE = (NeRCC, Berrut, BerrutSpline)  # codes with regression points alpha and beta


@dataclasses.dataclass(frozen=True)
class Layout:
    """The coding of a given number of queries.

    Attributes:
        matrix: the encoder.
        place_of: by coded data point, the number of the query that it equals; -1 if it mixes
            queries.
        own: by query, the coded data points that equal the query.
        extras: the coded data points to send when the group is complete, with as much redundancy
            for each query as in a full group.
    """

    matrix: Float[np.ndarray, "num_workers queries"]
    place_of: Int[np.ndarray, " num_workers"]
    own: tuple[Int[np.ndarray, " _"], ...]  # each of its own length
    extras: Int[np.ndarray, " extras"]


class Coder:
    """A code, the layout of a group of each size, and its compiled decoder.

    Queries take the alphas in an order in which any number of first ones are spread out.

    Attributes:
        code: the code.
        order: by query, the index of its alpha.
        first: by query, one coded data point that equals the query, which is sent at once.
        can_decode: whether a query can be decoded when none of its own points is answered.
        has_deviation: whether decoded predictions have posterior deviations. Otherwise only their
            margins rank them, and they have no error bars.
        kinds: by coded data point, the number of the pool's model that computes it.
        form: the parts of an answer with labels of their own; None if an answer is one part.
    """

    def __init__(
        self, code: AbstractCode, models: Sequence[int] = (0,), *, form: Form | None = None
    ):
        """Prepare a code; `models` are the pool's models for its `worker_models`, served one first.

        Raises:
            ValueError: if a query equals none of the code's coded data points.
        """
        self.code, self.form = code, form
        self.num_data, self.num_workers = code.num_data, code.num_workers
        self.kinds = [models[kind] for kind in code.worker_models]
        self.order = _spread(code)
        self._variances = functools.lru_cache(_FEW_MASKS)(self._make_variances)
        matrices = few_encoders(code, self.order)
        own = [np.flatnonzero(each) for each in copies_of(matrices[-1]).T]
        if not all(len(points) for points in own):
            raise ValueError(
                f"{type(code).__name__} mixes all queries, so that no answer is exact: use "
                "interleaved or repeated points (`nercc tune --layout interleaved`)"
            )
        self.first = [points[:1] for points in own]
        without = np.ones(self.num_workers, bool)
        without[own[0]] = False
        self.can_decode = bool(np.asarray(code.recovered(jnp.asarray(without)))[self.order[0]])
        self.has_deviation = self.can_decode and isinstance(code, NeRCC | LearnedDecoder)
        self._layouts: list[Layout] = []
        for queries, matrix in enumerate(matrices, 1):
            copies, redundancy = copies_of(matrix), self.num_workers - self.num_data
            place_of = np.where(copies.any(axis=1), copies.argmax(axis=1), -1)
            extras = _by_use(code, self.order[:queries], np.concatenate(self.first[:queries]))
            extras = extras[: -(-redundancy * queries // self.num_data)]
            own = tuple(np.flatnonzero(each) for each in copies.T)
            self._layouts.append(Layout(matrix, place_of, own, extras))

    def layout(self, queries: int) -> Layout:
        """Return the coding of this number of queries."""
        return self._layouts[queries - 1]

    def encode(
        self,
        x: Shaped[np.ndarray, "rows queries ..."],
        points: Int[np.ndarray, " points"],
    ) -> Shaped[np.ndarray, "points rows ..."]:
        """Return some coded data points of `rows` groups."""
        return encode_on_host(self.layout(x.shape[1]).matrix[points], x)

    def decode(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
    ) -> Decoded:
        """Decode answers, which are zero where missing, into predictions in the queries' order.

        All rows have the same workers, so they are further coordinates of one group. They are
        padded to `width` rows by repetition, so that one compiled program serves any number.

        Returns:
            Predictions (rows, num_data, ...), with `responded` and `recovered` for all rows.
        """
        _, rows, *out = values.shape
        flat = repeat_rows(values, width, axis=1).reshape(1, self.num_workers, -1)
        decoded = decode_groups(self.code, flat, np.asarray(mask)[None])
        predictions = np.asarray(decoded.predictions).reshape(self.num_data, width, *out)
        predictions = np.swapaxes(predictions, 0, 1)[:rows, self.order]
        recovered = np.asarray(decoded.recovered)[0, self.order]
        return Decoded(predictions, np.asarray(decoded.responded)[0], recovered)

    def features(
        self, values: Float[np.ndarray, "num_workers rows ..."], decoded: Decoded
    ) -> tuple[Float[np.ndarray, "rows num_data 5"], Bool[np.ndarray, "rows num_data"]]:
        """Return features that rank decoded predictions, and a mask of informative features."""
        predictions, responded = decoded.predictions, decoded.responded
        roughness, variance = np.ones(len(predictions)), np.ones(self.num_data)
        if self.has_deviation:
            variance, root = self._variances(responded.tobytes())
            flat = values.reshape(*values.shape[:2], -1)
            # One answer is subtracted from all, since the product's rounding error grows with their
            # common part. Squares are computed in float64, since they may overflow float32.
            flat = np.where(responded[:, None, None], flat - flat[np.argmax(responded)], 0)
            varies = np.tensordot(root, flat, 1).astype(np.float64)
            roughness = np.mean(varies**2, axis=2).sum(axis=0)
        outputs = predictions.reshape(*predictions.shape[:2], -1)
        return decoding_features(outputs, roughness, variance[self.order], self.form)

    def score(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        decoded: Decoded,
        score: Score,
    ) -> Float[np.ndarray, "rows num_data"]:
        """Return the probability of a wrong label, or the error bar, of each prediction.

        It is 1 or infinite where the features are not informative.
        """
        features, informative = self.features(values, decoded)
        unknown = 1 if isinstance(score, ErrorProbability) else np.inf
        return np.where(informative, score.of_features(features), unknown)

    def ranks(self, accuracy: Accuracy) -> bool:
        """Return whether decoded answers can be ranked for an accuracy: values need deviations."""
        return self.can_decode and (self.has_deviation or accuracy.tolerance is None)

    def _make_variances(
        self, responded: bytes
    ) -> tuple[Float[np.ndarray, " num_data"], Float[np.ndarray, "num_workers num_workers"]]:
        kept = kept_matrices(self.code)
        assert kept is not None  # since the code's arrays are concrete
        variance, root = kept.by_numpy("variances_on_host", np.frombuffer(responded, bool))
        return variance, root.astype(np.float32)


def few_encoders(
    code: AbstractCode, order: Int[np.ndarray, " num_data"]
) -> list[Float[np.ndarray, "num_workers few"]]:
    """Return encoders for 1, 2, ..., K data points, at the first alphas in this order.

    Codes with regression points are fitted through fewer points. Others repeat the data points.
    """
    counts = range(1, code.num_data + 1)
    if not isinstance(code, _ON_A_LINE):
        full = encoder_of(code)[:, order]
        return [full @ np.eye(few)[np.arange(code.num_data) % few] for few in counts]
    points = np.asarray(code.alpha), np.asarray(code.beta)
    matrices = []
    for few in counts:
        present = np.zeros(code.num_data, bool)
        present[order[:few]] = True
        if isinstance(code, NeRCC):
            lambda_ = np.asarray(code.lambda_enc)
            matrix = smoothing_matrix_on_host(*points, lambda_, available=present)
        else:
            matrix = berrut_matrix(*points, present)
        matrices.append(matrix[:, order[:few]].astype(points[0].dtype))
    return matrices


def _angles(t: ArrayLike) -> np.ndarray:
    """Return the angles of points on the half circle, where Chebyshev points are evenly spaced."""
    return np.arccos(np.clip(np.asarray(t, np.float64), -1, 1))


def _spread(code: AbstractCode) -> Int[np.ndarray, " num_data"]:
    """Return the data points from the middle on, each next one farthest from those before it."""
    if not isinstance(code, _ON_A_LINE):
        return np.arange(code.num_data)
    angles = _angles(code.alpha)
    order = [int(np.argmin(np.abs(angles - np.pi / 2)))]
    while len(order) < code.num_data:
        distance = np.abs(angles[:, None] - angles[order]).min(axis=1)
        order.append(int(np.argmax(distance)))
    return np.array(order)


def _by_use(
    code: AbstractCode, places: Int[np.ndarray, " queries"], sent: Int[np.ndarray, " sent"]
) -> Int[np.ndarray, " left"]:
    """Return the coded data points not sent yet: each query's nearest, then its second, ..."""
    left = np.setdiff1d(np.arange(code.num_workers), sent)
    if not isinstance(code, _ON_A_LINE):
        return left
    distance = np.abs(_angles(code.beta)[left][:, None] - _angles(code.alpha)[places])
    chosen: list[int] = []
    while len(chosen) < len(left):
        query = len(chosen) % len(places)
        free = np.setdiff1d(np.arange(len(left)), chosen)
        chosen.append(int(free[np.argmin(distance[free, query])]))
    return left[np.array(chosen, int)]
