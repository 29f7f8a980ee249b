"""The bodies of requests: their limits, reading them by HTTP, and the memory of all."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._settings import ServerSettings
from ..protocol._errors import Overloaded, TooLarge
from ..protocol._messages import json_size

# The header of a body with binary tensors: the length of the JSON before them.
_JSON_LENGTH = b"inference-header-content-length"


class BodyLimits:
    """ASGI middleware that bounds the body of a request, and the JSON in it.

    An application that asks for the body gets `TooLarge` instead, by the header or as soon as too
    much has come. Where an answer is given before a large body has come, the rest is received and
    dropped, slowly, and then the connection is closed: a client that sends everything before it
    reads finds the answer, and costs the others little.
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, linger_s: float = 5.0, pause_s: float = 0.005
    ):
        """Create one that receives what it drops for `linger_s` seconds at most.

        Between two pieces (of 64 KiB or more), over all connections, there are `pause_s` seconds.
        """
        self._app, self._settings, self._linger_s = app, settings, linger_s
        self._pause_s, self._turn = pause_s, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        announced = int(headers.get(b"content-length", b"0"))
        chunked = b"transfer-encoding" in headers
        came, more = 0, chunked or announced > 0

        def check(size: int) -> None:
            if size > (most := self._settings.max_body_bytes):
                raise TooLarge(f"the body has {size} bytes; at most {most} are taken")
            if _JSON_LENGTH not in headers:
                json_size(size, None, self._settings.max_json_bytes)

        async def receive_within_limits() -> Message:
            nonlocal came, more
            check(announced)
            message = await receive()
            came, more = came + len(message.get("body", b"")), message.get("more_body", False)
            check(came)
            return message

        async def send_and_close(message: Message) -> None:
            # Uvicorn drops what is small by itself.
            if more and (chunked or announced > 2**16):
                if message["type"] == "http.response.start":
                    close = (b"connection", b"close")
                    message = {**message, "headers": [*message["headers"], close]}
                elif not message.get("more_body", False):
                    await send({**message, "more_body": True})
                    await self._drop(receive)
                    message = {"type": "http.response.body"}
            await send(message)

        await self._app(scope, receive_within_limits, send_and_close)

    async def _drop(self, receive: Receive) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._linger_s):
                while (await receive()).get("more_body", False):
                    async with self._turn:
                        await asyncio.sleep(self._pause_s)


async def read_body(receive: Receive, add: Callable[[int], None]) -> bytearray:
    """Return the body of a request, whose bytes `add` counts as they come.

    Raises:
        ClientDisconnect: where the client goes away.
        Exception: as `add` and `receive` do.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part, more = message.get("body", b""), message.get("more_body", False)
        add(len(part))
        body += part
    return body


class RequestMemory:
    """Counts the bytes of all requests from their first byte to their answer.

    For the event loop's thread only.
    """

    def __init__(self, limit: int):
        """Create a count with the bytes that all requests together may use."""
        self.limit, self.used = limit, 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Callable[[int], None]]:
        """Count one request's bytes until the end of the block.

        Yields:
            A function that adds a number of bytes; it raises `Overloaded` above the limit.
        """
        own = 0

        def add(size: int) -> None:
            nonlocal own
            if self.used + size > self.limit:
                raise Overloaded(
                    f"the requests in hand have {self.used} bytes and {size} more came; at most "
                    f"{self.limit} are held: come again later"
                )
            own += size
            self.used += size

        try:
            yield add
        finally:
            self.used -= own
