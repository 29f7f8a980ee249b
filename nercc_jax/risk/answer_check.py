"""The check of an answer: whether it looks wrong, compared with a surrogate's prediction.

First, predictions are corrected by a linear regression of right answers on them. Then a logistic
regression weighs the distance of the answer from the prediction, how much the prediction prefers
another label, the margin of the answer's label, the distance of the answer from other right answers
(whatever its query), and the products of any two of these. It is fitted to right answers and to
synthetic wrong ones: the answers to other queries, and right answers with noise. For labels, only
wrong answers with another label are used.

An answer whose distance from its prediction, in units of the deviation, is smaller than that of
nearly all wrong answers is not checked further. This holds for most right answers.

The limit is a conformal quantile over right answers that were not used for the regression. So the
share of right answers beyond it is as stated, however good the regression is (Papadopoulos et al.
2002, "Inductive confidence machines for regression").

All of this uses NumPy: every answer is checked, and a call of JAX costs more than the check.
"""

import dataclasses
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from .accuracy import conformal_quantile
from .error_probability import logistic_regression
from .features import lead_of

_REFERENCES = 256  # right answers with which answers are compared
_COVARIANCES = 256  # the most outputs for which covariances are used
_SHRINK = 1e-3  # the shrinkage of a covariance towards a multiple of the identity
_LEAST = 1e-12
_CLEAR = 0.002  # the share of wrong answers that are cleared by their small residuals
_RIDGE = 0.01  # the ridge of the correction, in rows, for each output
# For each kind of wrong answers, the number of draws, and of right answers in each; and the sizes
# of the noise, in units of the answers' standard deviation. With `_RIDGE` and the features these
# were confirmed on 5,000 of RepVGG's training images.
_DRAWS, _ROWS = 3, 1024
_NOISE = (0.3, 0.6, 1.0)
_ALONG, _ACROSS = 0.7, 0.3  # the parts of the noise with the outputs' correlations, and without


_Numbers: TypeAlias = Float[np.ndarray, " queries"]
_Vectors: TypeAlias = Float[np.ndarray, "queries m"]


@dataclasses.dataclass(frozen=True)
class AnswerCheck:
    """A calibrated check of answers.

    Attributes:
        slope: The slope of the regression of right answers on predictions.
        offset: The constant of this regression.
        residual: Maps residuals over deviations to uncorrelated ones.
        centre: The mean of right answers.
        typical: Maps differences from `centre` to uncorrelated ones.
        references: Right answers, mapped by `typical`.
        squares: The squared lengths of the references.
        weights: The logistic regression's weights of the products of features.
        far: The distance features beyond which every answer looks wrong: the largest ones in the
            fit, or less.
        clear: The mean squared residual, in units of the deviation, up to which no answer looks
            wrong.
        limit: The largest score of an answer that does not look wrong.
        labels: Whether the largest output is a label.
    """

    slope: Float[np.ndarray, "m m"] | Float[np.ndarray, " m"]
    offset: Float[np.ndarray, " m"]
    residual: Float[np.ndarray, "m m"] | Float[np.ndarray, " m"]
    centre: Float[np.ndarray, " m"]
    typical: Float[np.ndarray, "m m"] | Float[np.ndarray, " m"]
    references: Float[np.ndarray, "m references"]
    squares: Float[np.ndarray, " references"]
    labels: bool
    weights: Float[np.ndarray, "features features"] | None = None
    far: Float[np.ndarray, "3"] | float = np.inf
    clear: float = 0.0
    limit: float = np.inf

    def features(
        self, mean: _Vectors, deviation: _Numbers, answers: _Vectors
    ) -> Float[np.ndarray, "queries features"]:
        """Return the features of the regression.

        Args:
            mean: The surrogate's predictions.
            deviation: The predictions' deviations.
            answers: The answers.
        """
        deviation = np.maximum(deviation, _LEAST)
        mean = _mapped(mean, self.slope) + self.offset  # the corrected predictions
        ratios = (answers - mean) / deviation[:, None]
        found = np.ones((len(answers), 8 if self.labels else 5), np.float32)
        found[:, 1] = _square(ratios)
        found[:, 2] = _square(_mapped(ratios, self.residual))
        own = _mapped(answers - self.centre, self.typical)
        nearest = (self.squares - 2 * own @ self.references).min(axis=1)
        found[:, 3] = np.maximum(nearest + _square(own), 0)
        found[:, 4] = deviation**2 * answers.shape[1]
        found[:, 1:5] = 0.5 * np.log(found[:, 1:5] / answers.shape[1] + _LEAST)
        if self.labels:
            lead = lead_of(answers[None], np.stack([mean, answers]))
            preference, margin = np.arcsinh(lead / deviation)
            found[:, 5], found[:, 6] = np.minimum(preference, 0), np.maximum(preference, 0)
            found[:, 7] = margin
        return found

    def scores(self, mean: _Vectors, deviation: _Numbers, answers: _Vectors) -> _Numbers:
        """Return scores, larger for answers that look more wrong; arguments as for `features`."""
        assert self.weights is not None
        features = self.features(mean, deviation, answers)
        found = np.einsum("qf,qf->q", features @ self.weights, features)
        # Products of features are meaningless far beyond those of the fit.
        return np.where((features[:, 1:4] > self.far).any(axis=1), np.inf, found)

    def clear_squares(self, mean: _Vectors, deviation: _Numbers) -> _Numbers:
        """Return the squared residuals up to which answers do not look wrong."""
        return self.clear * (mean.shape[1] * np.maximum(deviation, _LEAST) ** 2)

    def suspicious(
        self, mean: _Vectors, deviation: _Numbers, answers: _Vectors
    ) -> Bool[np.ndarray, " queries"]:
        """Return the mask of answers that look wrong; arguments as for `features`."""
        with np.errstate(all="ignore"):
            clear = self.clear_squares(mean, deviation)
            found = ~(_square(answers - mean) <= clear)  # NaN is wrong
            if found.any():
                scores = self.scores(mean[found], deviation[found], answers[found])
                found[found] = ~(scores <= self.limit)  # NaN is wrong
        return found


def fit_answer_check(
    mean: _Vectors,
    deviation: _Numbers,
    answers: _Vectors,
    rate: float,
    *,
    labels: bool,
    seed: int = 0,
    blatant: float = 0.0,
) -> AnswerCheck:
    """Calibrate a check on right answers.

    Args:
        mean: The surrogate's predictions, made before it learned the answers, in order of time.
        deviation: The predictions' deviations.
        answers: The model's right answers.
        rate: The share of right answers that may look wrong.
        labels: Whether the largest output is a label.
        seed: The seed of the synthetic wrong answers.
        blatant: The part of `rate` that is spent on the largest residuals, whatever the regression
            says. A few of the answers may be wrong, and the regression takes these for right ones.

    Returns:
        A check. With too few answers for the rate, no answer looks wrong to it.
    """
    random, half = np.random.default_rng(seed), len(answers) // 2
    early = mean[:half], deviation[:half], answers[:half]
    centre, typical = early[2].mean(axis=0), _whitening(early[2])
    slope, offset = _correction(*early)
    expected = _mapped(early[0], slope) + offset
    residual = _whitening((early[2] - expected) / np.maximum(early[1], _LEAST)[:, None])
    number = min(_REFERENCES, half // 2)
    references = _mapped(early[2][:number] - centre, typical)
    squares = (references**2).sum(axis=1)
    references = np.ascontiguousarray(references.T)
    check = AnswerCheck(slope, offset, residual, centre, typical, references, squares, labels)
    # References are left out of the fit, since their distance from themselves is 0.
    others = mean[number:half], deviation[number:half], answers[number:half]
    made = _wrong(*others, labels, random)
    right, wrong = check.features(*others), check.features(*made)
    features = np.concatenate([right, wrong])
    rows, columns = np.triu_indices(features.shape[1])  # the first are the features themselves
    weights = np.zeros((features.shape[1],) * 2, np.float32)
    products = features[:, rows] * features[:, columns]
    known = np.arange(len(features)) >= len(right)
    weights[rows, columns] = logistic_regression(products, known)
    clear, far = 0.0, features[:, 1:4].max(axis=0)
    if len(wrong):
        one = dataclasses.replace(check, clear=1.0).clear_squares(*made[:2])
        clear = float(np.quantile(_square(made[2] - made[0]) / one, _CLEAR))
    check = dataclasses.replace(check, weights=weights, far=far, clear=clear)
    if blatant:
        residuals = check.features(mean, deviation, answers)[:, 1]
        largest = conformal_quantile(residuals, 1 - blatant * rate)
        check = dataclasses.replace(check, far=np.minimum(far, [largest, np.inf, np.inf]))
    # The later half: as a learner learns, its predictions become more like future ones.
    late = mean[half:], deviation[half:], answers[half:]
    cleared = _square(late[2] - late[0]) <= check.clear_squares(*late[:2])
    scores = np.where(cleared, -np.inf, check.scores(*late))
    return dataclasses.replace(check, limit=conformal_quantile(scores, 1 - rate))


def _correction(
    mean: _Vectors, deviation: _Numbers, answers: _Vectors
) -> tuple[np.ndarray, Float[np.ndarray, " m"]]:
    """Return slope and offset of answers by predictions, from weighted least squares.

    The ridge pulls the slope towards 1. More than `_COVARIANCES` outputs are not corrected.
    """
    outputs = mean.shape[1]
    residual = (answers - mean).astype(np.float64)
    if outputs > _COVARIANCES:
        return np.ones(outputs, np.float32), np.zeros(outputs, np.float32)
    weights = 1 / np.maximum(deviation.astype(np.float64), _LEAST) ** 2
    weights *= len(weights) / weights.sum()
    centre, usual = (np.average(each, axis=0, weights=weights) for each in (mean, residual))
    x = (mean - centre) * np.sqrt(weights)[:, None]
    ridge = _RIDGE * outputs * (np.mean(x**2, axis=0) + _LEAST)
    right = x.T @ ((residual - usual) * np.sqrt(weights)[:, None])
    slope = np.linalg.solve(x.T @ x + np.diag(ridge), right)
    offset = usual - centre @ slope
    return (slope + np.eye(outputs)).astype(np.float32), offset.astype(np.float32)


def _wrong(
    mean: np.ndarray,
    deviation: np.ndarray,
    answers: np.ndarray,
    labels: bool,
    random: np.random.Generator,
) -> tuple[np.ndarray, ...]:
    """Return synthetic wrong answers: those to other queries, and right ones with noise."""
    scale = answers.std(axis=0)
    along = np.linalg.pinv(_whitening(answers)) if answers.shape[1] <= _COVARIANCES else None
    found = []
    for size in (0.0, *_NOISE) * _DRAWS:
        rows = random.permutation(len(answers))[:_ROWS]
        right = answers[rows]
        noise = random.normal(size=(2, *right.shape))
        together = noise[0] * scale if along is None else noise[0] @ along
        wrong = right + size * (_ALONG * together + _ACROSS * noise[1] * scale.mean())
        if not size:
            wrong = answers[np.roll(rows, 1)]
        other = np.argmax(wrong, axis=1) != np.argmax(right, axis=1)
        kept = other if labels else np.any(wrong != right, axis=1)
        found.append((mean[rows][kept], deviation[rows][kept], wrong[kept]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _whitening(x: _Vectors) -> np.ndarray:
    """Return the map to coordinates of variance 1; uncorrelated ones, if there are few outputs."""
    if x.shape[1] > _COVARIANCES:
        return (1 / np.sqrt(np.var(x, axis=0) + _LEAST)).astype(np.float32)
    covariance = np.atleast_2d(np.cov(x, rowvar=False))
    size = np.trace(covariance) / len(covariance) + _LEAST
    covariance = covariance + _SHRINK * size * np.eye(len(covariance))
    return np.linalg.inv(np.linalg.cholesky(covariance)).T.astype(np.float32)


def _mapped(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    return x @ by if by.ndim == 2 else x * by


def _square(x: _Vectors) -> _Numbers:
    return np.vecdot(x, x)
