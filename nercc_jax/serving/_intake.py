"""What the requests in hand hold of the server's memory, and how much they may."""

import contextlib
from collections.abc import Callable, Iterator


class Overloaded(RuntimeError):
    """The requests in hand hold as much memory as they may: come again later."""


class Intake:
    """Counts the bytes of requests, of both faces, from the first that came until the answer.

    The event loop's thread only.
    """

    def __init__(self, limit: int):
        """`limit`: bytes that all requests may hold together."""
        self.limit, self.held = limit, 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """For one request: a function that takes so many bytes more, until the end of the block.

        It raises: `Overloaded` where the limit would be passed.
        """
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self.held + size > self.limit:
                raise Overloaded(
                    f"the requests in hand have {self.held} bytes and {size} more came; at most "
                    f"{self.limit} are held: come again later"
                )
            mine += size
            self.held += size

        try:
            yield take
        finally:
            self.held -= mine
