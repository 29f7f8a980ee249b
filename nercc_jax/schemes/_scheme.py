"""A code with an order of the data, a surrogate, and a measure of trust."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes import AbstractCode, Decoded, encode_groups
from ..codes._decoding import mask_mixed_groups
from ..codes._grouped import GroupPoints, following_points
from ..codes._kept import CachedMatrices
from ..codes._trees import Form, groups_of, join, to_device
from ..inference import order_points
from ..inference._coded import AbstractScheme, Work
from ..inference.models import Model, call_model, check_model
from ..inference.order import Features
from ..risk import ErrorBars, ErrorProbability
from ..risk._error_bars import error_bars
from ..splines.arrays import native
from ..surrogates import AbstractSurrogate
from ..surrogates.interface import AbstractGroupPrior, check_like, outputs_of_groups
from ..surrogates.kernel import features_of
from ..surrogates.surrogate import decode_with_deviation


class AssessedPredictions(eqx.Module):
    """Predictions in the order in which the data points came, with a measure of trust.

    Data points in groups have an axis of groups in all fields.

    Attributes:
        decoded: Predictions and `recovered`, a row for each data point; `responded` are the workers
            that were used, a row for each group as it was sent.
        deviation: Standard deviations in units of the outputs; infinite where nothing is known.
        error_probability: The probability that the label differs from the model's own; NaN without
            a calibrated `ErrorProbability`, 1 where nothing is recovered (the prediction is NaN
            there).
    """

    decoded: Decoded
    deviation: Float[Array, "*points"]
    error_probability: Float[Array, "*points"]


def select_uncertain(
    error_probability: Float[ArrayLike, " points"],
    *,
    limit: float = 0.0,
    at_most: int | None = None,
) -> Int[np.ndarray, " _"]:
    """Return the data points that the model must answer itself, the most uncertain first.

    Args:
        error_probability: Probabilities of a wrong label.
        limit: Data points above it are selected (`ErrorProbability.limit`). 0 selects all that are
            not certain.
        at_most: The most data points to select.

    Raises:
        ValueError: A probability is NaN, or the limit or the number is negative.
    """
    error_probability = np.asarray(error_probability)
    if np.isnan(error_probability).any():
        raise ValueError(
            "the error probability is NaN: calibrate the scheme with `calibrate_error_probability`"
        )
    if not limit >= 0 or (at_most is not None and at_most < 0):
        raise ValueError(f"limit {limit} and at_most {at_most} must be 0 or positive")
    order = np.argsort(-error_probability, kind="stable")
    return order[: int(np.sum(error_probability > limit))][:at_most]


def reexecute(
    model: Model,
    x: PyTree[Shaped[ArrayLike, "..."]],
    assessed: AssessedPredictions,
    *,
    limit: float = 0.0,
    share: float = 1.0,
    tolerance: float | None = None,
    bars: ErrorBars | None = None,
    coverage: float = 0.9,
) -> AssessedPredictions:
    """Replace uncertain predictions by the model's own answers.

    The replaced predictions are recovered, with an error probability and a deviation of 0. The
    model runs on powers of two of data points, so that few programs are compiled.

    Args:
        model: The served model, a function of a batch.
        x: The data points that were assessed.
        assessed: Their predictions.
        limit: The largest error probability that is left as it is (`select_uncertain`).
        share: The largest share of the data points that the model may answer.
        tolerance: For functions instead of labels: the largest error bar that is left as it is, in
            units of the outputs. The largest bars go first.
        bars: Calibrated error bars (`calibrate_error_bars`). Without, errors are taken as normally
            distributed.
        coverage: The share of errors that a bar covers.

    Raises:
        ValueError: As `select_uncertain`; or the share is outside [0, 1], the tolerance is negative
            or given with a limit, bars are given without a tolerance, the model is in training
            mode, or x is not what was assessed.
    """
    check_model(model)
    lead = assessed.error_probability.shape
    x = jax.tree.map(np.asarray, native(x, "x"))
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    for leaf in jax.tree.leaves(x):
        if leaf.shape[: len(lead)] != lead:
            raise ValueError(f"x has shape {leaf.shape}; assessed are data points {lead}")
    points = assessed.error_probability.size
    score = assessed.error_probability
    if tolerance is not None:
        if limit != 0 or not tolerance >= 0:
            raise ValueError(
                f"tolerance must be 0 or positive, without a limit: {tolerance}, {limit}"
            )
        score, limit = error_bars(assessed.deviation, bars, coverage), tolerance
        score = jnp.where(assessed.decoded.recovered, score, jnp.inf)
    elif bars is not None:
        raise ValueError("error bars go with a tolerance: give one")
    chosen = select_uncertain(score.ravel(), limit=limit, at_most=int(share * points))
    if len(chosen) == 0:
        return assessed
    padded = np.resize(chosen, 1 << (len(chosen) - 1).bit_length())

    few = jax.tree.map(
        lambda leaf: jnp.asarray(leaf.reshape(points, *leaf.shape[len(lead) :])[padded]), x
    )
    own = eqx.filter_jit(call_model)(model, few)
    own = jax.tree.map(lambda leaf: leaf[: len(chosen)], own)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
        raise ValueError("the model's own outputs are not finite")
    places = np.unravel_index(chosen, lead)

    def fill(values: Array, new: ArrayLike) -> Array:
        return values.at[places].set(jnp.asarray(new).astype(values.dtype))

    decoded = assessed.decoded
    predictions = jax.tree.map(fill, decoded.predictions, own)
    status = Decoded(predictions, decoded.responded, fill(decoded.recovered, True))
    deviation = fill(assessed.deviation, 0)
    return AssessedPredictions(status, deviation, fill(assessed.error_probability, 0))


class PreparedInputs(eqx.Module):
    """Decisions of a scheme on a batch before anything is sent.

    Attributes:
        order: The order of the data points in their groups.
        own: The surrogate's outputs on the data points as they came, where they are ordered or
            copied by them.
        points: The regression points of each group; None where all have the code's.
        busy: The workers that get a query; None where all do.
    """

    order: Int[Array | np.ndarray, " points"]
    own: PyTree[Float[Array | np.ndarray, "points ..."]] | None = None
    points: GroupPoints | None = None
    busy: Bool[Array | np.ndarray, "groups num_workers"] | None = None


class Scheme(AbstractScheme):
    """A code, and what is added to it: order, surrogate, trust, and placement of copies.

    `coded_inference(model, scheme)` carries it out:

    >>> import jax.numpy as jnp
    >>> from nercc_jax import NeRCC, Scheme, coded_inference
    >>> scheme = Scheme(NeRCC(4, 8, points="interleaved"), order="pixels")
    >>> infer = coded_inference(lambda x: jnp.sin(x), scheme, with_status=True)
    >>> assessed = infer(jnp.linspace(0, 1, 12)[:, None], jnp.arange(8) != 3)
    >>> assessed.decoded.predictions.shape, assessed.deviation.shape
    ((12, 1), (12,))

    Parts of the data that are not coded (integers, for example) must be the same for all data
    points that are ordered together; a group in which they differ is not recovered. The surrogate
    runs on all data points and coded data points, on the master.

    Attributes:
        code: A code for K data points on N workers.
        surrogate: A cheap model (`fit_surrogate`), or a learner from past answers (`fit_learner`).
        error_probability: Trust in labels (`calibrate_error_probability`), for one model, and for
            data in the order that the scheme has.
        order: What data points are ordered by, within buffers (`order_points`): "pixels" for a
            projection of the data points, "surrogate" for the surrogate's outputs, or a function of
            a batch. None keeps them as they come.
        buffer_size: Data points that are ordered together.
        bars: Trust in numbers (`calibrate_error_bars`).
        follow: Regression points that are as far apart as each group's data points are: by their
            "inputs", or by a function of a batch (features, or the one parameter that they differ
            by). None keeps the code's.
        redundancy: "code" leaves the redundant workers to the code; "uncertain" gives them copies
            of those data points of each group that the surrogate is least certain of: by its
            deviation where it has one (a learner does), else by the probability of its label (a
            student's), which then answers what is lost alone, whatever its theta and kappa. None is
            "uncertain" where the surrogate has a deviation and the code is NeRCC.
        budget: With "uncertain", the mean number of workers for a group: groups with more
            uncertainty get more, up to N. None is always N.
        straggler_share: With "uncertain", the share of the workers that are expected to straggle:
            with more of them, a few data points get several copies.

    Raises:
        ValueError: The order needs a surrogate that is not there, the redundancy cannot be placed,
            or the code has no regression points to move.
    """

    code: AbstractCode
    surrogate: AbstractSurrogate | None = None
    error_probability: ErrorProbability | None = None
    order: Literal["pixels", "surrogate"] | Callable[[PyTree], PyTree] | None = None
    buffer_size: int = eqx.field(static=True, default=1024)
    bars: ErrorBars | None = None
    follow: Literal["inputs"] | Callable[[PyTree], PyTree] | None = None
    redundancy: Literal["code", "uncertain"] | None = eqx.field(static=True, default=None)
    budget: float | None = eqx.field(static=True, default=None)
    straggler_share: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        named = isinstance(self.order, str)
        if named and self.order not in ("pixels", "surrogate"):
            raise ValueError(f"order must be 'pixels', 'surrogate' or a function: {self.order!r}")
        if self.order == "surrogate" and self.surrogate is None:
            raise ValueError("order by 'surrogate' needs a surrogate")
        if isinstance(self.follow, str) and self.follow != "inputs":
            raise ValueError(f"follow must be 'inputs' or a function, not {self.follow!r}")
        if self.redundancy not in (None, "code", "uncertain"):
            raise ValueError(f"redundancy must be 'code' or 'uncertain', not {self.redundancy!r}")
        if self.redundancy == "uncertain" and self.surrogate is None:
            raise ValueError("copies of uncertain points need a surrogate: a learner or a student")
        if not 0 < self.straggler_share < 1:
            raise ValueError(
                f"straggler_share must be a share between 0 and 1, not {self.straggler_share}"
            )
        if self.budget is not None and not self.places_copies:
            raise ValueError("a budget is for redundancy='uncertain'")
        if (self.follow is not None or self.places_copies) and not self._has_points:
            raise ValueError(
                f"{type(self.code).__name__} has no smoothing splines whose points could be moved: "
                "NeRCC has"
            )

    @property
    def places_copies(self) -> bool:
        """Return whether the redundant workers get copies of uncertain data points."""
        if self.redundancy is not None:
            return self.redundancy == "uncertain"
        more = self.code.num_workers > self.code.num_data
        return self._has_deviation and self._has_points and more

    @property
    def _has_points(self) -> bool:
        """Return whether the code has points and lambdas, as NeRCC has."""
        names = {field.name for field in dataclasses.fields(self.code)}
        return {"alpha", "beta", "lambda_enc", "lambda_dec"} <= names

    @property
    def _has_deviation(self) -> bool:
        return self.surrogate is not None and self.surrogate.has_deviation

    @property
    def _doubts_labels(self) -> bool:
        return self.places_copies and not self._has_deviation

    def arrange(self, x: PyTree[Shaped[ArrayLike, "points ..."]]) -> Int[Array, " points"]:
        """Return the order in which data points are coded: `x[order]` is cut into groups of K.

        What the surrogate and the error probability are fitted on must come in this order, too.

        Raises:
            ValueError: As `order_points`.
        """
        cheap = None if self.surrogate is None else self.surrogate.outputs
        return self._arrange(to_device(x), cheap)

    def _arrange(self, x: PyTree, surrogate: Features | None) -> Int[Array, " points"]:
        """Return the order, given the surrogate's outputs on x or a function that makes them."""
        if self.order is None:
            return jnp.arange(len(jax.tree.leaves(x)[0]))
        features = None if isinstance(self.order, str) else self.order
        if self.order == "surrogate":
            features = surrogate
        return order_points(x, self.code.num_data, features=features, buffer_size=self.buffer_size)

    def prepare(self, x: PyTree[Shaped[Array, "points ..."]]) -> PreparedInputs:
        """Decide order, points and copies for data points (whole groups of K); a pure function."""
        code, surrogate = self.code, self.surrogate
        own = None
        if surrogate is not None and (self.order == "surrogate" or self._doubts_labels):
            own = surrogate.outputs(x)  # once, for order, copies and decoding
        arranged = PreparedInputs(self._arrange(x, own), own)
        if self.follow is None and not self.places_copies:
            return arranged
        groups = self.groups(x, arranged)
        number = len(jax.tree.leaves(groups)[0])
        points: Any = code
        alpha, beta = (jnp.tile(each, (number, 1)) for each in (points.alpha, points.beta))
        if self.follow is not None:
            where = None if isinstance(self.follow, str) else self.follow
            places = outputs_of_groups(lambda batch: features_of(where, batch), groups)
            alpha, beta = jax.vmap(lambda each: following_points(code, each))(places)
        busy = None
        if self.places_copies:
            assert surrogate is not None
            if self._doubts_labels:  # a wrong label counts as a squared error of 1
                deviation = jnp.sqrt(self.groups(label_doubt(own), arranged))
            else:
                deviation = surrogate.prior_deviation(groups)
            holds, busy = copies_of_uncertain(
                deviation, code.num_workers, lost=self.straggler_share, budget=self.budget
            )
            beta = jnp.take_along_axis(alpha, holds, axis=1)
        placed = GroupPoints(alpha, beta, exact=self.places_copies)
        return PreparedInputs(arranged.order, own, placed, busy)

    def infer(
        self,
        work: Work,
        x: PyTree[Shaped[Array, "points ..."]],
        available: Bool[Array, "groups num_workers"],
        known: CachedMatrices,
    ) -> AssessedPredictions:
        """Run the scheme on data points, as `coded_inference` does; a pure function.

        Raises:
            ValueError: The surrogate's outputs are not like the model's.
        """
        prepared = self.prepare(x)
        y = work(self.groups(x, prepared), self.encoders(prepared))
        return self.decode(x, prepared, y, available, known)

    def encode(
        self, x: PyTree[Shaped[Array, "points ..."]], encoder: ArrayLike | None
    ) -> tuple[PreparedInputs, PyTree[Float[Array, "groups num_workers ..."]]]:
        """Return the decisions and the coded data points; a pure function.

        Args:
            x: Data points, whole groups of K.
            encoder: The code's encoder matrix, if it is known (`known_encoder`).
        """
        prepared = self.prepare(x)
        return prepared, self._coded(self.groups(x, prepared), prepared, encoder)

    def _coded(self, groups: PyTree, prepared: PreparedInputs, encoder: ArrayLike | None) -> PyTree:
        own = self.encoders(prepared)
        return encode_groups(self.code, groups, encoder if own is None else own)

    def encoders(
        self, prepared: PreparedInputs
    ) -> Float[Array, "groups num_workers num_data"] | None:
        """Return each group's encoder; None where all have the code's."""
        return None if prepared.points is None else prepared.points.encoders(self.code)

    def decode(
        self,
        x: PyTree[Shaped[Array, "points ..."]],
        prepared: PreparedInputs,
        y: PyTree[Float[Array, "groups num_workers ..."]],
        available: Bool[Array, "groups num_workers"],
        known: CachedMatrices,
    ) -> AssessedPredictions:
        """Return predictions of the data points in the order in which they came; a pure function.

        Raises:
            ValueError: The surrogate's outputs are not like the model's.
        """
        found, form = self.decode_sent(x, prepared, y, available, known)
        decoded, deviation, cheap = found
        error_probability = jnp.full(decoded.recovered.shape, jnp.nan, deviation.dtype)
        if self.error_probability is not None:
            error_probability = self.error_probability(decoded.predictions, deviation, cheap)
        points = len(prepared.order)

        def home(values: Array) -> Array:
            values = values.reshape(points, *values.shape[2:])
            return jnp.zeros_like(values).at[prepared.order].set(values)

        predictions = form.split(home(decoded.predictions))
        status = Decoded(predictions, decoded.responded, home(decoded.recovered))
        return AssessedPredictions(status, home(deviation), home(error_probability))

    def decode_sent(
        self,
        x: PyTree[Shaped[Array, "points ..."]],
        prepared: PreparedInputs,
        y: PyTree[Float[Array, "groups num_workers ..."]],
        available: Bool[Array, "groups num_workers"],
        known: CachedMatrices,
    ) -> tuple[tuple[Decoded, Array, Array | None], Form]:
        """Return predictions of the groups as they were sent; a pure function.

        Returns:
            Predictions as vectors, their standard deviations, and the surrogate's outputs after the
            answers; and the structure of the outputs.

        Raises:
            ValueError: As `decode`.
        """
        code, surrogate = self.code, self.surrogate
        if surrogate is not None and self._doubts_labels:
            # Neighbours have nothing to tell of data points that only their copies answer.
            alone = jnp.ones_like(surrogate.theta), jnp.full_like(surrogate.kappa, jnp.inf)
            surrogate = eqx.tree_at(lambda one: (one.theta, one.kappa), surrogate, alone)
        sent = self.groups(x, prepared)
        vectors, form = join(y, 2)
        available = available if prepared.busy is None else available & prepared.busy
        available, given = mask_mixed_groups(sent, available, known.decoders)
        prior = None
        if surrogate is not None:
            coded = self._coded(sent, prepared, known.encoder)
            own = None if prepared.own is None else self.groups(prepared.own, prepared)
            prior = surrogate.group_prior(sent, coded, own)
            check_like(prior.form, form)
        if prepared.points is None:
            decoded, deviation = decode_with_deviation(
                code, surrogate, vectors, available, prior, given
            )
        else:
            decoded, deviation = assess_each(
                code, prepared.points, surrogate, vectors, available, prior
            )
        cheap = None if prior is None else prior.condition(vectors, available).own
        return (decoded, deviation, cheap), form

    def groups(
        self, x: PyTree[Shaped[Array | np.ndarray, "points ..."]], prepared: PreparedInputs
    ) -> PyTree[Shaped[Array | np.ndarray, "groups num_data ..."]]:
        """Return data points, or what belongs to each, in the groups in which they are coded."""
        return groups_of(jax.tree.map(lambda leaf: leaf[prepared.order], x), self.code.num_data)


def assess_each(
    code: AbstractCode,
    points: GroupPoints,
    surrogate: AbstractSurrogate | None,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    prior: AbstractGroupPrior | None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """Decode groups that have regression points of their own, with their deviations."""

    def of_group(own, y, available, prior):
        one = jax.tree.map(lambda leaf: leaf[None], (y, available, prior))
        found = decode_with_deviation(own.of(code), surrogate, *one)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return jax.vmap(of_group)(points, y, available, prior)


def label_doubt(outputs: PyTree[Float[Array, "points ..."]]) -> Float[Array, " points"]:
    """Return 1 minus the probability of each data point's label, the least certain of several.

    Rows of probabilities (none negative, with a sum of 1) are taken as they are, and others as
    logits. Where outputs are not finite, the doubt is 1.

    Raises:
        ValueError: The outputs have no labels.
    """
    form = join(outputs, 1)[1]
    if not form.has_labels:
        raise ValueError(
            f"the surrogate's outputs of shapes {list(form.shapes)} have one number a row, which "
            "is no label to be uncertain of: copies of uncertain values need a learner"
        )

    doubt = jnp.zeros(())
    for part in jax.tree.leaves(outputs):
        given = jnp.all(part >= 0, -1) & (jnp.abs(jnp.sum(part, -1) - 1) < 1e-3)
        probabilities = jnp.where(given[..., None], part, jax.nn.softmax(part))
        best = jnp.argmax(part, axis=-1, keepdims=True)
        # The others' sum: 1 - p would be 0 in float32 for many that are not as certain.
        others = jnp.where(jnp.arange(part.shape[-1]) == best, 0, probabilities)
        least_certain = jnp.max(jnp.sum(others, -1).reshape(len(part), -1), axis=1)
        doubt = jnp.maximum(doubt, jnp.nan_to_num(least_certain, nan=1.0))
    return doubt


def copies_of_uncertain(
    deviation: Float[Array, "groups num_data"],
    num_workers: int,
    *,
    lost: float = 0.1,
    budget: float | None = None,
) -> tuple[Int[Array, "groups num_workers"], Array]:
    """Return the data point of each worker in each group, and which workers have one.

    All data points come once, and uncertain ones again: with the share `lost` of the workers, a
    further copy of a data point that c workers have takes deviation^2 lost^c off the expected
    squared error, and copies go, one by one, where that is most.

    Args:
        deviation: The standard deviation of each data point's prediction, or the root of the
            probability that its label is wrong.
        num_workers: N.
        lost: The share of workers that are expected to straggle.
        budget: The mean number of workers of a group: groups with more uncertainty get more of
            them, up to N, and those left over have nothing to do.

    Raises:
        ValueError: There are fewer workers than data points, or the budget is not between them.
    """
    groups, num_data = deviation.shape
    further = num_workers - num_data
    if further < 0:
        raise ValueError(f"{num_data} data points need as many workers, not {num_workers}")
    if budget is not None and not num_data <= budget <= num_workers:
        raise ValueError(f"budget must be from {num_data} to {num_workers} workers, not {budget}")
    own = jnp.broadcast_to(jnp.arange(num_data), (groups, num_data))
    busy = jnp.ones((groups, num_workers), bool)
    if further == 0:
        return own, busy
    # What is infinite ranks first, and its copies among each other. Roots rank as the gains do, and
    # stay within float32 in any unit.
    worth, kept = jnp.minimum(deviation, jnp.finfo(deviation.dtype).max), math.sqrt(lost)

    def next_copy(worth: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        chosen = jnp.argmax(worth, axis=1)
        gain = jnp.take_along_axis(worth, chosen[:, None], axis=1)[:, 0]
        return worth * jnp.where(jnp.arange(num_data) == chosen[:, None], kept, 1), (chosen, gain)

    _, (chosen, gains) = jax.lax.scan(next_copy, worth, None, length=further)
    holds = jnp.concatenate([own, chosen.T], axis=1)
    if budget is None:
        return holds, busy
    number = round(groups * (budget - num_data))
    rank = jnp.argsort(jnp.argsort(-gains.T.reshape(-1), stable=True)).reshape(groups, further)
    return holds, busy.at[:, num_data:].set(rank < number)
