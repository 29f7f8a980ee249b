"""The interface of all pools: coded data points go out, answers and a mask come back."""

import abc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ..inference import Conditions, cast_floats
from ._batch import Batch, Refuse, refuse_odd
from ._calls import Call
from ._clock import AbstractClock
from ._desk import Desk
from ._overdue import Overdue
from ._report import PoolReport


class AbstractPool(abc.ABC):
    """Independent workers that run the same models: whoever answers first is decoded.

    Any worker can run any coded data point, one at a time, so a pool may have more workers than a
    code (spare ones), or fewer (each then runs several). See `_desk.py` for the rules of who gets
    what. A pool holds threads or processes: `close` it, or use it as a context manager.
    """

    _desk: Desk
    _worker_dtype: str | None = None
    _conditions: Conditions = Conditions()

    @property
    def worker_dtype(self) -> str | None:
        """What coded data points are cast to before they are sent; None: they go as they are."""
        return self._worker_dtype

    @property
    def conditions(self) -> Conditions:
        """At which precision workers answer, and on what; to compare calibrations with."""
        return self._conditions

    @property
    def clock(self) -> AbstractClock:
        """The time by which it lives, and who serves on it."""
        return self._desk.clock

    @property
    def num_workers(self) -> int:
        """How many workers there are, dead ones that are being replaced included."""
        return self._desk.num_workers

    def dispatch(
        self,
        coded: PyTree[Shaped[Array | np.ndarray, "num_points batch ..."]],
        *,
        kinds: Sequence[int] | None = None,
        needed: int | None = None,
        copies: int = 2,
    ) -> Batch:
        """Sends each coded data point, a batch for one worker's model, and comes back at once.

        Coded data points may be pytrees, whose leaves share the first two axes.
        `kinds` says which of the pool's models each runs, 0 for the served one (all unless given).
        `needed` is the number of answers that will do (all unless given): beyond it nothing is sent
        to a worker who could do something else. `copies` is how many workers may have the same
        coded data point in hand, when the first is overdue and the batch is short of answers.

        Raises: ValueError where the pool is closed, or a number does not fit; RuntimeError where it
        is broken (`trouble`).
        """
        values = jax.tree.map(np.asarray, coded)
        leaves, structure = jax.tree.flatten(values)
        leads = {leaf.shape[:2] for leaf in leaves}
        if len(leads) != 1 or len(min(leads)) < 2 or 0 in min(leads):
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(
                f"coded data points are (num_points, batch, ...), not of shape {shapes}"
            )
        number = len(leaves[0])
        batch = self.open(number, needed=needed, copies=copies)
        each = [jax.tree.unflatten(structure, parts) for parts in zip(*leaves, strict=True)]
        self.send(batch, range(number), each, kinds=kinds)
        return batch

    def open(
        self,
        num_points: int,
        *,
        needed: int | None = None,
        copies: int = 2,
        on_change: Callable[[Batch], Any] | None = None,
        overdue: Overdue | None = None,
        refuse: Refuse = refuse_odd,
    ) -> Batch:
        """A batch of coded data points that are sent one after the other, as they become known.

        `on_change(batch)` is called after each answer, or failure, from one of the pool's threads:
        it must be quick, and must not wait for the batch. `overdue` is when this batch's coded data
        points are overdue (the pool's unless given). `refuse(answer)` says why it is none, if so,
        and the worker has failed: unless given, what is not finite floats cannot be decoded.
        Numbers as in `dispatch`: a client that waits for more answers than `needed` may have to
        wait for stragglers, as the rest is only sent if a worker is free at once, or something is
        overdue.
        """
        return self._desk.open(num_points, needed, copies, on_change, overdue, refuse)

    def send(
        self,
        batch: Batch,
        points: Sequence[int],
        values: Iterable[PyTree],
        *,
        kinds: Sequence[int] | None = None,
    ) -> None:
        """Sends some coded data points of an open batch; `values` are (batch, ...) for each.

        Raises: ValueError where the batch has been forgotten, a point was sent before or is not
        there, or the pool is closed; RuntimeError where it is broken (`trouble`).
        """
        if kinds is None:
            kinds = [0] * len(points)
        cast = (cast_floats(value, self._worker_dtype) for value in values)
        self._desk.add(batch, points, cast, kinds)

    def report(self) -> PoolReport:
        """What the pool has seen so far."""
        return self._desk.report()

    def calls(self) -> list[Call]:
        """The latest calls that were answered, or given up as hanging: as they ended, 4,096."""
        return self._desk.calls()

    @property
    def trouble(self) -> str | None:
        """Why no answer will come any more, in words; None where the pool works.

        It is closed, or one of its own threads failed. What is open has then failed, and what is
        sent is refused. Workers that die, hang or do not start are no such trouble.
        """
        return self._desk.trouble

    @property
    def alarm(self) -> str | None:
        """What will end the pool unless somebody mends it, in words; None where all is well."""
        return None

    @property
    def ends_at(self) -> float:
        """The monotonic time at which that ends this process, where it does: else infinite."""
        return math.inf

    @property
    def heartbeat(self) -> float:
        """The monotonic time at which the pool last looked after its workers: every second."""
        return self._desk.heartbeat

    @property
    def idle(self) -> int:
        """How many workers have nothing in hand, at this moment."""
        return self._desk.idle

    @property
    def spare(self) -> float:
        """How many of those could take something without slowing down what others have in hand.

        Threads share their host's cores; what is overdue is not counted as work. Infinite where
        workers share nothing: then what waits for them slows nobody down, either.
        """
        return self._desk.spare

    def on_idle(self, callback: Callable[[], Any]) -> None:
        """Has `callback()` called whenever a worker is left without a task: one listener a pool.

        It comes from one of the pool's threads, as `on_change` does, and must be as quick.
        """
        self._desk.on_idle(callback)

    def close(self) -> None:
        """Ends the workers. Who still waits gets what is in."""
        self._desk.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
