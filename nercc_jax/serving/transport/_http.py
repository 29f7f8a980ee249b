"""HTTP connections with bounds on what clients may send, and on how slowly.

Uvicorn bounds neither: half a head, or a head of any size, would be held for ever. The time and
size of bodies are bounded where they are read (`_inference.py`).
"""

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .._settings import ServerSettings


class BoundedHttp(HttpToolsProtocol):
    """A connection. A client beyond a bound gets the reason as an error, and is cut off.

    A connection reads nothing, the head of a request, or its body.
    """

    def __init__(self, settings: ServerSettings, **options: Any):
        """Create a connection; `options` are uvicorn's."""
        HttpToolsProtocol.__init__(self, **options)
        self._settings = settings
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        # Bytes of one request: of names and values in the head, and of everything.
        self._head = self._raw = 0
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = 400, "the request is no HTTP"

    # Called by uvicorn, and by the event loop.

    def connection_made(self, transport: Any) -> None:  # uvloop's has none of asyncio's classes
        HttpToolsProtocol.connection_made(self, transport)
        most = self._settings.max_connections
        if len(self.connections) > most:
            self._refuse(503, f"there are {most} connections: come again later")
        else:
            self._wait(self.timeout_keep_alive, self._abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        HttpToolsProtocol.connection_lost(self, exc)

    def data_received(self, data: bytes) -> None:
        if self._reading == "nothing":
            self._begin()
        self._raw += len(data)
        HttpToolsProtocol.data_received(self, data)
        if self._reading == "head" and self._raw > self._settings.max_header_bytes:
            self._refuse(*self._head_too_large())
        # Chunks have their price, too.
        elif self._raw > self._settings.max_header_bytes + 8 * self._settings.max_body_bytes:
            self._refuse(413, "the body is sent in too small chunks")

    def on_message_begin(self) -> None:
        if self._reading == "nothing":  # right after the request before it
            self._begin()
        HttpToolsProtocol.on_message_begin(self)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        HttpToolsProtocol.on_url(self, url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        HttpToolsProtocol.on_header(self, name, value)

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        self._reading = "body"
        HttpToolsProtocol.on_headers_complete(self)

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._reading = "nothing"
        self._raw = 0
        HttpToolsProtocol.on_message_complete(self)
        if self.cycle.response_complete:  # uvicorn's own timer ended with the data
            self._wait(self.timeout_keep_alive, self._abort)

    def on_response_complete(self) -> None:
        HttpToolsProtocol.on_response_complete(self)
        if self._reading == "body":  # answered, and still being sent
            self._wait(self._settings.head_timeout_s, self._abort)

    def timeout_keep_alive_handler(self) -> None:
        self._abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._refusal)

    # Our own.

    def _begin(self) -> None:
        self._reading, self._head, self._raw = "head", 0, 0
        self._wait(self._settings.head_timeout_s, self._head_is_late)

    def _count(self, size: int) -> None:
        """Count bytes of the head, or of a chunked body's trailer.

        Raises:
            RuntimeError: above the limit, to end the parser.
        """
        self._head += size
        if self._head > self._settings.max_header_bytes:
            self._refusal = self._head_too_large()
            raise RuntimeError("the head is too large")

    def _head_too_large(self) -> tuple[int, str]:
        return 431, f"the head has more than {self._settings.max_header_bytes} bytes"

    def _head_is_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            seconds = self._settings.head_timeout_s
            self._refuse(408, f"the request's head did not come within {seconds:g} s")
        else:  # the request before this one is to be answered first
            self._wait(self._settings.head_timeout_s, self._head_is_late)

    def _abort(self) -> None:
        """End the connection; `close` would wait for a client that does not read its answer."""
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps({"error": message}).encode()
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _wait(self, seconds: int | float, then: Callable[[], None]) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
