"""HTTP with bounds on what clients may send before anybody answers them, and on how slowly.

Uvicorn bounds neither: half a head, or a head of any size, would be held for ever. The body's time
and size are the application's to bound, which reads it (`_rest.py`).
"""

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ._settings import ServerSettings


class BoundedHttp(HttpToolsProtocol):
    """One connection. Whoever goes too far is told why, as every error is, and cut off.

    A connection reads nothing, a request's head, or what follows it: its body.
    """

    def __init__(self, settings: ServerSettings, **told: Any):
        """`told` is what uvicorn tells its protocols."""
        HttpToolsProtocol.__init__(self, **told)
        self._settings = settings
        self._reading: Literal["nothing", "head", "body"] = "nothing"
        self._head = self._raw = 0  # bytes of names and values, and of all, of one request
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = 400, "the request is no HTTP"

    # Uvicorn's, and the loop's.

    def connection_made(self, transport: Any) -> None:  # uvloop's is none of asyncio's classes
        HttpToolsProtocol.connection_made(self, transport)
        most = self._settings.max_connections
        if len(self.connections) > most:
            self._refuse(503, f"there are {most} connections: come again later")
        else:
            self._wait(self.timeout_keep_alive, self._end)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        HttpToolsProtocol.connection_lost(self, exc)

    def data_received(self, data: bytes) -> None:
        if self._reading == "nothing":
            self._begin()
        self._raw += len(data)
        HttpToolsProtocol.data_received(self, data)
        if self._reading == "head" and self._raw > self._settings.max_header_bytes:
            self._refuse(*self._too_large())
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
            self._wait(self.timeout_keep_alive, self._end)

    def on_response_complete(self) -> None:
        HttpToolsProtocol.on_response_complete(self)
        if self._reading == "body":  # answered, and still being sent
            self._wait(self._settings.head_timeout_s, self._end)

    def timeout_keep_alive_handler(self) -> None:
        self._end()

    def send_400_response(self, msg: str) -> None:
        self._refuse(*self._refusal)

    # Ours.

    def _begin(self) -> None:
        self._reading, self._head, self._raw = "head", 0, 0
        self._wait(self._settings.head_timeout_s, self._late)

    def _count(self, size: int) -> None:
        """Of the head, or of what chunks end with. Raises: RuntimeError, to end the parser."""
        self._head += size
        if self._head > self._settings.max_header_bytes:
            self._refusal = self._too_large()
            raise RuntimeError("the head is too large")

    def _too_large(self) -> tuple[int, str]:
        return 431, f"the head has more than {self._settings.max_header_bytes} bytes"

    def _late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            seconds = self._settings.head_timeout_s
            self._refuse(408, f"the request's head did not come within {seconds:g} s")
        else:  # the request before this one is to be answered first
            self._wait(self._settings.head_timeout_s, self._late)

    def _end(self) -> None:
        """Not by `close`, which would wait for a client that does not read its answer."""
        self.transport.abort()

    def _refuse(self, status: int, words: str) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps({"error": words}).encode()
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
