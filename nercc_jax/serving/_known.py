"""What is known of answers before they come, and what may be given out by it."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from ..codes import Form, join
from ..evaluation import agree_on_labels, row_errors
from ..risk import ErrorProbability, error_features
from ..surrogates import AbstractLearner, AbstractSurrogate


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Of some queries: answers, how likely each has another label, and how far off it may be.

    `sure`: whether it may be given out. Doubts are NaN where labels do not matter.
    """

    values: Float[np.ndarray, "queries m"]
    doubt: Float[np.ndarray, " queries"]
    bar: Float[np.ndarray, " queries"]
    sure: Bool[np.ndarray, " queries"]


@dataclasses.dataclass(frozen=True)
class Known:
    """All that predicting takes; immutable, so that one thread may make it and others read it.

    What is given out has a doubt of at most `limit`, where there is a doubt, and a bar (`factor`
    times its deviation) of at most `tolerance`. `share` of the queries are as sure as that, by the
    last exams, and of those no more than `promised` are wrong.
    """

    surrogate: AbstractSurrogate
    doubt: ErrorProbability | None
    factor: float
    limit: float
    tolerance: float
    share: float
    promised: float

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions:
        """Compiled for each number of queries."""
        told = _judged(self.surrogate, _without_levels(self.doubt), x)
        values, deviation, doubt = map(np.asarray, told)
        bar = self.factor * deviation
        sure = self.sure(doubt, bar) & np.isfinite(values).all(axis=1)
        return Predictions(values, doubt, bar, sure)

    def sure(
        self, doubt: Float[np.ndarray, " queries"], bar: Float[np.ndarray, " queries"]
    ) -> Bool[np.ndarray, " queries"]:
        """What may be given out."""
        within = bar <= self.tolerance
        return within if self.doubt is None else within & (doubt <= self.limit)


@dataclasses.dataclass(frozen=True)
class Exam:
    """What a surrogate said of some queries, held against the model's own answers.

    `features` are what a doubt looks at; `doubt` is NaN without one.
    """

    features: Float[np.ndarray, "queries features"]
    deviation: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    other: Bool[np.ndarray, " queries"]
    doubt: Float[np.ndarray, " queries"]


def examine(
    surrogate: AbstractSurrogate,
    doubt: ErrorProbability | None,
    x: Shaped[np.ndarray, "queries ..."],
    own: Float[np.ndarray, "queries m"],
    form: Form | None,
) -> Exam:
    """Compiled for each number of queries. `other`: whether the label is another."""
    return Exam(*map(np.asarray, _examined(surrogate, _without_levels(doubt), x, own, form)))


@eqx.filter_jit
def _examined(
    surrogate: AbstractSurrogate,
    doubt: ErrorProbability | None,
    x: Shaped[ArrayLike, "queries ..."],
    own: Float[ArrayLike, "queries m"],
    form: Form | None,
) -> tuple[Array, ...]:
    values, deviation, doubts = _judged(surrogate, doubt, x)
    features = error_features(values, deviation, values, form)
    other = ~agree_on_labels(values, own, form)
    return features, deviation, row_errors(values, own), other, doubts


@eqx.filter_jit
def _judged(
    surrogate: AbstractSurrogate,
    doubt: ErrorProbability | None,
    x: Shaped[ArrayLike, "queries ..."],
) -> tuple[Float[Array, "queries m"], Float[Array, " queries"], Float[Array, " queries"]]:
    """A surrogate's outputs as vectors, its deviations, 1 where it tells none, and doubts."""
    x = jnp.asarray(x)
    if isinstance(surrogate, AbstractLearner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    values = join(mean, 1)[0]
    if doubt is None:
        return values, deviation, jnp.full(len(values), jnp.nan)
    return values, deviation, doubt(values, deviation, values)


def _without_levels(doubt: ErrorProbability | None) -> ErrorProbability | None:
    """Without its limits, whose number differs between calibrations: compiled once for all."""
    if doubt is None:
        return None
    none = jnp.zeros(0)
    return eqx.tree_at(lambda d: (d.levels, d.risks, d.shares), doubt, (none, none, none))
