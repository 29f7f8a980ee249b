"""A surrogate's outputs on the host, and its calibration: which answers may be given out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes import Decoded
from ...codes._trees import join
from ...risk import ErrorProbability
from ...risk._answer_check import AnswerCheck
from ...surrogates import AbstractSurrogate, Learner, Projection
from ...surrogates.nearest import nearest_predictions
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
    own = surrogate if isinstance(surrogate, Learner) else None
    if own is not None and own.prior is None and isinstance(own.features, Projection | None):
        few = nearest and own.form.size <= most_outputs
        predict = nearest_predictions(own) if few else own.predict

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


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of a surrogate; immutable, so that one thread may make it for others.

    Attributes:
        outputs: the surrogate's outputs.
        expected: the outputs by which the model's own answers are checked; None where they are not.
        error_probability: the probability of a wrong label; None where labels do not matter.
        factor: what deviations are multiplied by to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of queries that are certain enough, by validation.
        disagreement: the share of all labels that were wrong in validation.
        check: the check of the model's own answers; None where they are not checked.
    """

    outputs: HostOutputs
    expected: HostOutputs | None
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

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Float[np.ndarray, "queries m"]
    ) -> Bool[np.ndarray, " queries"]:
        """Return which of the model's own answers look wrong; none where there is no check."""
        if self.check is None or self.expected is None:
            return np.zeros(len(x), bool)
        return self.check.suspicious(*self.expected(x), own)
