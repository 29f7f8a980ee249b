"""A code made ready for a stream of queries that come one by one, and not always K of them.

A coded data point whose encoder row is one-hot is a query itself. It can be sent the moment the
query arrives, and its answer is exact; the others wait until their group is complete. Interleaved
and repeated codes have a row of its own for every query, those of the published layouts have none.

A group that is complete with fewer than K queries gets a smaller code on the same workers' points:
an encoder through some of the alphas, and the same decoder, read there. That keeps more than to
fill it up with repeats or with earlier queries, as `bench/short_groups.py` measures: of 2 queries
behind K = 4, N = 8 and one's own worker missing, 0.0 % of labels change, against 0.4 and 12 %.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped

from ..codes import (
    AbstractCode,
    Berrut,
    Form,
    Matrices,
    NeRCC,
    berrut_matrix,
    decode_groups,
    encoder_rows,
    known_decoders,
)
from ..evaluation import agree_on_labels
from ..pools._steps import encode_on_host, shared_decoder
from ..splines import smoothing_matrix_on_host
from ._query_doubt import error_probability_from_answers, features_of

# A spline's rows are one-hot to rounding.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Layout:
    """The coding of some number of queries: `matrix` is the encoder for as many.

    `own[i]` are the coded data points that are query i, `place_of` says the reverse, -1 for those
    that mix queries. `extras` are to be sent when the group is complete: beyond those that were
    sent as the queries came, as much redundancy for each query as in a full group.
    """

    matrix: Float[np.ndarray, "num_workers queries"]
    place_of: Int[np.ndarray, " num_workers"]
    own: tuple[Int[np.ndarray, " _"], ...]  # each of its own length
    extras: Int[np.ndarray, " extras"]


class Look(NamedTuple):
    """Decoded predictions by place, and, for a code with a doubt, its features (see `judge`)."""

    predictions: Shaped[np.ndarray, "rows num_data ..."]
    recovered: Bool[np.ndarray, " num_data"]
    features: Float[np.ndarray, "rows num_data features"] | None = None
    told: Bool[np.ndarray, "rows num_data"] | None = None


class Coder:
    """A code, the layout of a group of each size, and its decoder.

    The i-th query of a group stands at the i-th alpha of an order in which any first few are spread
    out. `systematic`: each has coded data points of its own, the first of which is sent when it
    arrives (`first[i]`). `guesses`: a query none of whose own are answered can be decoded.
    `doubts`: what is decoded has a deviation, which tells how far to trust it. `curved`: queries
    are decoded the better, the more alike those at neighbouring alphas are.
    """

    def __init__(
        self, code: AbstractCode, models: Sequence[int] = (0,), *, form: Form | None = None
    ):
        """`models` are the pool's for the code's `worker_models`, the served one first.

        `form`: of what answers are joined, where each part has a label of its own.
        """
        self.code, self.form = code, form
        self.num_data, self.num_workers = code.num_data, code.num_workers
        self.kinds = [models[kind] for kind in code.worker_models]
        self._order = _spread(code)
        self._decode, self._judge = shared_decoder(code), jax.jit(self.judge)
        # Whether answers have the same label, or all of several.
        self.agree = jax.jit(functools.partial(agree_on_labels, form=form))
        matrices = few_encoders(code, self._order)
        own = _own(_place_of(matrices[-1]), self.num_data)
        self.systematic = all(len(points) for points in own)
        self.first = [points[: int(self.systematic)] for points in own]
        without = np.ones(self.num_workers, bool)
        without[own[0]] = False
        self.guesses = bool(np.asarray(code.recovered(jnp.asarray(without)))[self._order[0]])
        self.doubts = self.guesses and isinstance(code, NeRCC)
        self.curved = self.guesses and isinstance(code, NeRCC | Berrut)
        self._layouts = [self._layout(matrix) for matrix in matrices]

    def layout(self, queries: int) -> Layout:
        return self._layouts[queries - 1]

    def _layout(self, matrix: np.ndarray) -> Layout:
        queries = matrix.shape[1]
        # Of a code that must mix queries anyway, one that happens to be a query is none to rely on.
        place_of = _place_of(matrix) if self.systematic else np.full(len(matrix), -1)
        extras = _by_use(self.code, self._order[:queries], np.concatenate(self.first[:queries]))
        if self.systematic:
            redundancy = self.num_workers - self.num_data
            extras = extras[: -(-redundancy * queries // self.num_data)]
        return Layout(matrix, place_of, _own(place_of, queries), extras)

    def encode(
        self, x: Shaped[np.ndarray, "rows queries ..."], points: Int[np.ndarray, " points"]
    ) -> Shaped[np.ndarray, "points rows ..."]:
        """Some coded data points of `rows` groups that share workers: of one query each, copies."""
        return encode_on_host(self.layout(x.shape[1]).matrix[points], x)

    def decode(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
    ) -> tuple[Float[np.ndarray, "rows num_data ..."], Bool[np.ndarray, " num_data"]]:
        """Predictions in the queries' order, and which are recovered; `width` as for `look`."""
        predictions, recovered = self._decoded(values, mask, width)
        return predictions[:, self._order], recovered[self._order]

    def assess(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
        weights: Float[np.ndarray, " features"],
    ) -> tuple[
        Float[np.ndarray, "rows num_data ..."],
        Bool[np.ndarray, " num_data"],
        Float[np.ndarray, "rows num_data"],
    ]:
        """As `decode`, and each prediction's doubt, by a `QueryDoubt`'s weights: see `doubts`."""
        found = self.look(values, mask, width)
        assert found.features is not None
        assert found.told is not None
        doubt = error_probability_from_answers(found.features, found.told, weights)[:, self._order]
        return found.predictions[:, self._order], found.recovered[self._order], doubt

    def look(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
    ) -> Look:
        """Decodes by place, and looks at what there is to doubt in that.

        All rows share the workers, so they are more coordinates of one group. Filled up with zeros
        to `width` rows, so that one compiled program does for any number up to it.
        """
        if not self.doubts:
            return Look(*self._decoded(values, mask, width))
        _, rows, *out = values.shape
        filled = _filled(values, width).reshape(self.num_workers, width, -1)
        given = known_decoders(self.code, mask)
        found = self._judge(filled, mask, given)
        predictions, recovered, features, told = map(np.asarray, found)
        predictions = predictions.reshape(width, self.num_data, *out)
        return Look(predictions[:rows], recovered, features[:rows], told[:rows])

    def compare(
        self,
        answers: Float[np.ndarray, "groups num_workers m"],
        originals: Float[np.ndarray, "groups num_data m"],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
    ) -> tuple[Look, Bool[np.ndarray, "groups num_data"]]:
        """`look` at groups' answers, and whether the labels are those of the originals, by place.

        It is what `look` has compiled for the width, and nearly nothing beside that.
        """
        found = self.look(answers.swapaxes(0, 1), mask, width)
        predictions, originals = (
            _filled(each.swapaxes(0, 1), width).swapaxes(0, 1)
            for each in (found.predictions, originals)
        )
        return found, np.asarray(self.agree(predictions, originals))[: len(answers)]

    def _decoded(
        self,
        values: Float[np.ndarray, "num_workers rows ..."],
        mask: Bool[np.ndarray, " num_workers"],
        width: int,
    ) -> tuple[Float[np.ndarray, "rows num_data ..."], Bool[np.ndarray, " num_data"]]:
        _, rows, *out = values.shape
        flat = _filled(values, width).reshape(self.num_workers, 1, -1)
        decoded = self._decode(flat, mask)
        predictions = np.asarray(decoded.predictions).reshape(self.num_data, width, *out)
        return np.swapaxes(predictions, 0, 1)[:rows], np.asarray(decoded.recovered)[0]

    def judge(
        self,
        values: Float[Array, "num_workers rows m"],
        mask: Bool[Array, " num_workers"],
        given: Matrices | None = None,
    ) -> tuple[
        Float[Array, "rows num_data m"],
        Bool[Array, " num_data"],
        Float[Array, "rows num_data features"],
        Bool[Array, "rows num_data"],
    ]:
        """Predictions by place, which are recovered, and what their doubt is told by; in jit."""
        num_workers, rows, outputs = values.shape
        y = values.reshape(1, num_workers, -1)
        decoded = decode_groups(self.code, y, mask[None], given)
        predictions = decoded.predictions.reshape(self.num_data, rows, outputs).swapaxes(0, 1)
        # All rows share the workers, so the spline is factorised once.
        heard = decoded.heard[0]
        y = jnp.where(heard[:, None, None], values, 0).swapaxes(0, 1)
        roughness = jax.vmap(lambda row: self.code.process_variance(row, heard))(y)
        variance = self.code.posterior_variance(heard)
        found = features_of(predictions, roughness, variance, self.form)
        return predictions, decoded.recovered[0], *found

    def places(self, queries: int) -> Int[np.ndarray, " queries"]:
        """Return the alphas that this number of queries stand at."""
        return self._order[:queries]

    def along(self, first: int, number: int) -> Int[np.ndarray, " number"]:
        """So many of a group's queries from the `first` on, in the order of their alphas."""
        places = self._order[first : first + number]
        if isinstance(self.code, NeRCC | Berrut):
            places = np.asarray(self.code.alpha)[places]
        return np.argsort(places)

    def in_order(self, by_place: Float[np.ndarray, " num_data"]) -> Float[np.ndarray, " num_data"]:
        """Return values that belong to the code's alphas, in the queries' order."""
        return by_place[self._order]

    def by_place(self, queries: Float[np.ndarray, "few ..."]) -> Float[np.ndarray, "num_data ..."]:
        """The reverse; zero at the alphas that no query stands at."""
        places = np.zeros((self.num_data, *queries.shape[1:]), queries.dtype)
        places[self._order[: len(queries)]] = queries
        return places


def _filled(x: Shaped[np.ndarray, "a rows ..."], width: int) -> Shaped[np.ndarray, "a width ..."]:
    """x with zeros for further rows."""
    if x.shape[1] == width:
        return x
    filled = np.zeros((len(x), width, *x.shape[2:]), x.dtype)
    filled[:, : x.shape[1]] = x
    return filled


def few_encoders(
    code: AbstractCode, order: Int[np.ndarray, " num_data"]
) -> list[Float[np.ndarray, "num_workers few"]]:
    """Return encoders for 1, 2, ..., K data points, at the first alphas in this order.

    NeRCC's and Berrut's are the code's own through fewer points. Others repeat the data points.
    """
    if not isinstance(code, NeRCC | Berrut):
        full = encoder_rows(code)[:, order]
        repeats = (np.eye(few)[np.arange(code.num_data) % few] for few in _counts(code))
        return [full @ each for each in repeats]
    points = np.asarray(code.alpha), np.asarray(code.beta)
    matrices = []
    for few in _counts(code):
        present = np.zeros(code.num_data, bool)
        present[order[:few]] = True
        if isinstance(code, NeRCC):
            lambda_ = np.asarray(code.lambda_enc)
            matrix = smoothing_matrix_on_host(*points, lambda_, available=present)
        else:
            matrix = berrut_matrix(*points, present)
        matrices.append(matrix[:, order[:few]].astype(points[0].dtype))
    return matrices


def _counts(code: AbstractCode) -> range:
    return range(1, code.num_data + 1)


def _angles(t: ArrayLike) -> np.ndarray:
    """Return the angles of points on the half circle, where Chebyshev points are evenly spaced."""
    return np.arccos(np.clip(np.asarray(t, np.float64), -1, 1))


def _spread(code: AbstractCode) -> Int[np.ndarray, " num_data"]:
    """The data points from the middle on, each next as far as can be from those before."""
    if not isinstance(code, NeRCC | Berrut):
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
    """The coded data points that are not sent yet: each query's nearest, then its second, ..."""
    left = np.setdiff1d(np.arange(code.num_workers), sent)
    if not isinstance(code, NeRCC | Berrut):
        return left
    distance = np.abs(_angles(code.beta)[left][:, None] - _angles(code.alpha)[places])
    chosen: list[int] = []
    while len(chosen) < len(left):
        query = len(chosen) % len(places)
        free = np.setdiff1d(np.arange(len(left)), chosen)
        chosen.append(int(free[np.argmin(distance[free, query])]))
    return left[np.array(chosen, int)]


def _place_of(matrix: np.ndarray) -> Int[np.ndarray, " num_workers"]:
    place = np.argmax(matrix, axis=1)
    one_hot = np.abs(matrix - np.eye(matrix.shape[1])[place]).max(axis=1) < _ROUNDING
    return np.where(one_hot, place, -1)


def _own(place_of: np.ndarray, queries: int) -> tuple[Int[np.ndarray, " _"], ...]:
    return tuple(np.flatnonzero(place_of == place) for place in range(queries))
