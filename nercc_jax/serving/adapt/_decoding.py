"""Scores of decoded answers: how wrong a query may be that is decoded from the others' answers.

A calibration on unlabelled data points gives them before anything is served. Without one, they are
learned from stragglers whose decoded answers were compared with the model's own.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, Float

from ...codes._trees import Form
from ...codes.whole_files import read_arrays, write_arrays
from ...evaluation._answers import batched, cut_groups
from ...evaluation._criteria import agree_on_labels, root_mean_square
from ...inference import cast_model
from ...inference.models import Conditions, Model, current_conditions, run_workers
from ...risk import Accuracy, Comparison, ErrorProbability
from ...risk._accuracy import error_ratios
from ...risk._error_bars import ErrorScale, fit_error_scale
from ...risk._error_probability import NUMBERS, fit_error_probability
from ..core._coder import Coder

_LOG = logging.getLogger(__name__)

Score: TypeAlias = ErrorProbability | ErrorScale

_MARGIN = 1  # the feature that is a label's; values have none


class Compared(NamedTuple):
    """A straggler's decoded answer that was compared with the model's own.

    Attributes:
        features: its features (`decoding_features`).
        wrong: whether its label is wrong.
        error: its root mean square error.
    """

    features: Float[np.ndarray, " features"]
    wrong: bool
    error: float


@dataclasses.dataclass(frozen=True)
class DecodingScores:
    """The scores of decoded queries by the number of queries in their group; immutable.

    Attributes:
        accuracy: The promise that they were calibrated for.
        calibrated: Calibrated scores; empty where there is no calibration.
        learned: The score that was learned from stragglers where there is no calibration; None
            before that.
        conditions: The conditions of the calibration.
        own: Answers of the calibration's model.
    """

    accuracy: Accuracy
    calibrated: Mapping[int, Score] = dataclasses.field(default_factory=dict)
    conditions: Conditions = Conditions()  # noqa: RUF009, it is frozen
    own: Float[np.ndarray, "rows m"] | None = None
    learned: Score | None = None

    @property
    def known(self) -> bool:
        """True if there is any score."""
        return bool(self.calibrated) or self.learned is not None

    def of(self, queries: int) -> Score | None:
        """Return the score for groups of this size; None where there is none."""
        return self.calibrated.get(queries, self.learned)

    def learn(
        self, compared: Sequence[Compared], form: Form | None
    ) -> tuple["DecodingScores", list[Comparison]]:
        """Learn a score from every other of the stragglers' decoded answers that were compared.

        Returns:
            Scores with that one, and the comparisons of the others, from which it has not learned.
        """
        features, wrong, error = map(np.stack, zip(*compared, strict=True))
        if self.accuracy.tolerance is None:
            score = fit_error_probability(
                features[::2, None], wrong[::2, None], falling=(_MARGIN,), form=form
            )
            score = jax.tree.map(np.asarray, score)
            shown = [
                Comparison(value, math.nan, missed, math.inf)
                for value, missed in zip(
                    score.of_features(features[1::2]).tolist(), wrong[1::2].tolist(), strict=True
                )
            ]
        else:
            # It judges its bars by the others itself.
            usable, looks = np.ones((len(error), 1), bool), _without_margin(features)[:, None]
            score = fit_error_scale(looks, error[:, None], usable, self.accuracy, len(error))
            bars = score.of_features(features[1::2])
            ratios = error_ratios(error[1::2], bars).tolist()
            shown = [
                Comparison(math.nan, bar, False, ratio)
                for bar, ratio in zip(bars.tolist(), ratios, strict=True)
            ]
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

    def resent(self, queries: int) -> float:
        """Return the share of the calibration's queries that would be sent again."""
        score = self.of(queries)
        if isinstance(score, ErrorProbability):
            return score.share(max(self.limit(queries), 0.0))
        return 1.0 if score is None else 1 - score.share


def _without_margin(features: np.ndarray) -> np.ndarray:
    return np.where(np.arange(features.shape[-1]) == _MARGIN, 0, features)


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
    run, own, scores = eqx.filter_jit(run_workers), None, {}
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
        originals = coder.to_alphas(own.reshape(len(groups), queries, -1).swapaxes(0, 1))
        originals, layout = originals.swapaxes(0, 1), coder.layout(queries)
        random, seen, owners = np.random.default_rng(queries), [], []
        for draw in range(draws):
            looks = _straggler_looks(coder, queries, draw, random)
            lost = [place for place, each in enumerate(layout.own) if not looks[-1, each].any()]
            lost = coder.order[random.permutation(lost)[:places]]
            parts = []
            for mask in looks:
                found = coder.decode_all(answers, mask, len(groups))
                missed = (
                    ~agree_on_labels(found.predictions, originals, coder.form)
                    if accuracy.tolerance is None
                    else root_mean_square(found.predictions - originals, axis=2)
                )
                parts.append((found.features, found.informative, missed))
            # (looks, groups, places, ...) becomes (groups and places, looks, ...).
            stacked = [np.moveaxis(np.stack(p)[:, :, lost], 0, 2) for p in zip(*parts, strict=True)]
            seen.append([part.reshape(-1, *part.shape[2:]) for part in stacked])
            owners.append(np.repeat(np.arange(len(groups)), len(lost)))
        features, informative, missed = map(np.concatenate, zip(*seen, strict=True))
        if accuracy.tolerance is None:
            score = fit_error_probability(
                features,
                missed,
                usable=informative,
                owners=[np.concatenate(owners)],
                points=len(points),
                falling=(_MARGIN,),
                failure=0.25,
                form=coder.form,
            )
            scores[queries] = jax.tree.map(np.asarray, score)
        else:
            features = _without_margin(features)
            scores[queries] = fit_error_scale(features, missed, informative, accuracy, len(points))
    return DecodingScores(accuracy, scores, current_conditions(worker_dtype), own)


def _straggler_looks(
    coder: Coder, queries: int, draw: int, random: np.random.Generator
) -> Bool[np.ndarray, "3 num_workers"]:
    """Return which workers have answered at each look, where those of one query straggle.

    Queries and numbers are spread evenly over the draws, so that few sets represent all: Roberts'
    sequence, whose points fill the square evenly (1/p and 1/p^2 of the root of p^3 = p + 1).
    """
    first, second = np.modf((draw + 1) * np.array([0.7548776662466927, 0.5698402909980532]))[0]
    layout = coder.layout(queries)
    sent = np.concatenate([*coder.first[:queries], layout.extras]).astype(int)
    others = random.permutation(np.setdiff1d(sent, layout.own[int(first * queries)]))
    spare = max(len(others) - queries, 0)
    answered = max(len(others) - int(second * (spare + 1)), 1)
    looks = np.zeros((3, coder.num_workers), bool)
    for look, mask in enumerate(looks):
        mask[others[: max(answered - 2 + look, 1)]] = True
    return looks


def calibrate_or_restore(
    coder: Coder,
    model: Model,
    x: np.ndarray | Callable[[], np.ndarray],
    accuracy: Accuracy,
    worker_dtype: DTypeLike | None,
    cache: Path | None,
) -> DecodingScores:
    """Calibrate decoding, or restore a calibration from a file: it takes seconds.

    The file is named after all that calibration depends on. It is written if it is not there, or
    is damaged, which is logged. Raises as `calibrate_decoding`.
    """
    cache = cache if accuracy.tolerance is None else None  # bars are for one tolerance
    if cache is not None:
        try:
            state = read_arrays(cache, "it is made again")
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            _LOG.warning("%s", error)
        else:
            restored: dict[int, Any] = {}
            for queries in range(2, coder.num_data + 1):
                if f"{queries} weights" in state:
                    numbers: Any = {name: state[f"{queries} {name}"] for name in NUMBERS}
                    restored[queries] = ErrorProbability(**numbers, form=coder.form)
            conditions = current_conditions(worker_dtype)
            return DecodingScores(accuracy, restored, conditions, state["own"])
    x = x() if callable(x) else x
    scores = calibrate_decoding(coder, model, x, accuracy, worker_dtype=worker_dtype)
    if cache is not None:
        state = {
            f"{queries} {name}": np.asarray(getattr(score, name))
            for queries, score in scores.calibrated.items()
            for name in NUMBERS
        }
        assert scores.own is not None
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(cache, state | {"own": scores.own})
    return scores
