"""Inference by REST: requests as they come from the wire, and answers as they go there.

It stands in front of FastAPI, whose routing and layers take as long as everything that is done
here.
"""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .._policy import MAX_DEADLINE_S
from .._settings import ServerSettings
from ..core._request import Reply, message_of
from ..protocol._errors import INTERNAL, STATUS, BodyTimeout, TooLarge
from ..protocol._messages import (
    VERSION,
    InferRequest,
    decompress,
    json_size,
    read_request,
    write_reply,
)
from ._state import ServerState

_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")

# JSON of this size is read by another thread, so that other requests go on.
_LARGE = 2**18

# Seconds until the server starts to look whether the client is still there, which takes a task that
# most answers come sooner than.
_WATCH_AFTER = 0.02

_RETRY = {"retry-after": "1"}
# Headers by status of errors. After 408 nobody reads the rest of the body.
_HEADERS = {408: {"connection": "close"}, 429: _RETRY, 503: _RETRY}

# nginx's status for a client that went away before it was answered.
_CLIENT_CLOSED = 499

# The header with the time at which a proxy took the request: Unix time, with or without "t=" before
# it, as Heroku's router sends it, and nginx and Apache as they are usually configured. It is in
# seconds with a fraction (nginx's `$msec`), milliseconds, or microseconds (Apache's `%t`); the size
# of the number says which, since as seconds the others would be after the year 5000.
REQUEST_START = b"x-request-start"
_TIME = re.compile(rb"(?:t=)?(\d{9,20}(?:\.\d{1,9})?)")
_UNITS = ((1e14, 1e-6), (1e11, 1e-3))


class InferenceEndpoint:
    """Answers inference requests, and passes all others to the application behind it.

    An unexpected exception is answered by an error of the protocol, and raised.
    """

    def __init__(self, app: ASGIApp, state: ServerState):
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if (found := _PATH.fullmatch(path)) is not None:
                name, version = found.groups(VERSION)
                await self._respond(name, version, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _respond(
        self, name: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            content, headers = await self._infer(name, version, scope, receive)
        except ClientDisconnect:
            await Response(status_code=_CLIENT_CLOSED)(scope, receive, send)
        except tuple(STATUS) as error:
            await error_response(error)(scope, receive, send)
        except Exception:
            await JSONResponse({"error": INTERNAL}, 500)(scope, receive, send)
            raise  # for the server around it to log
        else:
            headers["content-length"] = str(len(content))
            lines = [(key.encode(), value.encode()) for key, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": lines})
            await send({"type": "http.response.body", "body": content})

    async def _infer(
        self, name: str, version: str, scope: Scope, receive: Receive
    ) -> tuple[bytes, dict[str, str]]:
        state = self._state
        with state.watch(name, lambda: Headers(scope=scope)), state.memory.request() as add:
            model = state.find(name, version)
            request = await _read(scope, receive, state.settings, add)
            elapsed = seconds_since_proxy(scope["headers"], time.time())
            reply = await _while_connected(receive, state.answer(model, request, elapsed))
            return write_reply(reply, request, model.servable)


def error_response(error: Exception) -> Response:
    """Return the response to an error that has a status."""
    status, _ = STATUS[type(error)]
    return JSONResponse({"error": message_of(error)}, status, _HEADERS.get(status))


def seconds_since_proxy(headers: Iterable[tuple[bytes, bytes]], now: float) -> float:
    """Return the seconds since a proxy took the request, by the `X-Request-Start` header.

    Args:
        headers: the request's headers.
        now: the wall clock's time.

    Returns:
        The seconds; 0 without the header, and for a time in the future or more than an hour ago,
        longer than any deadline, by which clocks of machines differ and not requests.
    """
    for name, value in headers:
        if name == REQUEST_START and (found := _TIME.fullmatch(value.strip())) is not None:
            start = float(found[1])
            start *= next((unit for least, unit in _UNITS if start >= least), 1.0)
            return now - start if 0 < now - start < MAX_DEADLINE_S else 0.0
    return 0.0


async def _read(
    scope: Scope, receive: Receive, settings: ServerSettings, add: Callable[[int], None]
) -> InferRequest:
    """Read the request. What takes long is done by another thread.

    Raises as `_read_body`, `decompress`, `json_size` and `read_request` do.
    """
    headers = dict(scope["headers"])
    length, encoding = (
        None if name not in headers else headers[name].decode("latin-1")
        for name in (b"inference-header-content-length", b"content-encoding")
    )
    announced = headers.get(b"content-length", b"0")
    _check_announced(announced, length is None and encoding is None, settings)
    body = await _read_body(receive, settings, add)
    if encoding is not None:
        packed = len(body)
        body = await asyncio.to_thread(decompress, body, encoding, settings.max_body_bytes)
        add(max(len(body) - packed, 0))
    if json_size(len(body), length, settings.max_json_bytes) > _LARGE:
        return await asyncio.to_thread(read_request, body, length)
    return read_request(body, length)


def _check_announced(announced: bytes, only_json: bool, settings: ServerSettings) -> None:
    """Raise TooLarge where the announced size is, before the body is read."""
    limit = settings.max_body_bytes
    if not announced.isdigit() or int(announced) > limit:
        size = announced.decode("latin-1")
        raise TooLarge(f"the body has {size} bytes; at most {limit} are taken")
    if only_json:
        json_size(int(announced), None, settings.max_json_bytes)


async def _read_body(
    receive: Receive, settings: ServerSettings, add: Callable[[int], None]
) -> bytes:
    """Return the body.

    Raises:
        TooLarge: above the limit, before more is held in memory.
        Overloaded: where all requests together hold too much.
        BodyTimeout: where it does not arrive in time.
        ClientDisconnect: where the client goes away.
    """
    limit, seconds = settings.max_body_bytes, settings.body_timeout_s
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                part, more = message.get("body", b""), message.get("more_body", False)
                add(len(part))
                size += len(part)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, Reply]) -> Reply:
    """Await the answer, and give it up once the client has gone away.

    Raises:
        ClientDisconnect: then.
        Exception: as the answer does.
    """
    asker = asyncio.current_task()
    assert asker is not None
    gone = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        asker.cancel()

    def start() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    soon = asyncio.get_running_loop().call_later(_WATCH_AFTER, start)
    try:
        return await answer
    except asyncio.CancelledError:
        if not gone or asker.uncancel():  # by somebody else
            raise
        raise ClientDisconnect from None
    finally:
        soon.cancel()
        if watcher is not None:
            watcher.cancel()
