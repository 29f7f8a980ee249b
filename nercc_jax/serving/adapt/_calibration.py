"""A surrogate's outputs on the host, and its calibration: which answers may be given out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes import Decoded
from ...codes._trees import Form, join
from ...risk import ErrorProbability
from ...risk._accuracy import bar_factor
from ...risk._answer_check import AnswerCheck, fit_answer_check
from ...risk._error_probability import fit_error_probability
from ...surrogates import AbstractSurrogate, Learner
from ...surrogates.nearest import nearest_predictions
from .._policy import BatchingPolicy
from ..core._group import repeat_rows

# Returns the answers to queries as vectors, and their deviations, 1 where there are none.
HostOutputs: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def outputs_on_host(
    surrogate: AbstractSurrogate,
    sizes: Sequence[int],
    *,
    nearest: bool = False,
    most_outputs: int = 256,
) -> HostOutputs:
    """Return a function that returns a surrogate's outputs on the host.

    A learner that predicts by NumPy does so. Of others a program is compiled for each of some
    numbers of queries, up to which queries are repeated.

    Args:
        surrogate: The surrogate.
        sizes: These numbers, in ascending order.
        nearest: Whether a learner on the host predicts from few pairs (`nearest_predictions`).
        most_outputs: The most outputs for that: it solves for each of them at every update.
    """
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        few = nearest and surrogate.form.size <= most_outputs
        predict = nearest_predictions(surrogate) if few else surrogate.predict

        def on_host(x: Shaped[np.ndarray, "queries ..."]) -> tuple[Any, Any]:
            mean, deviation = predict(x)
            return join(mean, 1)[0], deviation

        return on_host
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    on_device = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)

    def compiled(x: Shaped[np.ndarray, "queries ..."]) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for begin in range(0, len(x), sizes[-1]):
            part = x[begin : begin + sizes[-1]]
            rows = repeat_rows(part, next(size for size in sizes if size >= len(part)))
            found.append([np.asarray(each)[: len(part)] for each in _outputs(on_device, rows)])
        values, deviation = map(np.concatenate, zip(*found, strict=True))
        return values, deviation

    return compiled


@eqx.filter_jit
def _outputs(surrogate: AbstractSurrogate, x: Shaped[Any, "queries ..."]) -> tuple[Any, Any]:
    if isinstance(surrogate, Learner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    return join(mean, 1)[0], deviation


class ValidationBatch(NamedTuple):
    """A surrogate's answers to some queries, compared with the model's own, which may be large.

    `mean` and `spread` are the answers that the check expects, and `own` the model's; empty where
    they are not checked.
    """

    features: Float[np.ndarray, "queries features"]
    deviation: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    wrong: Bool[np.ndarray, " queries"]
    mean: Float[np.ndarray, "checked m"]
    spread: Float[np.ndarray, " checked"]
    own: Float[np.ndarray, "checked m"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of a surrogate; immutable, so that one thread may make it for others.

    Attributes:
        error_probability: the probability of a wrong label; None where labels do not matter.
        factor: what deviations are multiplied by to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of queries that are certain enough, by validation.
        disagreement: the share of all labels that were wrong in validation.
        check: the check of the model's own answers; None where they are not checked.
    """

    error_probability: ErrorProbability | None
    factor: float
    limit: float
    tolerance: float
    share: float
    disagreement: float
    check: AnswerCheck | None = None

    def assess(
        self, values: Float[np.ndarray, "queries m"], deviation: Float[np.ndarray, " queries"]
    ) -> Decoded:
        """Return the surrogate's answers with what calibration says of them.

        `recovered` are those that may be given out. The error probability is that of another label,
        NaN where labels do not matter; the deviation is the error bound, in units of the outputs,
        which covers the error of a share `coverage` of the answers.
        """
        # Infinite where a deviation is, whatever the factor.
        finite = np.isfinite(deviation)
        bound = np.where(finite, self.factor * np.where(finite, deviation, 0), np.inf)
        probability = np.full(len(values), np.nan)
        sure = (bound <= self.tolerance) & np.isfinite(values).all(axis=1)
        if self.error_probability is not None:
            probability = self.error_probability(values, deviation, values)
            sure &= probability <= self.limit
        return Decoded(values, np.zeros(0, bool), sure, bound, probability)


def calibrate(
    batches: Sequence[ValidationBatch], policy: BatchingPolicy, form: Form | None
) -> Calibration:
    """Return the calibration that these validation batches give, for the policy's promise."""
    parts = map(np.concatenate, zip(*batches, strict=True))
    features, deviation, error, wrong, mean, spread, own = parts
    accuracy, tolerance = policy.accuracy, policy.tolerance
    # It has to be right for those that are given out, not for all.
    factor = bar_factor(deviation[:, None], error[:, None], accuracy, len(error))
    error_probability, limit, share, check = None, 1.0, 1.0, None
    if accuracy.max_disagreement is not None:
        error_probability = fit_error_probability(
            features[:, None], wrong[:, None], failure=0.25, form=form
        )
        error_probability = jax.tree.map(np.asarray, error_probability)
        limit = error_probability.limit(accuracy.max_disagreement)
        share = 1 - error_probability.share(limit)
    if tolerance is not None:
        share *= float(np.mean(factor * deviation <= tolerance))
    if policy.check_answers is not None:
        labels = accuracy.max_disagreement is not None and (form is None or form.is_vector)
        check = fit_answer_check(mean, spread, own, policy.check_answers, labels=labels)
    most = math.inf if tolerance is None else tolerance
    disagreement = float(np.mean(wrong))
    return Calibration(error_probability, factor, limit, most, share, disagreement, check)
