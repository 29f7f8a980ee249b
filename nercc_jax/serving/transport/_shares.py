"""The shares of clients: the server's memory, and its connections.

A client is an address. No client, whatever it sends, keeps the server from answering the others.
"""

import asyncio
import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ..protocol._errors import Overloaded

# The share of the memory that is left to small requests, and to clients with one request.
_RESERVE = 0.25
_SMALL = 2**16  # bytes of a small request
# Connections of a client that has few of them, for which a part of all connections is kept free.
_FEW, _KEPT_FOR_FEW = 8, 16
# Seconds between two pieces of refused bodies that are still received, over all connections.
_DRAIN_PAUSE = 0.01


class RequestMemory:
    """Counts the bytes of all requests from their first byte to their answer.

    For the event loop's thread only.
    """

    def __init__(self, limit: int):
        """Create a count with the bytes that all requests together may use."""
        self.limit, self.used = limit, 0
        self._requests: collections.Counter[str] = collections.Counter()  # by client

    @contextlib.contextmanager
    def request(self, client: str = "") -> Iterator[Callable[[int], None]]:
        """Count one request's bytes until the end of the block.

        Yields:
            A function that adds a number of bytes; it raises `Overloaded` above the limit, or above
            the client's share of it.
        """
        own = 0

        def add(size: int) -> None:
            nonlocal own
            modest = own + size <= _SMALL or self._requests[client] == 1
            if self.used + size > (self.limit if modest else (1 - _RESERVE) * self.limit):
                raise Overloaded(
                    f"the requests in hand have {self.used} bytes and {size} more came; at most "
                    f"{self.limit} are held: come again later"
                )
            own += size
            self.used += size

        self._requests[client] += 1
        try:
            yield add
        finally:
            self.used -= own
            self._requests[client] -= 1
            if not self._requests[client]:
                del self._requests[client]


class Connections:
    """The connections of a server: which there may be, and which make room for others.

    At the limit, the connection that has been silent for longest is closed, of the client that has
    most. So neither probes nor clients with few connections are locked out by those with many.
    For the event loop's thread only.
    """

    def __init__(self, limit: int):
        """Create an empty set with the number of connections that there may be."""
        self.limit = limit
        self._clients: dict[Any, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._silent: dict[str, dict[Any, None]] = {}  # by client, longest first
        self._drained: collections.deque[Any] = collections.deque()

    def admit(self, connection: Any, client: str) -> Any:
        """Add a silent connection, and return the one to close instead: it itself at worst."""
        self._clients[connection] = client
        self._counts[client] += 1
        closed = None
        few = self._counts[client] <= _FEW
        if len(self._clients) > self.limit - (0 if few else self.limit // _KEPT_FOR_FEW):
            most = max(self._silent, key=self._counts.__getitem__, default=None)
            closed = connection if most is None else next(iter(self._silent[most]))
        if closed is not connection:
            self.add_silent(connection)
        if closed is not None:
            self.remove(closed)
        return closed

    def remove(self, connection: Any) -> None:
        if connection not in self._clients:
            return
        self.remove_silent(connection)
        client = self._clients.pop(connection)
        self._counts[client] -= 1
        if not self._counts[client]:
            del self._counts[client]

    def add_silent(self, connection: Any) -> None:
        """Note that a connection waits for its next request, or its first."""
        if (client := self._clients.get(connection)) is not None:
            self._silent.setdefault(client, {})[connection] = None

    def remove_silent(self, connection: Any) -> None:
        client = self._clients.get(connection)
        if client is not None and (silent := self._silent.get(client)) is not None:
            silent.pop(connection, None)
            if not silent:
                del self._silent[client]

    def drain(self, transport: Any) -> None:
        """Receive the next piece of a refused body when its turn comes, so that it costs little."""
        transport.pause_reading()
        self._drained.append(transport)
        if len(self._drained) == 1:
            self._drain_later()

    def _drain_later(self) -> None:
        asyncio.get_running_loop().call_later(_DRAIN_PAUSE, self._drain_next)

    def _drain_next(self) -> None:
        transport = self._drained.popleft()
        if not transport.is_closing():
            transport.resume_reading()
        if self._drained:
            self._drain_later()
