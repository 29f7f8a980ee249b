"""Requests to a batcher, what they are answered with, and why they are not."""

import concurrent.futures
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, Shaped

from ._record import Record

Way: TypeAlias = Literal["exact", "decoded", "predicted"]


class QueueFull(RuntimeError):
    """More queries wait than may: come again later."""


class DeadlineExceeded(TimeoutError):
    """The request's deadline passed before all its queries were answered."""


class InferenceFailed(RuntimeError):
    """No worker could answer a query, and it could not be decoded."""


class ServerClosing(RuntimeError):
    """The batcher takes no more requests, or was closed before this one was answered."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answers to a request's B queries, and what each rests on.

    `exact`: the model's own answer to the query itself; otherwise it was decoded from the answers
    to coded data points. `asked` and `heard` are the workers that had been given the query or a
    coded data point of its group, and those that had answered, when it was answered; `reexecuted`
    ones were sent a second time, and `predicted` ones answered from what was known beside their
    group's answers (`Predictor`). `expected_disagreement` is the probability that the label is not
    the model's own: by margin and deviation, or, for codes that are no regression, the mean over
    calibration data decoded from the same workers. `expected_error` is in units of the outputs:
    decoded, the root of the mean squared distance to the model's answers over such data; predicted,
    how far it is off at most in nine of ten cases. They are 0 for exact answers and NaN where
    nothing is known yet. `queued` and `seconds` are how long the first query waited to be sent, and
    how long the request took. `values` are an array, or a dict of such from a model that returns
    several.
    """

    values: PyTree[Shaped[np.ndarray, "batch ..."]]
    exact: Bool[np.ndarray, " batch"]
    predicted: Bool[np.ndarray, " batch"]
    reexecuted: Bool[np.ndarray, " batch"]
    asked: Int[np.ndarray, " batch"]
    heard: Int[np.ndarray, " batch"]
    expected_disagreement: Float[np.ndarray, " batch"]
    expected_error: Float[np.ndarray, " batch"]
    queued: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """One query's part of a reply, and in which way it came."""

    value: np.ndarray
    way: Way
    asked: int
    heard: int
    disagreement: float = 0.0
    error: float = 0.0


class Request:
    """B queries that came and are answered together. Only the batcher's thread changes it."""

    def __init__(
        self,
        x: np.ndarray,
        values: np.ndarray,
        arrived: float,
        deadline: float,
        exact: bool,
        lead: float = 0.0,
        record: Record | None = None,
    ):
        """`values` are filled in as queries are answered. `lead`: seconds that it goes ahead.

        It `arrived` then, by the batcher's clock.
        """
        size = len(x)
        self.record = record
        self.future: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        self.arrived = arrived
        self.high, self.turn = lead > 0, self.arrived - lead
        self.deadline = deadline  # seconds from arrival
        self.sent = np.inf  # when its first query was
        self.exact_only = exact
        self.queued = False
        self.queries = [Query(self, place, row) for place, row in enumerate(x)]
        self._left = size
        self._values = values
        self._exact, self._predicted = np.ones(size, bool), np.zeros(size, bool)
        self._again = np.zeros(size, bool)
        self._asked = np.zeros(size, int)
        self._heard = np.zeros(size, int)
        self._expected = np.zeros((2, size))

    def on_cancel(self, tell: Callable[["Request"], Any]) -> None:
        """`tell(self)` is called, from any thread, if somebody cancels its future."""
        known = weakref.ref(self)  # it holds the future: what is over must go by itself

        def ended(future: concurrent.futures.Future[Reply]) -> None:
            request = known()
            if request is not None and future.cancelled():
                tell(request)

        self.future.add_done_callback(ended)

    def answer(self, query: "Query", answer: Answer) -> bool:
        """Takes one query's answer; whether it was the last that was missing."""
        place = query.place
        self._values[place] = answer.value
        self._exact[place], self._again[place] = answer.way == "exact", query.reexecuted
        self._predicted[place] = answer.way == "predicted"
        self._asked[place], self._heard[place] = answer.asked, answer.heard
        self._expected[:, place] = answer.disagreement, answer.error
        if self.record is not None:
            self.record.answers[place] = query.way_of(answer)
        self._left -= 1
        return self._left == 0

    def reply(self, now: float) -> Reply:
        return Reply(
            self._values,
            self._exact,
            self._predicted,
            self._again,
            self._asked,
            self._heard,
            *self._expected,
            queued=self.sent - self.arrived,
            seconds=now - self.arrived,
        )

    def release(self) -> None:
        """It is over: its data, which may be large, must not live until its deadline."""
        for query in self.queries:
            query.x = None
        self.queries = []


class Query:
    """One data point of a request.

    `done`: nobody waits for it; `waiting`: it is in a lane; `tell_home`: tells the first group it
    was in that something happened to it elsewhere.
    """

    __slots__ = ("done", "place", "reexecuted", "request", "tell_home", "waiting", "x")

    def __init__(self, request: Request, place: int, x: np.ndarray):
        self.request, self.place = request, place
        self.x: np.ndarray | None = x
        self.tell_home: Callable[[], None] | None = None
        self.done = self.reexecuted = False
        self.waiting = True

    def leave_home(self, *, tell: bool) -> None:
        """It is over. It lets go of its first group, which holds it, and may `tell` it so.

        What is over must go by itself: to look for garbage stops a server's threads.
        """
        tell_home, self.tell_home = self.tell_home, None
        if tell and tell_home is not None:
            tell_home()

    def way_of(self, answer: Answer) -> str:
        """How it was answered: in the answer's way, or, a second time, "reexecuted"."""
        return "reexecuted" if answer.way == "exact" and self.reexecuted else answer.way


def words_of(error: BaseException) -> str:
    """What is told of an error."""
    return str(error) or type(error).__name__
