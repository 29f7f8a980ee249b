"""The shares of clients: the server's memory, and its connections.

A client is an address. No client, whatever it sends, keeps the server from answering the others.
"""

import collections
import contextlib
from collections.abc import Callable, Iterator

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
