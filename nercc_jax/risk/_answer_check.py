"""The check of an answer: does it look like the model's own, by what a surrogate predicts?

A logistic regression weighs how far the answer is from the prediction, how far the prediction
prefers another label, by how much the answer's label leads, and how far the answer is from other
right ones whatever its query was. It learns from right answers and from wrong ones that are made of
these: the answers of other queries, and right ones with noise. Of either, those with another label
count, where labels matter.

The limit is a conformal quantile over right answers that the regression has not seen, so that the
share of right answers beyond it is as stated, whatever the regression is worth (Papadopoulos et al.
2002, "Inductive confidence machines for regression").
"""

from types import ModuleType
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._logistic import logistic_regression
from ._straggler_risk import conformal_quantile

_Array: TypeAlias = Array | np.ndarray

_REFERENCES = 256  # right answers that others are compared with
_COVARIANCES = 256  # outputs, at most, whose covariance is taken into account
_SHRINK = 1e-3  # of a covariance to a multiple of the identity
_LEAST = 1e-12
_NEAR = 0.05  # the share of right answers that are nearer to a reference than is told apart
# Of each kind of wrong answers, how many times they are drawn, and of how many right ones; and the
# sizes of the noise, in units of the answers' standard deviation.
_DRAWS, _ROWS = 3, 512
_NOISE = (0.3, 0.6, 1.0)
_ALONG, _ACROSS = 0.7, 0.3  # of the noise, as outputs vary together, and each by itself


class AnswerCheck(eqx.Module):
    """A calibrated check of answers.

    Attributes:
        residual: Maps residuals over deviations to uncorrelated ones.
        typical: Maps answers to uncorrelated ones.
        references: Right answers, mapped so.
        near: The distance to these below which an answer is no more typical than at it: it may be
            one of them.
        weights: The regression's weights of the features.
        limit: The largest score of an answer that does not look wrong.
        labels: Whether the largest output is a label.
    """

    residual: Float[_Array, "m m"] | Float[_Array, " m"]
    typical: Float[_Array, "m m"] | Float[_Array, " m"]
    references: Float[_Array, "references m"]
    near: Float[_Array, ""]
    weights: Float[_Array, " features"]
    limit: Float[_Array, ""]
    labels: bool = eqx.field(static=True)

    def features(
        self,
        mean: Float[_Array, "queries m"],
        deviation: Float[_Array, " queries"],
        answers: Float[_Array, "queries m"],
        numpy: ModuleType = jnp,
    ) -> Float[_Array, "queries features"]:
        """Return the features of the regression.

        Args:
            mean: The surrogate's predictions.
            deviation: Their deviations.
            answers: The answers.
            numpy: The library of these arrays, NumPy or `jax.numpy`.
        """
        deviation = numpy.maximum(deviation, _LEAST)
        ratios = (answers - mean) / deviation[:, None]
        found = [
            numpy.ones_like(deviation),
            numpy.log(_rms(numpy, ratios)),
            numpy.log(_rms(numpy, _mapped(ratios, self.residual))),
            numpy.log(numpy.maximum(self._distance(answers, numpy), self.near)),
            numpy.log(deviation),
        ]
        if self.labels:
            label = numpy.argmax(answers, axis=1)[:, None] == numpy.arange(answers.shape[1])
            preference = numpy.arcsinh(_lead(numpy, mean, label) / deviation)
            margin = numpy.arcsinh(_lead(numpy, answers, label) / deviation)
            found += [numpy.minimum(preference, 0), numpy.maximum(preference, 0), margin]
        return numpy.stack(found, axis=1)

    def _distance(self, answers: _Array, numpy: ModuleType) -> _Array:
        """Return the distance to the nearest reference."""
        mapped = _mapped(answers, self.typical)
        squares = numpy.sum(mapped**2, axis=1)[:, None] + numpy.sum(self.references**2, axis=1)
        nearest = numpy.min(squares - 2 * mapped @ self.references.T, axis=1)
        return numpy.sqrt(numpy.maximum(nearest, 0) / answers.shape[1] + _LEAST)

    def suspicious(
        self,
        mean: Float[_Array, "queries m"],
        deviation: Float[_Array, " queries"],
        answers: Float[_Array, "queries m"],
    ) -> Bool[_Array, " queries"]:
        """Return which answers look wrong; arguments as for `features`."""
        score = self.features(mean, deviation, answers) @ self.weights
        return ~(score <= self.limit)  # NaN is wrong


def fit_answer_check(
    mean: Float[np.ndarray, "queries m"],
    deviation: Float[np.ndarray, " queries"],
    answers: Float[np.ndarray, "queries m"],
    rate: float,
    *,
    labels: bool,
    seed: int = 0,
) -> AnswerCheck:
    """Calibrate a check on right answers.

    Args:
        mean: The surrogate's predictions, made before it knew the answers.
        deviation: Their deviations.
        answers: The model's right answers.
        rate: The share of right answers that may look wrong.
        labels: Whether the largest output is a label.
        seed: Of the wrong answers that are made.

    Returns:
        A check. Nothing looks wrong to it where there are too few answers for the rate.
    """
    random = np.random.default_rng(seed)
    mean, deviation, answers = (np.asarray(each, np.float64) for each in (mean, deviation, answers))
    check = _regressed(mean[::2], deviation[::2], answers[::2], labels, random)
    scores = check.features(mean[1::2], deviation[1::2], answers[1::2], np) @ check.weights
    limit = conformal_quantile(np.asarray(scores), 1 - rate)
    check = eqx.tree_at(lambda check: check.limit, check, np.asarray(limit))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), check)


def _regressed(
    mean: np.ndarray,
    deviation: np.ndarray,
    answers: np.ndarray,
    labels: bool,
    random: np.random.Generator,
) -> AnswerCheck:
    """Return a check without a limit, with arrays of NumPy."""
    typical = _whitening(answers)
    residual = _whitening((answers - mean) / np.maximum(deviation, _LEAST)[:, None])
    number = min(_REFERENCES, len(answers) // 2)
    # As many for any number of answers, so that one compiled program serves all.
    references = _mapped(answers[np.arange(_REFERENCES) % number], typical)
    unknown = np.zeros(()), np.zeros(0), np.zeros(())
    check = AnswerCheck(residual, typical, references, *unknown, labels)
    # A reference is at no distance from itself.
    others = mean[number:], deviation[number:], answers[number:]
    near = np.quantile(check._distance(others[2], np), _NEAR)
    check = eqx.tree_at(lambda check: check.near, check, near)
    right = check.features(*others, numpy=np)
    wrong = check.features(*_wrong(*others, labels, random), numpy=np)
    known = np.arange(len(right) + len(wrong)) >= len(right)
    weights = logistic_regression(np.concatenate([right, wrong]), known)
    return eqx.tree_at(lambda check: check.weights, check, weights)


def _wrong(
    mean: np.ndarray,
    deviation: np.ndarray,
    answers: np.ndarray,
    labels: bool,
    random: np.random.Generator,
) -> tuple[np.ndarray, ...]:
    """Return wrong answers: those of other queries, and right ones with noise."""
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


def _whitening(x: Float[np.ndarray, "rows m"]) -> np.ndarray:
    """Return the map to coordinates of variance 1 that are uncorrelated, if there are few."""
    if x.shape[1] > _COVARIANCES:
        return 1 / np.sqrt(np.var(x, axis=0) + _LEAST)
    covariance = np.atleast_2d(np.cov(x, rowvar=False))
    size = np.trace(covariance) / len(covariance) + _LEAST
    covariance = covariance + _SHRINK * size * np.eye(len(covariance))
    return np.linalg.inv(np.linalg.cholesky(covariance)).T


def _mapped(x: _Array, by: _Array) -> _Array:
    return x @ by if by.ndim == 2 else x * by


def _rms(numpy: ModuleType, x: _Array) -> _Array:
    return numpy.sqrt(numpy.mean(x**2, axis=1) + _LEAST)


def _lead(numpy: ModuleType, outputs: _Array, label: _Array) -> _Array:
    """Return by how much a label leads the best other one."""
    own = numpy.max(numpy.where(label, outputs, -numpy.inf), axis=1)
    return own - numpy.max(numpy.where(label, -numpy.inf, outputs), axis=1)
