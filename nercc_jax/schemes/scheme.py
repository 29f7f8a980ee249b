"""Schemes: a code with an order of the data, a surrogate, and calibrated uncertainty."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..arrays import native
from ..codes import AbstractCode, Decoded, encode_groups
from ..codes.kept import CachedMatrices
from ..codes.trees import Form, groups_of, join, to_device
from ..codes.workers import call_model
from ..inference import order_points
from ..inference.models import Model, check_model
from ..risk import ErrorBars, ErrorProbability
from ..surrogates import AbstractSurrogate
from ..surrogates.interface import AbstractGroupPrior, check_like
from ..surrogates.surrogate import decode_with_deviation


def reexecute(
    model: Model,
    x: PyTree[Shaped[ArrayLike, "..."]],
    assessed: Decoded,
    *,
    limit: float = 0.0,
    score: Float[ArrayLike, "*points"] | None = None,
) -> Decoded:
    """Replace uncertain predictions by the model's own answers.

    The replaced predictions are recovered, with an error probability and a deviation of 0. The
    batch is padded to a power of two, so that few programs are compiled.

    Args:
        model: The served model, a function of a batch.
        x: The data points that were assessed.
        assessed: Their predictions.
        limit: The largest score of a prediction that is kept (`ErrorProbability.limit`, or a
            tolerance); 0 keeps only certain ones.
        score: The uncertainty of each prediction, such as its error bar (default: its error
            probability). Predictions that were not recovered are always replaced.

    Raises:
        ValueError: There is no score, the limit is negative, the model is in training mode, or x
            does not have the shape of the assessed data points.
    """
    check_model(model)
    lead = assessed.recovered.shape
    x = jax.tree.map(np.asarray, native(x, "x"))
    for leaf in jax.tree.leaves(x):
        if leaf.shape[: len(lead)] != lead:
            raise ValueError(f"x has shape {leaf.shape}; assessed are data points {lead}")
    known = assessed.error_probability if score is None else score
    if known is None:
        raise ValueError(
            "there is no error probability: calibrate the scheme with "
            "`calibrate_error_probability`, or give a score"
        )
    if not limit >= 0:
        raise ValueError(f"the limit must be 0 or positive, not {limit}")
    known = np.where(assessed.recovered, known, np.inf)
    chosen = np.flatnonzero(~(np.asarray(known) <= limit))  # NaN is uncertain
    if not len(chosen):
        return assessed

    at = np.unravel_index(np.resize(chosen, 1 << (len(chosen) - 1).bit_length()), lead)
    own = eqx.filter_jit(call_model)(model, jax.tree.map(lambda leaf: jnp.asarray(leaf[at]), x))
    own = jax.tree.map(lambda leaf: np.asarray(leaf[: len(chosen)]), own)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
        raise ValueError("the model's own outputs are not finite")
    places = np.unravel_index(chosen, lead)

    def fill(values: ArrayLike, new: ArrayLike) -> Array:
        values = np.array(values)
        values[places] = new
        return jnp.asarray(values)

    trust = assessed.deviation, assessed.error_probability
    trust = (None if each is None else fill(each, 0) for each in trust)
    predictions = jax.tree.map(fill, assessed.predictions, own)
    recovered = fill(assessed.recovered, True)
    return Decoded(predictions, jnp.asarray(assessed.responded), recovered, *trust)


class PreparedInputs(eqx.Module):
    """The decisions of a scheme on a batch, before encoding.

    Attributes:
        order: The order in which data points are cut into groups.
        own: The surrogate's outputs on the data points, in their original order; None unless the
            order or the copies depend on them.
        beta: The workers' regression points in each group, each that of a data point; None if all
            groups use the code's.
    """

    order: Int[Array | np.ndarray, " points"]
    own: PyTree[Float[Array | np.ndarray, "points ..."]] | None = None
    beta: Float[Array, "groups num_workers"] | None = None


class Scheme(eqx.Module):
    """A code with additions: an order, a surrogate, calibrated uncertainty, and copies.

    `coded_inference(model, scheme)` carries it out:

    >>> import jax.numpy as jnp
    >>> from nercc_jax import NeRCC, Scheme, coded_inference
    >>> scheme = Scheme(NeRCC(4, 8, points="interleaved"), order="pixels")
    >>> infer = coded_inference(lambda x: jnp.sin(x), scheme, with_status=True)
    >>> found = infer(jnp.linspace(0, 1, 12)[:, None], jnp.arange(8) != 3)
    >>> found.predictions.shape, found.deviation.shape
    ((12, 1), (12,))

    The surrogate runs on all data points and coded data points, on the master.

    Attributes:
        code: A code for K data points on N workers.
        surrogate: A cheap model (`fit_surrogate`), or a learner from past answers (`fit_learner`).
        error_probability: The calibrated probability of wrong labels
            (`calibrate_error_probability`), for one model and this scheme's order.
        order: The features by which data points are ordered, within buffers (`order_points`):
            "pixels" for a projection of the data points, "surrogate" for the surrogate's outputs,
            or a function of a batch. None keeps their order.
        buffer_size: The number of data points that are ordered together.
        bars: The calibrated error bars of values (`calibrate_error_bars`).
        redundancy: "code" encodes the data points for the redundant workers; "uncertain" gives
            these workers copies of the data points of each group of which the surrogate is least
            certain: by its deviation if it has one (a learner), else by the probability of its
            label (a student). A student then alone answers lost data points, whatever its theta and
            kappa. None means "uncertain" if the surrogate has a deviation, the code is NeRCC, and
            N > K; else "code".
        straggler_share: With "uncertain", the expected share of workers that straggle. The larger
            it is, the more copies the most uncertain data points get.

    Raises:
        ValueError: The order or the redundancy needs a surrogate, the code cannot place copies (too
            few workers, or no regression points), or an argument is invalid.
    """

    code: AbstractCode
    surrogate: AbstractSurrogate | None = None
    error_probability: ErrorProbability | None = None
    order: Literal["pixels", "surrogate"] | Callable[[PyTree], PyTree] | None = None
    buffer_size: int = eqx.field(static=True, default=1024)
    bars: ErrorBars | None = None
    redundancy: Literal["code", "uncertain"] | None = eqx.field(static=True, default=None)
    straggler_share: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        surrogates = (AbstractSurrogate, type(None))
        if not (isinstance(self.code, AbstractCode) and isinstance(self.surrogate, surrogates)):
            given = f"{self.code!r} and {self.surrogate!r}"
            raise ValueError(f"a scheme has a code and a surrogate, if it has one, not {given}")
        named = isinstance(self.order, str)
        if named and self.order not in ("pixels", "surrogate"):
            raise ValueError(f"order must be 'pixels', 'surrogate' or a function: {self.order!r}")
        if self.order == "surrogate" and self.surrogate is None:
            raise ValueError("order by 'surrogate' needs a surrogate")
        if self.redundancy not in (None, "code", "uncertain"):
            raise ValueError(f"redundancy must be 'code' or 'uncertain', not {self.redundancy!r}")
        if self.redundancy == "uncertain" and self.surrogate is None:
            raise ValueError("copies of uncertain points need a surrogate: a learner or a student")
        if not 0 < self.straggler_share < 1:
            raise ValueError(
                f"straggler_share must be a share between 0 and 1, not {self.straggler_share}"
            )
        if self.places_copies and self.code.num_workers < self.code.num_data:
            raise ValueError(f"copies need as many workers as data points: {self.code}")
        if self.places_copies and not self._has_points:
            raise ValueError(
                f"{type(self.code).__name__} has no smoothing splines whose points could be moved: "
                "NeRCC has"
            )

    @property
    def places_copies(self) -> bool:
        """Return whether the redundant workers get copies of uncertain data points."""
        if self.redundancy is not None:
            return self.redundancy == "uncertain"
        known = self.surrogate is not None and self.surrogate.has_deviation
        return known and self._has_points and self.code.num_workers > self.code.num_data

    @property
    def _has_points(self) -> bool:
        """Return whether the code has regression points and lambdas, like NeRCC."""
        names = {field.name for field in dataclasses.fields(self.code)}
        return {"alpha", "beta", "lambda_enc", "lambda_dec"} <= names

    @property
    def _doubts_labels(self) -> bool:
        """Return whether copies depend on a student's label probabilities (see `redundancy`)."""
        return self.places_copies and not (self.surrogate and self.surrogate.has_deviation)

    def arrange(
        self, x: PyTree[Shaped[ArrayLike, "points ..."]], own: PyTree = None
    ) -> Int[Array, " points"]:
        """Return the order in which data points are coded: `x[order]` is cut into groups of K.

        The data to which surrogate and error probability are fitted must be in this order, too.

        Args:
            x: Data points.
            own: The surrogate's outputs on them, if they are known.

        Raises:
            ValueError: As `order_points` does.
        """
        x, features = to_device(x), self.order
        if features is None:
            return jnp.arange(len(jax.tree.leaves(x)[0]))
        if isinstance(features, str):
            features = None
            if self.order == "surrogate":
                assert self.surrogate is not None
                features = self.surrogate.outputs if own is None else own
        return order_points(x, self.code.num_data, features=features, buffer_size=self.buffer_size)

    def prepare(self, x: PyTree[Shaped[Array, "points ..."]]) -> PreparedInputs:
        """Return the order and the copies for data points (whole groups of K); a pure function."""
        surrogate, own = self.surrogate, None
        code: Any = self.code
        if surrogate is not None and (self.order == "surrogate" or self._doubts_labels):
            own = surrogate.outputs(x)  # only once, for order, copies and decoding
        arranged = PreparedInputs(self.arrange(x, own), own)
        if not self.places_copies:
            return arranged
        assert surrogate is not None
        if self._doubts_labels:  # a wrong label counts as a squared error of 1
            deviation = jnp.sqrt(self.groups(label_doubt(own), arranged))
        else:
            deviation = surrogate.prior_deviation(self.groups(x, arranged))
        holds = copies_of_uncertain(deviation, code.num_workers, lost=self.straggler_share)
        return PreparedInputs(arranged.order, own, code.alpha[holds])

    def with_copies(self, beta: Float[Array, " num_workers"]) -> Any:
        """Return the code of one group with copies, at these points and without smoothing."""
        places = lambda code: (code.beta, code.lambda_enc, code.lambda_dec)  # noqa: E731
        none = jnp.zeros_like(places(self.code)[1])
        return eqx.tree_at(places, self.code, (beta, none, none))

    def encode(
        self, x: PyTree[Shaped[Array, "points ..."]], encoder: ArrayLike | None
    ) -> tuple[PreparedInputs, PyTree[Shaped[Array, "groups num_workers ..."]]]:
        """Return the decisions on a batch and its coded data points; a pure function.

        Args:
            x: Data points, whole groups of K.
            encoder: The code's encoder matrix, if it is known (`known_matrices`).
        """
        prepared = self.prepare(x)
        return prepared, self._coded(self.groups(x, prepared), prepared, encoder)

    def _coded(self, groups: PyTree, prepared: PreparedInputs, encoder: ArrayLike | None) -> PyTree:
        own = self.encoders(prepared)
        return encode_groups(self.code, groups, encoder if own is None else own)

    def encoders(
        self, prepared: PreparedInputs
    ) -> Float[Array, "groups num_workers num_data"] | None:
        """Return each group's encoder; None if all groups use the code's."""
        if prepared.beta is None:
            return None
        return jax.vmap(lambda beta: self.with_copies(beta).encoder_matrix())(prepared.beta)

    def decode(
        self,
        x: PyTree[Shaped[Array, "points ..."]],
        prepared: PreparedInputs,
        y: PyTree[Float[Array, "groups num_workers ..."]],
        available: Bool[Array, "groups num_workers"],
        known: CachedMatrices,
    ) -> Decoded:
        """Return predictions of the data points in their original order; a pure function.

        Raises:
            ValueError: The surrogate's outputs differ in form from the model's.
        """
        sent, (vectors, form) = self.groups(x, prepared), join(y, 2)
        prior = self.expect(sent, prepared, known.encoder, form)
        found, cheap = self.assess(prepared, vectors, prior, available, known.decoders)
        trust, points = [found.deviation, None], len(prepared.order)
        if self.error_probability is not None:
            trust[1] = self.error_probability(found.predictions, found.deviation, cheap)

        def home(values: Array) -> Array:
            values = values.reshape(points, *values.shape[2:])
            return jnp.zeros_like(values).at[prepared.order].set(values)

        found = Decoded(found.predictions, found.responded, found.recovered, *trust)
        found = found.map_points(home)
        return eqx.tree_at(lambda d: d.predictions, found, form.split(found.predictions))

    def expect(
        self, sent: PyTree, prepared: PreparedInputs, encoder: ArrayLike | None, form: Form
    ) -> AbstractGroupPrior | None:
        """Return the surrogate's prior for groups as they are coded; None without a surrogate.

        Raises:
            ValueError: The surrogate's outputs differ from the model's, which have this `form`.
        """
        if self.surrogate is None:
            return None
        own = None if prepared.own is None else self.groups(prepared.own, prepared)
        prior = self.surrogate.group_prior(sent, self._coded(sent, prepared, encoder), own)
        check_like(prior.form, form)
        return prior

    def assess(
        self,
        prepared: PreparedInputs,
        y: Float[Array, "groups num_workers m"],
        prior: AbstractGroupPrior | None,
        available: Bool[Array, "groups num_workers"],
        decoders: Any = None,
    ) -> tuple[Decoded, Array | None]:
        """Decode groups in the order of coding, from answers as vectors; a pure function.

        Returns:
            Predictions as vectors, with their deviations; and the surrogate's outputs, conditioned
            on the answers.
        """
        surrogate = self.surrogate
        if surrogate is not None and self._doubts_labels:
            # Workers compute data points, not mixtures: other answers do not help a lost one.
            alone = jnp.ones_like(surrogate.theta), jnp.full_like(surrogate.kappa, jnp.inf)
            surrogate = eqx.tree_at(lambda one: (one.theta, one.kappa), surrogate, alone)

        def of_group(beta: Array, *group: Any) -> Decoded:
            one = jax.tree.map(lambda leaf: leaf[None], group)
            found = decode_with_deviation(self.with_copies(beta), surrogate, *one)
            return jax.tree.map(lambda leaf: leaf[0], found)

        if prepared.beta is None:
            found = decode_with_deviation(self.code, surrogate, y, available, prior, decoders)
        else:
            found = jax.vmap(of_group)(prepared.beta, y, available, prior)
        return found, None if prior is None else prior.condition(y, available).own

    def groups(
        self, x: PyTree[Shaped[Array | np.ndarray, "points ..."]], prepared: PreparedInputs
    ) -> PyTree[Shaped[Array | np.ndarray, "groups num_data ..."]]:
        """Return data points, or arrays with a row for each, in the groups that are coded."""
        return groups_of(jax.tree.map(lambda leaf: leaf[prepared.order], x), self.code.num_data)


def label_doubt(outputs: PyTree[Float[Array, "points ..."]]) -> Float[Array, " points"]:
    """Return 1 minus the probability of each data point's label; of several, the least certain one.

    Rows that are probabilities (none negative, with a sum of 1) are used unchanged, others as
    logits. If outputs are not finite, the result is 1.

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
        # The sum of the other probabilities, since 1 - p would often be rounded to 0 in float32.
        others = jnp.where(jnp.arange(part.shape[-1]) == best, 0, probabilities)
        least_certain = jnp.max(jnp.sum(others, -1).reshape(len(part), -1), axis=1)
        doubt = jnp.maximum(doubt, jnp.nan_to_num(least_certain, nan=1.0))
    return doubt


def copies_of_uncertain(
    deviation: Float[Array, "groups num_data"], num_workers: int, *, lost: float
) -> Int[Array, "groups num_workers"]:
    """Return the data point of each worker in each group.

    Each data point is sent once, and uncertain ones again. If a share `lost` of the workers is
    lost, a further copy of a data point that c workers have reduces the expected squared error by
    deviation^2 lost^c, and each copy goes where that is most. `deviation` is that of each data
    point's prediction, or the root of the probability that its label is wrong.
    """
    groups, num_data = deviation.shape
    own = jnp.broadcast_to(jnp.arange(num_data), (groups, num_data))
    # Infinite deviations rank first, and share copies equally. The roots of the gains rank as the
    # gains do, and do not overflow float32 in any unit.
    worth, kept = jnp.minimum(deviation, jnp.finfo(deviation.dtype).max), math.sqrt(lost)

    def next_copy(worth: Array, _: None) -> tuple[Array, Array]:
        chosen = jnp.argmax(worth, axis=1)
        return worth * jnp.where(jnp.arange(num_data) == chosen[:, None], kept, 1), chosen

    _, chosen = jax.lax.scan(next_copy, worth, None, length=max(num_workers - num_data, 0))
    return jnp.concatenate([own, chosen.T], axis=1)
