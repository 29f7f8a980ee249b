"""What is due when: requests' deadlines, and looks at groups."""

import heapq
import itertools
import math
from collections.abc import Container, Iterator

from ._group import Group
from ._request import Request

_STALE = 256  # deadlines of requests that have been answered, before they are swept out
# Seconds that a group is looked at after what it is looked at for, so that it is over then.
_AFTER = 1e-4


class Agenda:
    """Of the batcher's thread alone."""

    def __init__(self):
        self._looks: list[tuple[float, int, Group]] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()

    @property
    def next(self) -> float:
        """When something is due next; infinite for nothing."""
        return min(
            (plans[0][0] for plans in (self._looks, self._deadlines) if plans), default=math.inf
        )

    def promise(self, request: Request) -> None:
        """Its deadline is kept."""
        end = request.arrived + request.deadline
        heapq.heappush(self._deadlines, (end, next(self._numbers), request))

    def expired(self, now: float, unanswered: Container[Request], number: int) -> Iterator[Request]:
        """Requests whose deadlines have passed; so many are `unanswered`."""
        if len(self._deadlines) > 2 * number + _STALE:
            self._deadlines = [each for each in self._deadlines if each[2] in unanswered]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)[2]

    def look(self, group: Group, due: float, now: float) -> None:
        """The group is looked at then, and not when it was planned before."""
        when = max(due, now) + _AFTER
        if when < math.inf and when != group.look_at:
            group.look_at = when
            heapq.heappush(self._looks, (group.look_at, next(self._numbers), group))

    def due(self, now: float) -> Iterator[Group]:
        """Groups to be looked at."""
        while self._looks and self._looks[0][0] <= now:
            due, _, group = heapq.heappop(self._looks)
            if due == group.look_at and not group.closed:
                group.look_at = math.inf
                yield group
