"""Simulated stragglers on groups all of whose answers are known, to calibrate decoding.

A query's own worker straggles, and others with it; the rest answers, and the groups are decoded as
the last answers come in. Whether the labels are then the model's own calibrates a
`DecodingErrorProbability`. Sets of stragglers differ, so one calibration holds in the mean over
sets like these.
"""

import collections
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from ...risk import logistic_regression
from ..core._coder import Coder
from ..core._error_probability import DecodingErrorProbability, error_probability

DRAWS = 32  # sets of stragglers
_LOOKS = 3  # decodings for each set: before the last two answers, the last one, and with all
# Roberts' sequence, whose points fill the square evenly: 1/p and 1/p^2 of the root of p^3 = p + 1.
_SPREAD = np.array([0.7548776662466927, 0.5698402909980532])
_PLACES = 4  # of a group's queries that are looked at for each set
_SAMPLES = 20_000  # that the regression takes, at most


class StragglerSimulation:
    """Simulations with groups of a given number of queries; the last `DRAWS` of them count."""

    def __init__(self, coder: Coder, queries: int):
        self._coder, self._queries = coder, queries
        self._random, self._number = np.random.default_rng(queries), 0
        self._seen: collections.deque[tuple[np.ndarray, ...]] = collections.deque(maxlen=DRAWS)

    def draw(
        self,
        answers: Float[np.ndarray, "groups num_workers m"],
        originals: Float[np.ndarray, "groups num_data m"],
        known: int,
        width: int,
    ) -> Iterator[None]:
        """Simulate one set of stragglers in all groups, in steps that decode `width` at once.

        Originals are by alpha. Only the first `known` groups count; the rest keeps shapes fixed.
        """
        looks = self._draw_looks()
        layout = self._coder.layout(self._queries)
        missing = [place for place, own in enumerate(layout.own) if not looks[-1, own].any()]
        missing = self._random.permutation(missing)[:_PLACES]
        places = self._coder.alphas_of(self._queries)[missing]
        seen = []
        for mask in looks:
            parts = []
            for begin in range(0, len(answers), width):
                some = slice(begin, begin + width)
                found, same = self._coder.compare(answers[some], originals[some], mask, width)
                parts.append((found.features, found.informative, ~same))
                yield
            seen.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        # (looks, groups, places, ...) becomes (groups and places, looks, ...).
        self._seen.append(
            tuple(
                np.concatenate(np.moveaxis(np.stack(part)[:, :known, places], 0, 2))
                for part in zip(*seen, strict=True)
            )
        )

    def discard(self) -> None:
        self._seen.clear()

    def calibrate(self, known: int) -> DecodingErrorProbability:
        parts = (np.concatenate(part) for part in zip(*self._seen, strict=True))
        return calibrate(*parts, number=known * self._queries)

    def _draw_looks(self) -> Bool[np.ndarray, "looks num_workers"]:
        """Return the masks of workers that have answered at each look.

        One query's own workers straggle, and any number of the others up to the redundancy. Queries
        and numbers are spread evenly, so that few sets represent all.
        """
        self._number += 1
        first, second = np.modf(self._number * _SPREAD)[0]
        layout = self._coder.layout(self._queries)
        sent = np.concatenate([*self._coder.first[: self._queries], layout.extras]).astype(int)
        own = layout.own[int(first * self._queries)]
        others = self._random.permutation(np.setdiff1d(sent, own))
        spare = max(len(others) - self._queries, 0)
        answered = max(len(others) - int(second * (spare + 1)), 1)
        looks = np.zeros((_LOOKS, self._coder.num_workers), bool)
        for look, mask in enumerate(looks):
            mask[others[: max(answered - (_LOOKS - 1 - look), 1)]] = True
        return looks


def calibrate(
    features: Float[np.ndarray, "samples looks features"],
    informative: Bool[np.ndarray, "samples looks"],
    wrong: Bool[np.ndarray, "samples looks"],
    number: int,
) -> DecodingErrorProbability:
    """Calibrate the error probability of queries whose own worker straggles.

    A query is answered at the first look at which it is certain enough. Here it counts as wrong
    from the least probability on that it had at any look with a wrong label: that bounds the share
    of wrong labels from above, and grows with the limit. There are `number` different queries among
    the samples.
    """
    thin = slice(None, None, -(-informative.size // _SAMPLES))
    flat = features[informative][thin].astype(np.float64)
    # A query is much the same under all sets: it counts as one in all, not as one in each.
    count = min(number / max(len(flat), 1), 1.0)
    weights = logistic_regression(flat, wrong[informative][thin], count=count).astype(np.float32)
    probability = error_probability(features, informative, weights)
    least = np.min(np.where(wrong, probability, np.inf), axis=1)
    wrong_from = np.sort(least[np.isfinite(least)])
    answered_from = np.sort(np.min(probability, axis=1))
    return DecodingErrorProbability(weights, wrong_from, answered_from, number)
