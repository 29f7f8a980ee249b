"""Rehearsing stragglers on groups all of whose answers are known: what would decoding make of them?

A query's own worker straggles, and others with it; the rest answers, and the groups are decoded as
the last answers come in. Whether the labels are then the model's own calibrates a `QueryDoubt`.
Sets of stragglers differ, so that one doubt serves them all, in the mean over sets like these.
"""

import collections
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from ._coder import Coder
from ._query_doubt import QueryDoubt, calibrate

DRAWS = 32  # sets of stragglers
_LOOKS = 3  # at what is decoded: before the last two answers, the last one, and with all that come
# Roberts' sequence, whose points fill the square evenly: 1/p and 1/p^2 of the root of p^3 = p + 1.
_SPREAD = np.array([0.7548776662466927, 0.5698402909980532])
_PLACES = 4  # of a group's queries that are looked at for each set


class Rehearsal:
    """The rehearsals of groups of `queries`, the last `DRAWS` of them."""

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
        """One set of stragglers, for all groups; the first `known` count, others fill up.

        Each step looks at so many of the groups at once (`Coder.compare`).
        """
        looks = self._draw_looks()
        layout = self._coder.layout(self._queries)
        missing = [place for place, own in enumerate(layout.own) if not looks[-1, own].any()]
        missing = self._random.permutation(missing)[:_PLACES]
        places = self._coder.places(self._queries)[missing]
        seen = []
        for mask in looks:
            parts = []
            for begin in range(0, len(answers), width):
                some = slice(begin, begin + width)
                found, same = self._coder.compare(answers[some], originals[some], mask, width)
                parts.append((found.features, found.told, ~same))
                yield
            seen.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        # (looks, groups, places, ...) becomes (groups and places, looks, ...).
        self._seen.append(
            tuple(
                np.concatenate(np.moveaxis(np.stack(part)[:, :known, places], 0, 2))
                for part in zip(*seen, strict=True)
            )
        )

    def calibrate(self, known: int) -> QueryDoubt:
        """The doubt that these rehearsals of `known` groups tell."""
        features, told, wrong = (np.concatenate(part) for part in zip(*self._seen, strict=True))
        return calibrate(features, told, wrong, known * self._queries)

    def _draw_looks(self) -> Bool[np.ndarray, "looks num_workers"]:
        """Who has answered at each look.

        One query's own workers straggle, and of the others any number up to the redundancy. Queries
        and numbers are spread evenly, so that few sets stand for all.
        """
        self._number += 1
        first, second = np.modf(self._number * _SPREAD)[0]
        layout = self._coder.layout(self._queries)
        sent = np.concatenate([*self._coder.first[: self._queries], layout.extras]).astype(int)
        own = layout.own[int(first * self._queries)]
        others = self._random.permutation(np.setdiff1d(sent, own))
        spare = max(len(others) - self._queries, 0)
        heard = max(len(others) - int(second * (spare + 1)), 1)
        looks = np.zeros((_LOOKS, self._coder.num_workers), bool)
        for look, mask in enumerate(looks):
            mask[others[: max(heard - (_LOOKS - 1 - look), 1)]] = True
        return looks
