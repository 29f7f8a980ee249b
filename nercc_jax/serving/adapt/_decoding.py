"""Scores of decoded answers: how wrong a query may be that is decoded from other queries' answers.

They are calibrated on unlabelled data points before the model is served.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Float

from ...arrays import root_mean_square
from ...codes.workers import run_workers
from ...evaluation.answers import batched, cut_groups
from ...evaluation.criteria import agree_on_labels
from ...inference import cast_model, current_conditions
from ...inference.models import Model
from ...risk import Accuracy, ErrorProbability
from ...risk.error_bars import fit_error_scale
from ...risk.error_probability import fit_error_probability
from ..core._coder import Coder, Score

_MARGIN = 1  # the index of the feature of the labels' margin, which values do not have


@dataclasses.dataclass(frozen=True)
class DecodingScores:
    """The scores of decoded queries by the number of queries in their group; immutable.

    Attributes:
        accuracy: The accuracy for which they were calibrated.
        calibrated: The scores, by number of queries; empty without a calibration.
        conditions: The precision and platform of the calibration.
    """

    accuracy: Accuracy
    calibrated: Mapping[int, Score] = dataclasses.field(default_factory=dict)
    conditions: str = ""

    def limit(self, queries: int) -> float:
        """Return the largest score at which an answer is accurate enough; negative without one."""
        score, accuracy = self.calibrated.get(queries), self.accuracy
        if score is None:
            return -1.0
        if isinstance(score, ErrorProbability):
            limit = score.limit(accuracy.max_disagreement or 0.0)
            return limit if limit > 0 else -1.0
        assert accuracy.tolerance is not None
        return accuracy.tolerance


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

    Groups of 2 to K queries are calibrated separately. In each draw the workers of one query
    straggle, and any number of other workers up to the redundancy. A group is decoded three times:
    without the last two answers, without the last one, and with all. This simulates serving, where
    a query is returned as soon as its score is small enough.

    Args:
        coder: The code.
        model: The served model; or all models of the code (`AbstractCode.worker_models`), the
            served one first. It is cast to `worker_dtype`, in which workers compute exact answers.
        x: Unlabelled data points, (points, ...).
        accuracy: The accuracy that answers must have.
        worker_dtype: The dtype in which the workers compute.
        draws: The number of straggler sets.
        most: The most groups of K queries; of smaller groups, half as many.
        least: The fewest groups for a calibration. Sizes with fewer groups have no scores.
        places: The most lost queries that count in each draw.

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
            # The straggling query and the number of stragglers are spread evenly over the draws by
            # Roberts' sequence, whose points fill the unit square evenly (its steps are 1/p and
            # 1/p^2, with p^3 = p + 1), so that few sets represent all.
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
                found = coder.decode(answers, mask, len(groups))
                features, informative = coder.features(answers, found)
                predictions = found.predictions[:, lost]
                missed = (
                    ~agree_on_labels(predictions, originals[:, lost], coder.form)
                    if accuracy.tolerance is None
                    else root_mean_square(predictions - originals[:, lost], axis=2)
                )
                parts.append((features[:, lost], informative[:, lost], missed))
            # (looks, groups, places, ...) becomes (groups and places, looks, ...).
            stacked = [np.moveaxis(np.stack(part), 0, 2) for part in zip(*parts, strict=True)]
            seen.append([part.reshape(-1, *part.shape[2:]) for part in stacked])
            owners.append(np.repeat(np.arange(len(groups)), len(lost)))
        features, informative, missed = map(np.concatenate, zip(*seen, strict=True))
        if accuracy.tolerance is not None:  # values have no margin
            features = np.where(np.arange(features.shape[-1]) == _MARGIN, 0, features)
            scores[queries] = fit_error_scale(features, missed, informative, accuracy, len(points))
            continue
        score = fit_error_probability(
            features, missed, usable=informative, owners=[np.concatenate(owners)],
            points=len(points), falling=(_MARGIN,), failure=0.25, form=coder.form,
        )  # fmt: skip
        scores[queries] = jax.tree.map(np.asarray, score)
    return DecodingScores(accuracy, scores, current_conditions(worker_dtype))
