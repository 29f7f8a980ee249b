"""What becomes of a cluster while a pool runs on it: its head, and where the workers lie."""

import logging
import time
from collections.abc import Callable

from ._ray_head import HeadProbe

_LOG = logging.getLogger(__name__)

_EVERY = 1.0  # seconds between two looks at the head


class Moves:
    """Moves workers to nodes that have fewer, one at a time, `every` so many seconds at most."""

    def __init__(
        self, misplaced: Callable[[], int | None], renew: Callable[[int], bool], every: float
    ):
        self._misplaced, self._renew, self._every = misplaced, renew, every
        self._due = time.monotonic() + every

    def move(self) -> None:
        """Moves a worker, if it is time and one would lie better elsewhere."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + self._every
        worker = self._misplaced()
        if worker is None:
            return
        if self._renew(worker):
            _LOG.info("worker %d moves to a node that has fewer of them", worker)
        else:
            self._due = 0.0  # it was busy


class HeadWatch:
    """Looks at the head, by turns of its own: what asks Ray itself waits for a head that is frozen.

    `look` is a turn of a `Watcher`, as `NodeWatch`'s is.
    """

    def __init__(self, probe: HeadProbe):
        self._probe = probe

    def look(self) -> float:
        self._probe.look()
        return time.monotonic() + _EVERY


class NodeWatch:
    """Looks, once all workers are ready, where they lie; the first time, that is told."""

    def __init__(
        self, probe: HeadProbe, settled: Callable[[], bool], tell: Callable[[], None], moves: Moves
    ):
        self._probe, self._settled, self._moves = probe, settled, moves
        self._tell: Callable[[], None] | None = tell

    def look(self) -> float:
        # Without a head, Ray's answer about nodes would be waited for until it ends us.
        if not self._probe.gone and self._settled():
            if self._tell is not None:
                self._tell()
                self._tell = None
            self._moves.move()
        return time.monotonic() + _EVERY
