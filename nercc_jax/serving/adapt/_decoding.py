"""Scores of decoded answers: how wrong a query may be that is decoded from the others' answers.

A calibration on unlabelled data points gives them before anything is served. Without one, they are
learned from stragglers whose decoded answers were compared with the model's own.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, Float, Shaped

from ...codes.trees import Form
from ...codes.workers import run_workers
from ...evaluation._answers import batched, cut_groups
from ...evaluation.criteria import agree_on_labels, root_mean_square
from ...inference import cast_model, current_conditions
from ...inference.models import Model
from ...risk import Accuracy, Comparison, ErrorProbability, Risk
from ...risk._accuracy import error_ratios
from ...risk._error_bars import ErrorScale, fit_error_scale
from ...risk._error_probability import fit_error_probability
from ..core._coder import Coder

_LOG = logging.getLogger(__name__)

Score: TypeAlias = ErrorProbability | ErrorScale

_MARGIN = 1  # the feature that is a label's; values have none
# Comparisons of decoded answers from which a score is learned where there is no calibration, at
# least, and those that are kept.
FIRST, _COMPARED = 32, 1024


def fit_score(
    accuracy: Accuracy,
    features: Float[np.ndarray, "samples looks features"],
    missed: Shaped[np.ndarray, "samples looks"],
    usable: Bool[np.ndarray, "samples looks"],
    points: int,
    form: Form | None,
    owners: Sequence[np.ndarray] = (),
) -> Score:
    """Fit the score of a promise to decoded answers whose model's own answers are known.

    Args:
        accuracy: The promise.
        features: The features of each sample at each look (`decoding_features`).
        missed: Whether its label is wrong; for values its root mean square error.
        usable: Whether the features say anything.
        points: The number of different data points among the samples.
        form: The parts of an answer that have a label of their own.
        owners: As for `fit_error_probability`.
    """
    if accuracy.tolerance is not None:
        features = np.where(np.arange(features.shape[-1]) == _MARGIN, 0, features)
        return fit_error_scale(features, missed, usable, accuracy, points)
    score = fit_error_probability(
        features, missed, usable=usable, owners=owners, points=points, falling=(_MARGIN,),
        failure=0.25, form=form,
    )  # fmt: skip
    return jax.tree.map(np.asarray, score)


@dataclasses.dataclass(frozen=True)
class DecodingScores:
    """The scores of decoded queries by the number of queries in their group; immutable.

    Attributes:
        accuracy: The promise that they were calibrated for.
        calibrated: Calibrated scores; empty where there is no calibration.
        learned: The score that was learned from stragglers where there is no calibration; None
            before that.
        conditions: The conditions of the calibration.
    """

    accuracy: Accuracy
    calibrated: Mapping[int, Score] = dataclasses.field(default_factory=dict)
    conditions: str = ""
    learned: Score | None = None

    def of(self, queries: int) -> Score | None:
        """Return the score for groups of this size; None where there is none."""
        return self.calibrated.get(queries, self.learned)

    def learn(
        self,
        features: Float[np.ndarray, "compared features"],
        missed: Shaped[np.ndarray, " compared"],
        form: Form | None,
    ) -> tuple["DecodingScores", list[Comparison]]:
        """Learn a score from stragglers' decoded answers that were compared (`fit_score`).

        Returns:
            Scores with that one, and comparisons of every other answer, from which it has not
            learned; error bars judge themselves by these.
        """
        labels, nan = self.accuracy.tolerance is None, math.nan
        own = slice(None, None, 2 if labels else 1)
        known, usable = missed[own, None], np.ones((len(missed[own]), 1), bool)
        score = fit_score(self.accuracy, features[own, None], known, usable, len(known), form)
        found, rest = score.of_features(features[1::2]), missed[1::2]
        if labels:
            pairs = zip(found.tolist(), rest.tolist(), strict=True)
            shown = [Comparison(each, nan, wrong, math.inf) for each, wrong in pairs]
        else:
            pairs = zip(found.tolist(), error_ratios(rest, found).tolist(), strict=True)
            shown = [Comparison(nan, bar, False, ratio) for bar, ratio in pairs]
        return dataclasses.replace(self, learned=score), shown

    def limit(self, queries: int) -> float:
        """Return the largest score within the calibration's limit; negative where there is none."""
        score, accuracy = self.of(queries), self.accuracy
        if score is None or score is self.learned:
            return -1.0  # what stragglers have shown is for `Risk` to say
        if isinstance(score, ErrorProbability):
            limit = score.limit(accuracy.max_disagreement or 0.0)
            return limit if limit > 0 else -1.0
        assert accuracy.tolerance is not None
        return accuracy.tolerance


class DecodingEvidence:
    """The scores of decoded answers, and what stragglers have shown of these.

    The deciding thread adds comparisons, and the learning one learns scores from them where there
    is no calibration.

    Attributes:
        scores: The scores.
    """

    def __init__(self, scores: DecodingScores, form: Form | None):
        """Start with scores, and without comparisons; `form` are the parts that have a label."""
        self.scores, self._form, accuracy = scores, form, scores.accuracy
        needs = accuracy.promises and not scores.calibrated
        self._risk = Risk(accuracy, needs_evidence=needs)
        self._compared: collections.deque[Any] = collections.deque(maxlen=_COMPARED)
        # Where nothing is promised no score decides, and answers have no features.
        self._number, self._due = 0, FIRST if needs else math.inf
        self._learned: tuple[DecodingScores, list[Comparison]] | None = None

    @property
    def risk(self) -> Risk:
        """The evidence, by the latest scores, for the deciding thread."""
        new, self._learned = self._learned, None
        if new is not None:  # with comparisons that it has not learned from
            self.scores, shown = new
            self._risk.replace(shown)
        return self._risk

    def limit(self, queries: int) -> float:
        """Return the largest score within a calibration, for a group with this number of queries.

        It is infinite where nothing is promised, and negative where there is none. What has had a
        drift is compared without being given out.
        """
        if not self.scores.accuracy.promises:
            return math.inf
        return self.scores.limit(queries) if self.risk.drifts == 0 else -1.0

    def add(self, features: Float[np.ndarray, " features"], missed: bool | float) -> bool:
        """Take a comparison with the model's own; return whether there are enough to learn from."""
        self._compared.append((features, missed))
        self._number += 1
        return self._number >= self._due

    def discard(self) -> None:
        """Learn from later comparisons only, after a drift."""
        self._compared.clear()
        self._number, self._learned = 0, None
        self._due = FIRST if self._due < math.inf else self._due

    def learn(self) -> float:
        """Learn scores if there are enough comparisons; on the learning thread."""
        if self._number >= self._due:
            drifts, compared = self._risk.drifts, list(self._compared)
            self._due = self._number + max(self._number // 2, FIRST)
            features, missed = map(np.stack, zip(*compared, strict=True))
            learned = self.scores.learn(features, missed, self._form)
            self._learned = learned if drifts == self._risk.drifts else None
        return math.inf

    def status(self) -> dict[str, Any]:
        """Return what stragglers showed of decoded answers, before a score is learned, too."""
        found = self._risk.status()
        if not (self.scores.calibrated or self.scores.learned is not None):
            found |= {"compared": self._number, "needed": max(found["needed"], FIRST)}
        return found


def calibrate_decoding(
    coder: Coder,
    model: Model | Sequence[Model],
    x: Float[ArrayLike, "points ..."],
    accuracy: Accuracy,
    *,
    worker_dtype: DTypeLike | None = None,
    draws: int = 32,
    most: int = 256,
    least: int = 32,
    places: int = 4,
) -> DecodingScores:
    """Run the model on unlabelled data points, coded and uncoded, and calibrate decoding on them.

    Groups have every number of queries. In each draw the workers of one query straggle, and any
    number of the others up to the redundancy. A group is looked at before the last two answers
    come, before the last one, and with all: a query is given out at the first look at which its
    score is small enough.

    Args:
        coder: The code.
        model: The served model, or one for each worker, the served one first. It computes in the
            pool's dtype, because a query's own answer is a worker's, too.
        x: Data points.
        accuracy: The promise.
        worker_dtype: The dtype that the workers compute in.
        draws: Straggler sets.
        most: Groups of a size, at most; of smaller ones than K half as many.
        least: Groups that a calibration needs.
        places: Lost queries that count in each draw.

    Raises:
        ValueError: x fills no group, is not floating point, or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.risk import Accuracy
        >>> from nercc_jax.serving import Coder, calibrate_decoding
        >>> coder = Coder(NeRCC(2, 4, points="interleaved"))
        >>> x = np.random.default_rng(0).normal(size=(128, 3)).astype(np.float32)
        >>> decoding = calibrate_decoding(coder, jnp.sin, x, Accuracy(max_disagreement=0.1))
        >>> decoding.limit(2) > 0
        True
    """
    models = cast_model((model,) if callable(model) else tuple(model), worker_dtype)
    run, scores = eqx.filter_jit(run_workers), {}
    for queries in range(2, coder.num_data + 1):
        groups = cut_groups(x, queries)[: most if queries == coder.num_data else most // 2]
        coded = coder.encode(groups, np.arange(coder.num_workers)).swapaxes(0, 1)
        answers = np.asarray(run(models, coder.code, jnp.asarray(coded)))
        answers = answers.reshape(*answers.shape[:2], -1).swapaxes(0, 1)
        points = groups.reshape(-1, *groups.shape[2:])
        own = np.asarray(batched(models[0], min(64, len(points)))(points))
        own = own.reshape(len(own), -1)
        if len(groups) < least or not coder.ranks(accuracy):
            continue
        originals, layout = own.reshape(len(groups), queries, -1), coder.layout(queries)
        random, seen, owners = np.random.default_rng(queries), [], []
        sent = np.concatenate([*coder.first[:queries], layout.extras]).astype(int)
        for draw in range(draws):
            # Queries and numbers of stragglers are spread evenly over the draws, so that few sets
            # represent all: Roberts' sequence, whose points fill the square evenly (1/p and 1/p^2
            # of the root of p^3 = p + 1).
            first, second = np.modf(
                (draw + 1) * np.array([0.7548776662466927, 0.5698402909980532])
            )[0]
            others = np.setdiff1d(sent, layout.own[int(first * queries)])
            others, spare = random.permutation(others), max(len(others) - queries, 0)
            answered = max(len(others) - int(second * (spare + 1)), 1)
            looks = np.zeros((3, coder.num_workers), bool)
            for look, mask in enumerate(looks):
                mask[others[: max(answered - 2 + look, 1)]] = True
            lost = [place for place, each in enumerate(layout.own) if not looks[-1, each].any()]
            lost = random.permutation(lost)[:places]
            parts = []
            for mask in looks:
                found = coder.decode(answers, mask, len(groups), features=True)
                predictions = found.predictions[:, lost]
                missed = (
                    ~agree_on_labels(predictions, originals[:, lost], coder.form)
                    if accuracy.tolerance is None
                    else root_mean_square(predictions - originals[:, lost], axis=2)
                )
                parts.append((found.features[:, lost], found.informative[:, lost], missed))
            # (looks, groups, places, ...) becomes (groups and places, looks, ...).
            stacked = [np.moveaxis(np.stack(part), 0, 2) for part in zip(*parts, strict=True)]
            seen.append([part.reshape(-1, *part.shape[2:]) for part in stacked])
            owners.append(np.repeat(np.arange(len(groups)), len(lost)))
        features, informative, missed = map(np.concatenate, zip(*seen, strict=True))
        scores[queries] = fit_score(
            accuracy, features, missed, informative, len(points), coder.form,
            [np.concatenate(owners)],
        )  # fmt: skip
    return DecodingScores(accuracy, scores, current_conditions(worker_dtype))
