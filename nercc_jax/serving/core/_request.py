"""Requests to a batcher, the replies to them, and the errors that replace a reply."""

import collections
import concurrent.futures
import dataclasses
import math
import statistics
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, Shaped

Source: TypeAlias = Literal["exact", "decoded", "predicted"]

_LONGEST_MESSAGE = 500  # characters

# Scales of queries that are remembered, after how many the median is computed, and the factor
# beyond which a query is odd.
_SCALES, _FEWEST_SCALES, _ODD = 127, 16, 100.0

# The only dtype that can be coded.
CODED = np.dtype(np.float32)


class QueueFull(RuntimeError):
    """The queue has no room for a request: the client should come back later."""


class DeadlineExceeded(TimeoutError):
    """The deadline of a request passed before all its queries were answered."""


class InferenceFailed(RuntimeError):
    """No worker could answer a query, and it could not be decoded.

    Attributes:
        public: the message for clients, without what the model raised.
    """

    def __init__(self, message: str, public: str | None = None):
        RuntimeError.__init__(self, message)
        self.public = message if public is None else public


class ServerClosing(RuntimeError):
    """The batcher accepts no more requests, or closed before it answered this one."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answers to the B queries of a request, and what each answer rests on.

    Attributes:
        values: the answers, an array or, for a model with several outputs, a dict of arrays.
        exact: whether an answer is the model's own answer to the query itself.
        predicted: whether an answer comes from a surrogate (`Predictor`).
        reexecuted: whether the query was sent to a worker a second time.
        suspicious: whether the model's own answer looked wrong, and no other worker confirmed it in
            time (`--check-answers`).
        asked: the number of workers that had received the query, or a coded data point of its
            group, when it was answered.
        responded: the number of those workers that had responded.
        expected_disagreement: the probability that the label differs from the model's own label.
            It follows from the margin and the posterior deviation of the query; for codes that are
            no regression it is the mean over calibration data decoded from the same workers. It is
            0 for exact answers, NaN as long as nothing is known, and NaN for approximate values.
        expected_error: the error bar of values, in units of the outputs (root mean square over a
            row's outputs), which holds in a share `coverage` of the cases. Where outputs have
            labels, the expected distance to the model's answer: for a decoded answer the root mean
            squared error over calibration data, for a predicted one the bound that holds in nine of
            ten cases. 0 for exact answers, NaN if unknown.
        queued: the seconds until the first query was sent.
        seconds: the seconds from arrival to reply.
    """

    values: PyTree[Shaped[np.ndarray, "batch ..."]]
    exact: Bool[np.ndarray, " batch"]
    predicted: Bool[np.ndarray, " batch"]
    reexecuted: Bool[np.ndarray, " batch"]
    suspicious: Bool[np.ndarray, " batch"]
    asked: Int[np.ndarray, " batch"]
    responded: Int[np.ndarray, " batch"]
    expected_disagreement: Float[np.ndarray, " batch"]
    expected_error: Float[np.ndarray, " batch"]
    queued: float
    seconds: float

    def sources(self) -> list[str]:
        """Return each answer's source; "reexecuted" is exact, at the second attempt."""
        exact = np.where(self.reexecuted, "reexecuted", "exact")
        approximate = np.where(self.predicted, "predicted", "decoded")
        return np.where(self.exact, exact, approximate).tolist()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to one query, or to several, one row each, and where it came from."""

    value: np.ndarray
    source: Source
    asked: int
    responded: int
    disagreement: float = 0.0
    error: float = 0.0
    suspicious: bool = False
    features: np.ndarray | None = None  # of a decoded one


@dataclasses.dataclass
class ApproximateAnswer:
    """An answer to a straggler's query that will be compared with the model's own.

    Attributes:
        answer: the answer, not the model's own.
        x: the query's data point; None once it is not kept any more.
        epoch: of the evidence (`Risk.epoch`) when the answer was made.
        given: whether it was given out, and counts for what was promised.
        forced: whether it was given out although it is less certain than was promised.
        repeated: whether the model was asked again because the first call failed.
        widened: the factor of the error bar with which it was given out.
    """

    answer: Answer
    x: np.ndarray | None
    epoch: int
    given: bool = False
    forced: bool = False
    repeated: bool = False
    widened: float = 1.0


class Request:
    """B queries that arrived together and get one reply. Only the scheduler's thread changes it."""

    def __init__(
        self,
        x: np.ndarray,
        values: np.ndarray,
        arrived: float,
        deadline: float,
        exact: bool,
        lead: float = 0.0,
    ):
        """Create a request of queries (B, ...), whose answers are written into `values`.

        It fails `deadline` seconds after it arrived. `exact` accepts only the model's own answers.
        It overtakes requests that arrived up to `lead` seconds earlier; 0 is ordinary priority.
        """
        size = len(x)
        self.x: np.ndarray | None = x  # all queries, until the request is over
        self.future: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        self.arrived, self.deadline = arrived, deadline
        self.high, self.turn = lead > 0, arrived - lead
        self.sent = np.inf  # when its first query was sent
        self.exact_only = exact
        self.audits = False  # it is the scheduler's own, to compare what was given out
        self.queued = False
        self.queries = [Query(self, place, row) for place, row in enumerate(x)]
        self._left = size
        self._values = values
        self._exact, self._predicted = np.ones(size, bool), np.zeros(size, bool)
        self._reexecuted, self._suspicious = np.zeros((2, size), bool)
        self._asked = np.zeros(size, int)
        self._responded = np.zeros(size, int)
        self._expected = np.zeros((2, size))

    def on_cancel(self, notify: Callable[["Request"], Any]) -> None:
        """Call `notify(self)`, from any thread, when somebody cancels the future."""
        # A weak reference: the request holds the future, and must not live in a cycle.
        reference = weakref.ref(self)

        def ended(future: concurrent.futures.Future[Reply]) -> None:
            request = reference()
            if request is not None and future.cancelled():
                notify(request)

        self.future.add_done_callback(ended)

    def answer(self, queries: Sequence["Query"], answer: Answer) -> bool:
        """Store the answers to some queries, one row each, and return whether none is missing."""
        places = [query.place for query in queries]
        self._values[places] = answer.value
        self._asked[places], self._responded[places] = answer.asked, answer.responded
        if answer.source != "exact":
            self._exact[places], self._predicted[places] = False, answer.source == "predicted"
            self._expected[0, places] = answer.disagreement
            self._expected[1, places] = answer.error
        if answer.suspicious:
            self._suspicious[places] = True
        if again := [query.place for query in queries if query.reexecuted]:
            self._reexecuted[again] = True
        self._left -= len(places)
        return self._left == 0

    def reply(self, now: float) -> Reply:
        return Reply(
            self._values,
            self._exact,
            self._predicted,
            self._reexecuted,
            self._suspicious,
            self._asked,
            self._responded,
            *self._expected,
            queued=self.sent - self.arrived,
            seconds=now - self.arrived,
        )

    def release(self) -> None:
        """Drop the queries' data, which may be large and must not live until the deadline."""
        for query in self.queries:
            query.x = None
        self.queries, self.x = [], None


class Query:
    """One data point of a request.

    Attributes:
        x: the data point; None once the request is over.
        groups: the groups that the query is part of, until it is over: a copy is in one of its own.
        done: whether nobody waits for it any more.
        waiting: whether it stands in the queue.
        reexecuted: whether it was sent a second time.
        approximate: answers that are to be compared with the model's own, by their sources.
        candidates: the model's answers that are held back to be compared, by their workers.
        expected: what the model's own answer is expected to be (`AnswerChecks`).
    """

    __slots__ = (
        "approximate", "candidates", "done", "expected", "groups", "place", "reexecuted", "request",
        "waiting", "x",
    )  # fmt: skip

    def __init__(self, request: Request, place: int, x: np.ndarray):
        self.request, self.place = request, place
        self.x: np.ndarray | None = x
        self.groups: list[Any] = []  # of `Group`, which this file does not know
        self.done = self.reexecuted = False
        self.approximate: dict[Source, ApproximateAnswer] = {}
        self.candidates: dict[int, np.ndarray] = {}
        self.expected: Any = None  # an `Expectation`
        self.waiting = True

    @property
    def copied(self) -> bool:
        """True while a further worker has it."""
        return any(not group.mask.all() for group in self.groups[1:])

    def leave_groups(self) -> list[Any]:
        """Forget the groups, and return them.

        A finished query must not hold them in a reference cycle: a collection of garbage stops all
        threads of a server.
        """
        groups, self.groups = self.groups, []
        return groups

    def source_of(self, answer: Answer) -> str:
        """Return the answer's source, or "reexecuted" for an exact answer at the second attempt."""
        return "reexecuted" if answer.source == "exact" and self.reexecuted else answer.source


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shape and dtype of the rows of a batch: queries, or answers."""

    shape: tuple[int, ...]
    dtype: np.dtype = CODED

    def zeros(self, number: int) -> Shaped[np.ndarray, "number ..."]:
        return np.zeros((number, *self.shape), self.dtype)

    def check(self, x: np.ndarray) -> Shaped[np.ndarray, "batch ..."]:
        """Return queries as workers receive them.

        Raises ValueError where they are not rows of this shape and kind, or not finite.
        """
        x = np.asarray(x)
        if x.ndim != len(self.shape) + 1 or x.shape[1:] != self.shape or not len(x):
            raise ValueError(
                f"queries must come as an array of shape (B, {', '.join(map(str, self.shape))}) "
                f"with B of 1 or more, not {x.shape}"
            )
        if self.dtype != CODED:
            if x.dtype != self.dtype:
                raise ValueError(f"queries are {x.dtype}, but the model takes {self.dtype}")
            return np.ascontiguousarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"queries are {x.dtype}: codes work on floats, so convert them first")
        if x.dtype != self.dtype:  # workers compute in float32, where too large a number is inf
            with np.errstate(over="ignore"):
                x = x.astype(self.dtype)
        x = np.ascontiguousarray(x)
        if not np.isfinite(x).all():
            finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
            raise ValueError(
                f"queries {np.flatnonzero(~finite).tolist()} are not finite in float32"
            )
        return x


def fill_up(x: Shaped[np.ndarray, "..."], size: int, axis: int = 0) -> Shaped[np.ndarray, "..."]:
    """Return x with zeros behind it, up to a size: so few programs are compiled."""
    if x.shape[axis] == size:
        return x
    more = (*x.shape[:axis], size - x.shape[axis], *x.shape[axis + 1 :])
    return np.concatenate([x, np.zeros(more, x.dtype)], axis)


class ScaleMonitor:
    """Tells queries of quite another scale than most: coded with others, they would spoil them.

    A coded data point is a sum of queries, in which much larger ones leave little of the others.
    """

    def __init__(self):
        self._scales: collections.deque[float] = collections.deque(maxlen=_SCALES)
        self._range = 0.0, math.inf
        self._new = 0  # scales since the range was computed

    def is_odd(self, x: Shaped[np.ndarray, "batch ..."]) -> bool:
        """Return whether some of these queries are so, and remember their scales."""
        if len(x) == 1:  # most often: Python's numbers are quicker
            scales = [max(float(x.max()), -float(x.min()))]
        else:
            flat = x.reshape(len(x), -1)
            scales = np.maximum(flat.max(axis=1), -flat.min(axis=1)).tolist()
        self._scales.extend(scales)
        self._new += len(scales)
        if self._new >= _FEWEST_SCALES:
            self._new = 0
            usual = statistics.median(tuple(self._scales))
            self._range = (usual / _ODD, usual * _ODD) if usual > 0 else (0.0, math.inf)
        least, most = self._range
        return not (least <= min(scales) and max(scales) <= most)


def message_of(error: BaseException) -> str:
    """Return the text that clients see of an error, which may echo much of what they sent."""
    public = error.public if isinstance(error, InferenceFailed) else str(error)
    return shorten(public or type(error).__name__)


def shorten(text: str) -> str:
    if len(text) <= _LONGEST_MESSAGE:
        return text
    return f"{text[:_LONGEST_MESSAGE]}... ({len(text)} characters)"
