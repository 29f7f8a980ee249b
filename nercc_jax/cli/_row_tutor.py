"""Learning from the rows that were computed, beside the run that computes them."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..codes import NeRCC
from ..pools import Goal
from ..risk import ErrorBars, ErrorProbability
from ..schemes import FittedScheme, Scheme, fit_scheme
from ..surrogates import learner_card, load_learner, save_learner
from ._background import in_background

_LOG = logging.getLogger(__name__)
CAPACITY = 1024  # rows that a learner knows at most
# Of a doubt, what is written.
_DOUBT = ("weights", "knots", "shifts", "levels", "risks", "shares")
_USEFUL = 0.5  # share of rows that have to be known for what is not heard to be decoded


class Tutor:
    """Fits a scheme to what is computed: first to so many rows, then to twice as many each time.

    On a thread of its own, so that workers need not wait for it. `at_most` is the share of rows
    that are decoded, at most: of labels, more of those may be wrong.
    """

    def __init__(self, code: NeRCC, goal: Goal, first: int, at_most: float):
        self._code, self._goal, self._due, self._at_most = code, goal, first, at_most
        self._thread: threading.Thread | None = None
        self._news: list[FittedScheme] = []
        self.lesson: FittedScheme | None = None

    def teach(
        self,
        number: int,
        pairs: Callable[[int], tuple[np.ndarray, np.ndarray]],
        seconds: float,
    ) -> None:
        """So many rows could be learned; `pairs` gives that many inputs and values of them.

        Waits for so many seconds, where something is to be learned: threads that compute keep the
        interpreter busy."""
        if self._thread is not None and self._thread.is_alive():
            return
        if number < self._due or (self.lesson is not None and self._full(self.lesson)):
            return
        self._due = 2 * number
        x, y = pairs(min(number, CAPACITY))
        self._thread = in_background(self._learn, x, y)
        self._thread.join(seconds)

    def look(self) -> FittedScheme | None:
        """A new lesson, if there is one since the last look."""
        if not self._news:
            return None
        self.lesson = self._news.pop()
        return self.lesson

    def resume(self, lesson: FittedScheme) -> None:
        """Goes on with what an earlier run learned."""
        self.lesson, self._due = lesson, 2 * lesson.pairs

    def limit(self, lesson: FittedScheme) -> float:
        """How large a score may be."""
        if self._goal.tolerance is not None:
            return self._goal.tolerance
        assert lesson.scheme.error_probability is not None
        assert self._goal.max_disagreement is not None
        return lesson.scheme.error_probability.limit(
            min(1.0, self._goal.max_disagreement / self._at_most)
        )

    def known(self, lesson: FittedScheme) -> float:
        """The share of rows that need not be computed."""
        if self._goal.tolerance is not None:
            return lesson.within(self._goal.tolerance, self._goal.coverage)
        return lesson.sure(self.limit(lesson))

    def useful(self, lesson: FittedScheme) -> bool:
        """Whether it tells enough rows to be worth the copies of others."""
        return self.known(lesson) >= _USEFUL

    def _full(self, lesson: FittedScheme) -> bool:
        return lesson.pairs >= CAPACITY and self.useful(lesson)

    def _learn(self, x: np.ndarray, y: np.ndarray) -> None:
        labels = self._goal.max_disagreement is not None
        try:
            self._news.append(fit_scheme(x, y, self._code, capacity=CAPACITY, labels=labels))
        except ValueError as error:  # a function that is constant, for example
            _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)


def save_lesson(path: Path, lesson: FittedScheme) -> None:
    """As a file of its learner, which has all else beside."""
    scheme: Any = lesson.scheme
    about = {
        "pairs": lesson.pairs,
        "deviations": _listed(lesson.deviations),
        "doubts": None if lesson.doubts is None else _listed(lesson.doubts),
        "bars": {name: _listed(getattr(scheme.bars, name)) for name in ("coverages", "factors")},
        "doubt": scheme.error_probability
        and {name: _listed(getattr(scheme.error_probability, name)) for name in _DOUBT},
    }
    save_learner(path, scheme.surrogate, about)


def load_lesson(path: Path, code: NeRCC) -> FittedScheme:
    """What `save_lesson` wrote. Raises: ValueError, naming the file, as `load_learner` does."""
    learner, about = load_learner(path), learner_card(path)
    bars, doubt = about["bars"], about["doubt"]
    scheme = Scheme(
        code,
        surrogate=learner,
        bars=ErrorBars(**{name: _array(each) for name, each in bars.items()}),
        error_probability=doubt
        and ErrorProbability(**{name: _array(each) for name, each in doubt.items()}),
        redundancy="doubtful",
    )
    deviations, doubts = np.asarray(about["deviations"]), about["doubts"]
    return FittedScheme(
        scheme, about["pairs"], deviations, None if doubts is None else np.asarray(doubts)
    )


def _listed(numbers: Any) -> list[float]:
    """For JSON, which knows nothing infinite."""
    return np.nan_to_num(np.asarray(numbers, np.float32)).tolist()


def _array(numbers: list[float]) -> Any:
    return jnp.asarray(numbers, float)
