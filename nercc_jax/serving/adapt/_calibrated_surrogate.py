"""A surrogate and its calibration: which of its answers may be given out, and what looks wrong."""

import dataclasses
from collections.abc import Callable
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
from ...surrogates import AbstractSurrogate, Learner
from ...surrogates.nearest import nearest_predictions
from ..core._group import repeat_rows

# Returns the answers to queries as vectors, and their deviations. Arrays of JAX may be longer than
# asked for, and may not be computed yet.
HostPredictions: TypeAlias = Callable[[np.ndarray], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class CalibratedSurrogate:
    """A surrogate and its calibration; immutable, so that one thread may make it for others.

    Attributes:
        surrogate: the surrogate.
        error_probability: the probability of a wrong label; None where labels do not matter.
        factor: what deviations are multiplied by to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of queries that are certain enough, by validation.
        disagreement: the share of all labels that were wrong in validation.
        check: the check of the model's own answers; None where they are not checked.
        expected: the predictions that it goes by.
    """

    surrogate: AbstractSurrogate
    error_probability: ErrorProbability | None
    factor: float
    limit: float
    tolerance: float
    share: float
    disagreement: float
    check: AnswerCheck | None = None
    expected: HostPredictions | None = None

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Float[np.ndarray, "queries m"]
    ) -> Bool[np.ndarray, " queries"]:
        """Return which of the model's own answers look wrong; none where there is no check."""
        if self.check is None or self.expected is None:
            return np.zeros(len(x), bool)
        mean, deviation = (np.asarray(each)[: len(x)] for each in self.expected(x))
        return self.check.suspicious(mean, deviation, own)

    def predict(self, x: Shaped[np.ndarray, "queries ..."], width: int) -> Decoded:
        """Return the answers to some queries; programs are compiled for `width` queries."""
        return self.assess(*host_outputs(self.surrogate, x, width))

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


def host_outputs(
    surrogate: AbstractSurrogate, x: Shaped[np.ndarray, "queries ..."], width: int
) -> tuple[Float[np.ndarray, "queries m"], Float[np.ndarray, " queries"]]:
    """Return a surrogate's outputs as vectors, and deviations, 1 where it has none, on the host.

    Where it is not NumPy that predicts, a program is compiled for `width` queries.
    """
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        return _outputs(surrogate, x)
    parts = [x[begin : begin + width] for begin in range(0, len(x), width)]
    found = [_compiled_outputs(surrogate, repeat_rows(part, width)) for part in parts]
    values, deviation = (np.concatenate(each)[: len(x)] for each in zip(*found, strict=True))
    return values, deviation


def predictions_on_host(surrogate: AbstractSurrogate, most_outputs: int = 256) -> HostPredictions:
    """Return a surrogate's predictions, by NumPy where it predicts by that.

    Programs are compiled for few sizes.

    Args:
        surrogate: The surrogate.
        most_outputs: The most outputs of a learner for `nearest_predictions`, which solve for each
            output at every update.
    """
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        if surrogate.form.size > most_outputs:
            return lambda x: _outputs(surrogate, x)
        predict = nearest_predictions(surrogate)

        def nearest(x: Shaped[np.ndarray, "queries ..."]) -> tuple[Any, Any]:
            mean, deviation = predict(x)
            return join(mean, 1)[0], deviation

        return nearest
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    on_device = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)
    return lambda x: _compiled_outputs(on_device, repeat_rows(x, 1 << (len(x) - 1).bit_length()))


def _outputs(surrogate: AbstractSurrogate, x: Shaped[Any, "queries ..."]) -> tuple[Any, Any]:
    if isinstance(surrogate, Learner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    return join(mean, 1)[0], deviation


_compiled_outputs = eqx.filter_jit(_outputs)
