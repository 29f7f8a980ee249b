"""Requests to a batcher, the replies to them, and the errors that replace a reply."""

import concurrent.futures
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, Shaped

from ...risk.votes import HeldAnswers

Source: TypeAlias = Literal["exact", "decoded", "predicted"]

_LONGEST_MESSAGE = 500  # characters


class QueueFull(RuntimeError):
    """The error of a request for which the queue has no room; the client should retry later."""


class DeadlineExceeded(TimeoutError):
    """The error of a request whose deadline passed before all its queries were answered."""


class InferenceFailed(RuntimeError):
    """The error of a request with a query that no worker could answer, and that was not decoded.

    Attributes:
        public: the message for clients, without the model's own exception.
    """

    def __init__(self, message: str, public: str | None = None):
        RuntimeError.__init__(self, message)
        self.public = message if public is None else public


class ServerClosing(RuntimeError):
    """The error of a request that the batcher refuses, or cannot answer, because it closes."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answers to the B queries of a request, with their sources and expected errors.

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
        expected_disagreement: the probability that the label differs from the model's own label. It
            follows from the margin of the query and, if the code has one, its posterior deviation.
            0 for exact answers, NaN if unknown, and NaN for approximate values.
        expected_error: the error bar of values, in units of the outputs (root mean square over a
            row's outputs), which covers the error in a share `coverage` of the cases. For outputs
            with labels: NaN for a decoded answer, and for a predicted answer the bound on its
            distance to the model's own answer in the same share. 0 for exact answers, NaN if
            unknown.
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
        """Return each answer's source; "reexecuted" means exact after the query was sent again."""
        exact = np.where(self.reexecuted, "reexecuted", "exact")
        approximate = np.where(self.predicted, "predicted", "decoded")
        return np.where(self.exact, exact, approximate).tolist()


@dataclasses.dataclass(eq=False)
class Answer:
    """The answer to one query, or the answers to several, one a row, and its source.

    Attributes:
        value: the answer.
        source: "exact", "decoded" or "predicted".
        asked: the number of workers that had received the query, or a coded data point of its
            group.
        responded: the number of those workers that had responded.
        disagreement: the probability that the label differs from the model's own.
        error: the error bar.
        suspicious: whether it is the model's own, looked wrong, and no other worker confirmed it.
        x: the query's data point, if the answer is approximate and must be compared with the
            model's own; None after the query was sent again for that.
        epoch: the epoch of the evidence (`Risk.epoch`) when it was computed.
        within: whether it is within the limit of its calibration.
        given: whether it was given out, so that it counts for the promised accuracy.
        widened: the factor by which its error bar was widened when it was given out.
    """

    value: np.ndarray
    source: Source
    asked: int
    responded: int
    disagreement: float = 0.0
    error: float = 0.0
    suspicious: bool = False
    x: np.ndarray | None = None
    epoch: int = 0
    within: bool = False
    given: bool = False
    widened: float = 1.0


class Request:
    """B queries that arrived together and get one reply. Only the deciding thread changes it.

    Attributes:
        x: The data points of all queries; None once the request is over.
        future: The future of the reply.
        arrived: When it arrived.
        deadline: Seconds after its arrival at which it fails.
        exact_only: Whether only the model's own answers are accepted.
        own: None for a caller's request. The server's own requests are "audit", to compare an
            approximate answer, and "probe", to see whether workers answer.
        sent: When its first query was sent; infinite before.
        queued: Whether it has been put into the queue.
        queries: Its queries; empty once it is over.
        left: The number of queries without an answer.
        reply: The reply, with the answers so far.
    """

    def __init__(
        self,
        x: np.ndarray,
        values: np.ndarray,
        arrived: float,
        deadline: float,
        exact: bool,
        own: Literal["audit", "probe"] | None = None,
    ):
        """Create a request of queries (B, ...), whose answers are written into `values`."""
        size = len(x)
        self.x: np.ndarray | None = x
        self.future: concurrent.futures.Future[Reply] = concurrent.futures.Future()
        self.arrived, self.deadline = arrived, deadline
        self.exact_only, self.own = exact, own
        self.sent, self.queued = np.inf, False
        self.queries = [Query(self, place, x[place, ...]) for place in range(size)]
        self.left = size
        predicted, reexecuted, suspicious = np.zeros((3, size), bool)
        counts, expected = np.zeros((2, size), int), np.zeros((2, size))
        flags = np.ones(size, bool), predicted, reexecuted, suspicious
        self.reply = Reply(values, *flags, *counts, *expected, queued=0.0, seconds=0.0)

    def on_cancel(self, notify: Callable[["Request"], Any]) -> None:
        """Call `notify(self)` when the future is cancelled, in the thread that cancels it."""
        # A weak reference, since the request holds the future: avoids a reference cycle.
        reference = weakref.ref(self)

        def ended(future: concurrent.futures.Future[Reply]) -> None:
            request = reference()
            if request is not None and future.cancelled():
                notify(request)

        self.future.add_done_callback(ended)

    def answer(self, queries: Sequence["Query"], answer: Answer, rows: Sequence[int]) -> None:
        """Store the answers to some queries, which are the given rows of `answer.value`."""
        places, reply = [query.place for query in queries], self.reply
        reply.values[places] = answer.value[rows]
        reply.asked[places], reply.responded[places] = answer.asked, answer.responded
        if answer.source != "exact":
            reply.exact[places], reply.predicted[places] = False, answer.source == "predicted"
            reply.expected_disagreement[places] = answer.disagreement
            reply.expected_error[places] = answer.error
        if answer.suspicious:
            reply.suspicious[places] = True
        if again := [query.place for query in queries if query.reexecuted]:
            reply.reexecuted[again] = True
        self.left -= len(places)


class Query:
    """One data point of a request.

    Attributes:
        x: the data point; None once the request is over.
        groups: the groups that contain the query, copies included; empty once it is done.
        done: whether it has its answer, or its request has ended.
        waiting: whether it has not been sent to a worker.
        reexecuted: whether it was sent a second time.
        approximate: by source, approximate answers to compare with the model's own.
        candidates: by worker, the model's own answers that are held back by the screen.
    """

    __slots__ = (
        "approximate", "candidates", "done", "groups", "place", "reexecuted", "request", "waiting",
        "x",
    )  # fmt: skip

    def __init__(self, request: Request, place: int, x: np.ndarray):
        self.request, self.place = request, place
        self.x: np.ndarray | None = x
        self.groups: list[Any] = []  # of `Group`, which imports this file
        self.done = self.reexecuted = False
        self.approximate: dict[Source, Answer] = {}
        self.candidates: HeldAnswers = {}
        self.waiting = True


def repeat_rows(x: Shaped[np.ndarray, "..."], number: int, axis: int = 0) -> Any:
    """Return x with its rows repeated in turn up to `number`, so that few shapes are compiled."""
    few = x.shape[axis]
    return x if few == number else np.take(x, np.arange(number) % few, axis)


def message_of(error: BaseException) -> str:
    """Return the text of an error for clients, shortened, since it may repeat their input."""
    public = error.public if isinstance(error, InferenceFailed) else str(error)
    return shorten(public or type(error).__name__)


def shorten(text: str) -> str:
    if len(text) <= _LONGEST_MESSAGE:
        return text
    return f"{text[:_LONGEST_MESSAGE]}... ({len(text)} characters)"
