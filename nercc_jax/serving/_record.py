"""What became of a request, written down as it goes: for the log of requests, and for spans."""

import contextvars
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_NUMBERS = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that a request went through, by the monotonic clock; `end` None: it still does."""

    name: str
    begin: float
    end: float | None
    details: Mapping[str, Any]


class GroupRecord:
    """Of queries that went out together. The batcher's thread writes, others read copies.

    `number` tells it from all others of this process, `requests` are the ids of those whose queries
    it has, `calls` are those of workers, by coded data point.
    """

    def __init__(self):
        self.number = next(_NUMBERS)
        self.requests: list[str] = []
        self.calls: dict[int, Step] = {}
        self.steps: list[Step] = []

    def sent(self, points: Iterable[int], now: float) -> None:
        for point in points:
            self.calls[point] = Step("worker call", now, None, self._about(point=point))

    def heard(self, point: int, now: float, worker: int) -> None:
        if point in self.calls:  # not sent before somebody wanted to know
            details = self._about(point=point, worker=worker)
            self.calls[point] = dataclasses.replace(self.calls[point], end=now, details=details)

    def add(self, name: str, begin: float, end: float, **details: Any) -> None:
        self.steps.append(Step(name, begin, end, self._about(**details)))

    def _about(self, **details: Any) -> Mapping[str, Any]:
        return {"group": self.number, **details}


class Record:
    """One request's. The batcher's thread writes; its caller reads once it has ended.

    `logged` and `span` say who wants to know. Of a request of which nobody does, those that share
    its groups want its `id`.
    """

    def __init__(self, model: str, logged: bool):
        self.model, self.logged = model, logged
        self.span: Any = None
        self.id = ""
        self.error: str | None = None
        self.arrived, self.arrived_ns = time.monotonic(), time.time_ns()
        self.answers: dict[int, str] = {}  # by query
        self._groups: dict[GroupRecord, list[int]] = {}  # with the queries that are in it
        self._waits: list[Step] = []
        self._again: dict[int, float] = {}  # when a query was to be sent again

    def enter(self, group: GroupRecord, query: int, arrived: float) -> None:
        """A query goes out in a group."""
        group.requests.append(self.id)
        if not self.logged and self.span is None:
            return
        again = self._again.get(query)
        name, begin = ("queue", arrived) if again is None else ("send again", again)
        about = {"group": group.number, "query": query}
        self._waits.append(Step(name, begin, time.monotonic(), about))
        self._groups.setdefault(group, []).append(query)

    def send_again(self, query: int) -> None:
        """A query waits anew."""
        self._again[query] = time.monotonic()

    def queue_seconds(self) -> float | None:
        """How long the first query waited, None if none was sent."""
        waits = [step for step in list(self._waits) if step.name == "queue"]
        return min((step.end - step.begin for step in waits if step.end is not None), default=None)

    def groups(self) -> list[dict[str, Any]]:
        """What it shared with whom: of each group the request's queries, and other requests.

        `asked` and `heard` are coded data points, and those of them that were answered by now.
        """
        told = []
        for group, queries in dict(self._groups).items():
            calls = list(group.calls.copy().values())
            told.append(
                {
                    "group": group.number,
                    "queries": list(queries),
                    "shared_with": sorted(set(group.requests) - {self.id}),
                    "asked": len(calls),
                    "heard": sum(call.end is not None for call in calls),
                }
            )
        return told

    def steps(self) -> Iterator[Step]:
        """All, in no order."""
        yield from list(self._waits)
        for group in list(self._groups):
            yield from list(group.steps)
            yield from group.calls.copy().values()


# Of the request that is being answered, in the face's own task.
current: contextvars.ContextVar[Record | None] = contextvars.ContextVar("record", default=None)
