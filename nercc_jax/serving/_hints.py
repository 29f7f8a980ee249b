"""Why a model does not do as it should, in words: for its status, and once for the log."""

import collections
import logging
import re
import threading
from collections.abc import Callable, Sequence

from ..pools import AbstractPool, PoolReport
from ._batcher import CodedBatcher
from ._coder import Coder
from ._health import Health
from ._predictor import Predictor

_LOG = logging.getLogger(__name__)

_LOOK = 1.0  # seconds between looks
# Looks, one after the other, that must see a hint before it is told, and miss it before it is over:
# a busy pool is saturated every other moment.
_BEGINS, _ENDS = 3, 30


def hints_of(
    batcher: CodedBatcher,
    coder: Coder,
    pool: AbstractPool,
    health: Health,
    report: PoolReport,
    uncodable: str | None,
) -> list[str]:
    """Why things are not as they should be; also why nothing is coded or decoded."""
    hints = [] if health.trouble is None else [health.trouble]
    if all(worker.state == "overdue" for worker in report.workers):
        hints.append(f"all {pool.num_workers} workers are overdue")
    if report.internal_errors:
        hints.append(f"the pool had {report.internal_errors} errors of its own: see the log")
    if coder.guesses and batcher.policy.max_disagreement is not None:
        known, needed = batcher.fidelity.known()
        if known < needed:
            hints.append(f"no estimate yet: {known} of {needed} groups; nothing is decoded")
    if batcher.waiting and not pool.idle:
        hints.append("the pool is saturated: queries wait for a worker, none is spare for codes")
    if uncodable is not None:
        hints.append(f"nothing is coded: {uncodable}")
    if pool.num_workers < coder.num_workers:
        hints.append(
            f"{pool.num_workers} workers for {coder.num_workers} coded data points of a group"
        )
    return hints


def hints_of_predictor(predictor: Predictor) -> list[str]:
    """Why it answers nothing, if so."""
    known, needed = predictor.progress()
    if predictor.state == "drifted":
        why = "predictions went wrong more often than promised"
        return [f"{why}: {known} of {needed} answers are known anew; nothing is predicted"]
    if predictor.state == "learning":
        return [f"still learning: {known} of {needed} answers; nothing is predicted"]
    if predictor.share == 0:
        return ["the surrogate is sure of no query: nothing is predicted"]
    return []


class HintLog:
    """A thread that tells the log of each hint when it comes, and when it is over."""

    def __init__(self, model: str, look: Callable[[], Sequence[str]]):
        """`look()` gives the hints of the moment; hints that differ in numbers only are one."""
        self._model, self._look = model, look
        self._told: dict[str, str] = {}
        self._changes: collections.Counter[str] = collections.Counter()  # looks that saw one
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nercc-hints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_LOOK):
            try:
                self.hear(self._look())
            except Exception:
                _LOG.exception("looking for hints failed", extra={"model": self._model})

    def hear(self, hints: Sequence[str]) -> None:
        """One look: tells what has changed for long enough."""
        seen = {re.sub(r"\d+", "", hint): hint for hint in hints}
        changed = seen.keys() ^ self._told.keys()
        self._changes = collections.Counter({kind: self._changes[kind] + 1 for kind in changed})
        for kind in sorted(changed):
            if self._changes[kind] < (_BEGINS if kind in seen else _ENDS):
                continue
            del self._changes[kind]
            if kind in seen:
                self._told[kind] = seen[kind]
                _LOG.info("hint: %s", seen[kind], extra={"model": self._model})
            else:
                _LOG.info("over: %s", self._told.pop(kind), extra={"model": self._model})
