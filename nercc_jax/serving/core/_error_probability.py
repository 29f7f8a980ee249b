"""How wrong a decoded query may be: the probability of another label, or the error bar of values.

The surrogates' calibration weighs a prediction's margin against its deviation, whose square is the
product of the roughness of the path (`AbstractCode.process_variance`) and of how much of that the
answers leave open (`posterior_variance`). In a small group the first is hardly known and the second
says most, so here the regression weighs the three separately. Measured with K = 4 and N = 8
interleaved, and at most 5 % of the stragglers' labels wrong: LeNet5 on MNIST resends 42 % of them
instead of 50 %, the tuned code on digits 19 % instead of 23 %, and groups of 2 queries 5 % instead
of 25 %.

Of values, a regression of the logarithm of the error on the last two takes the label's place, and a
factor that is calibrated on the same stragglers makes error bars of what it expects.

This file has what the scheduler computes; `adapt` calibrates it.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from ...codes._trees import Form
from ...risk._error_probability import margin
from ...risk._straggler_risk import allowed_errors, risk_cap

FEATURES = 5
_TINY = 1e-30
_TINY_NUMBER = 1e-9  # by which rounding may change a number of queries
# Natural logarithms of the square roots; larger ones say nothing more.
_LARGEST = 20.0


@dataclasses.dataclass(frozen=True)
class DecodingErrorProbability:
    """A calibrated logistic regression, and the trade-off of each limit on its probabilities.

    Attributes:
        weights: of the features (`decoding_features`).
        wrong_from: sorted; for each calibration query that would get a wrong label at some point,
            the least probability at which it would be answered so.
        answered_from: sorted; for each calibration query, the least probability at any look, so
            that it is answered at this limit or a larger one.
        num_queries: the number of different calibration queries; 0 before calibration.
    """

    weights: Float[np.ndarray, " features"]
    wrong_from: Float[np.ndarray, " wrong"]
    answered_from: Float[np.ndarray, " samples"]
    num_queries: int

    def limit(self, max_disagreement: float) -> float:
        """Return the largest probability at which to answer.

        Of the queries that are answered so then, at most a share of `max_disagreement` gets a wrong
        label, by the bound that stragglers are compared by (`allowed_errors`), and no single one
        may have a larger probability of that than `risk_cap`.

        Returns:
            A probability; negative where nothing may be answered, 1 where everything may.
        """
        if self.num_queries == 0:
            return -1.0
        # The limits worth trying: each lies just below the next wrong label.
        below = np.nextafter(self.wrong_from.astype(np.float32), np.float32(-1))
        limits = np.minimum(np.append(below, np.float32(1)), np.float32(risk_cap(max_disagreement)))
        wrong = np.searchsorted(self.wrong_from, limits, side="right")
        answered = np.searchsorted(self.answered_from, limits, side="right")
        # Samples of the same query under several sets of stragglers count as one.
        times = self.num_queries / max(self.answered_from.size, 1)
        allowed = allowed_errors(max_disagreement, self.num_queries)
        number = (times * answered + _TINY_NUMBER).astype(int)
        kept = np.flatnonzero(times * wrong <= allowed[number] + _TINY_NUMBER)
        return float(limits[kept[-1]]) if kept.size else -1.0

    def share_above(self, limit: float) -> float:
        """Return the share of calibration queries that stay above a limit, and are resent."""
        return float(np.mean(self.answered_from > limit)) if self.answered_from.size else 1.0

    def __call__(
        self,
        features: Float[np.ndarray, "rows num_data features"],
        informative: Bool[np.ndarray, "rows num_data"],
    ) -> Float[np.ndarray, "rows num_data"]:
        """Return the probabilities of wrong labels, by `decoding_features`."""
        return error_probability(features, informative, self.weights)


@dataclasses.dataclass(frozen=True)
class DecodingErrorBars:
    """Calibrated error bars of decoded values.

    Attributes:
        weights: of the features (`decoding_features`), whose sum is a bar's logarithm.
        share: the share of the calibration's stragglers whose bars are within the tolerance.
        num_queries: the number of different calibration queries; 0 before calibration.
    """

    weights: Float[np.ndarray, " features"]
    share: float
    num_queries: int

    def __call__(
        self,
        features: Float[np.ndarray, "rows num_data features"],
        informative: Bool[np.ndarray, "rows num_data"],
    ) -> Float[np.ndarray, "rows num_data"]:
        """Return the error bars, by `decoding_features`; infinite where nothing is known."""
        with np.errstate(over="ignore"):
            return np.where(informative, np.exp(features @ self.weights), np.inf)


def uncalibrated() -> DecodingErrorProbability:
    """Return the state before calibration: probabilities are NaN, and nothing may be answered."""
    nothing = np.zeros(0, np.float32)
    return DecodingErrorProbability(np.full(FEATURES, np.nan, np.float32), nothing, nothing, 0)


def decoding_features(
    predictions: Float[np.ndarray, "rows num_data m"],
    roughness: Float[np.ndarray, " rows"],
    variance: Float[np.ndarray, " num_data"],
    form: Form | None = None,
) -> tuple[Float[np.ndarray, "rows num_data features"], Bool[np.ndarray, "rows num_data"]]:
    """Compute the regression's features.

    A single answer gives no deviation, and two answers give no roughness, which is a feature of its
    own (they have 0). Of predictions with several labels (`form`) the least certain one counts.

    Returns:
        The features, and a mask of the predictions for which they are informative.
    """
    informative = np.isfinite(predictions).all(axis=-1) & np.isfinite(variance)
    rough = np.isfinite(roughness) & (roughness > 0)
    features = [
        np.ones(()),
        np.log(margin(np.where(informative[..., None], predictions, 0), form) + _TINY),
        np.log(np.where(rough, roughness, 1))[:, None] / 2,
        np.log(np.where(informative, variance, 1) + _TINY) / 2,
        ~rough[:, None],
    ]
    features = np.stack([np.broadcast_to(each, informative.shape) for each in features], axis=-1)
    return np.clip(features, -_LARGEST, _LARGEST).astype(predictions.dtype), informative


def error_probability(
    features: Float[np.ndarray, "rows num_data features"],
    informative: Bool[np.ndarray, "rows num_data"],
    weights: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "rows num_data"]:
    """Return the probability of a wrong label: 1 where the features are not informative."""
    # SciPy's `expit`, without the import, for which the server's first decoding would wait.
    with np.errstate(invalid="ignore"):  # weights are NaN before calibration
        likely = np.exp(-np.logaddexp(np.float32(0), -(features @ weights)))
    return np.where(informative, likely, np.float32(1))
