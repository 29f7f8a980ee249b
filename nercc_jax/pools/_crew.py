"""How the workers of a pool are reached, whatever they are."""

import abc
import math
import re
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree


class WorkerDied(Exception):
    """A worker is gone, with what it had in hand."""


class AbstractCrew(abc.ABC):
    """How the workers of a pool are started, reached and ended.

    A worker has lives, numbered from 0. `hear(worker, life, outcome)` is to be called once a life
    when the worker is ready, with None, and once for each task sent, with the answer or an
    exception, `WorkerDied` if the life is over. Only `lacking` and `close` may block. Where `start`
    raises it has failed, and where `send` does the worker is dead.
    """

    @abc.abstractmethod
    def start(self, worker: int, life: int, hear: Callable[[int, int, Any], None]) -> None:
        """Begins a life of a worker, ending an earlier one that is still there."""

    @abc.abstractmethod
    def parcel(self, batch: PyTree) -> Any:
        """What `send` is to be given for a batch: made once, however often that is sent."""

    @abc.abstractmethod
    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        """Gives a worker a batch for its model `kind`."""

    def room(self, busy: int) -> float:
        """How many more could work beside so many and not slow them down: all, elsewhere."""
        return math.inf

    @abc.abstractmethod
    def lacking(self) -> str | None:
        """What workers that have not started may be waiting for, if that is known; may block."""

    @abc.abstractmethod
    def close(self) -> None:
        """Ends all workers."""


# The line of a traceback that says what was raised: frames are indented.
_RAISED = re.compile(r"[A-Za-z_][\w.]*(: |$)")


def reason_of(error: BaseException) -> str:
    """One line: what was raised, and where XLA wraps a traceback, what that says at its end."""
    text = str(error)
    _, traceback, raised = text.rpartition("Traceback (most recent call last):")
    lines = [line for line in raised.splitlines() if _RAISED.match(line)] if traceback else []
    return lines[0] if lines else f"{type(error).__name__}: {text}".splitlines()[0]
