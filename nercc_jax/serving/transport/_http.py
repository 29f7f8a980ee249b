"""Inference by HTTP.

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
from starlette.types import ASGIApp, Receive, Scope, Send

from .._policy import MAX_DEADLINE_S
from .._served_model import ServedModel
from .._settings import ServerSettings
from ..core._request import Reply, message_of
from ..protocol._errors import INTERNAL, KINDS, Unauthenticated
from ..protocol._messages import InferRequest, decompress, json_size, read_request, write_reply
from ._bodies import read_body
from ._state import ServerState

_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")

_LARGE = 2**16  # bytes of JSON that take a millisecond or more to parse

# Seconds until the server starts to look whether the client is still there, which takes a task that
# most answers come sooner than.
_WATCH_AFTER = 0.02

_RETRY = {"retry-after": "1"}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY}  # by status
# Paths that need no token: probes have none, and the status page sends that of its own address.
_OPEN = frozenset(("/", "/v2/health/live", "/v2/health/ready"))

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
        self._app, self._state, self._parsing = app, state, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if self._state.tokens and scope["type"] == "http" and path not in _OPEN:
            try:
                self._state.check_token(dict(scope["headers"]).get(b"authorization", b""))
            except Unauthenticated as error:
                await error_response(error)(scope, receive, send)
                return
        found = _PATH.fullmatch(path)
        if found is not None and scope["type"] == "http" and scope["method"] == "POST":
            name, version = found.groups("")
            await self._respond(name, version, scope, receive, send)
            return
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # The application has none of its own; whoever sends the response leaves out the body.
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)

    async def _respond(
        self, name: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            content, headers = await self._infer(name, version, scope, receive)
        except ClientDisconnect:
            await Response(status_code=_CLIENT_CLOSED)(scope, receive, send)
        except tuple(KINDS) as error:
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
        with (
            state.watch(name, lambda: Headers(scope=scope)) as trace,
            state.memory.request() as add,
        ):
            model = state.find(name, version)
            elapsed = seconds_since_proxy(scope["headers"], time.time())
            body, length = await _read(scope, receive, state.settings, add)
            add(int(model.servable.growth * len(body)))
            answer = self._answer(model, body, length, elapsed, trace)
            return write_reply(*await _while_connected(receive, answer), model.servable)

    async def _answer(
        self, model: ServedModel, body: bytearray, length: str | None, elapsed: float, trace: Any
    ) -> tuple[Reply, InferRequest]:
        """Read a request and answer it.

        While JSON is parsed nothing else happens. Large JSON is therefore parsed one request at a
        time, after which the others have three times as long.
        """
        if json_size(len(body), length) <= _LARGE:
            request = read_request(body, length)
        else:
            begin = time.monotonic()
            async with self._parsing:
                start = time.monotonic()
                try:
                    request = read_request(body, length)
                finally:
                    await asyncio.sleep(3 * (time.monotonic() - start))
            elapsed += time.monotonic() - begin
        return await self._state.answer(model, request, trace, elapsed), request


def error_response(error: Exception) -> Response:
    status = KINDS[type(error)].http
    return JSONResponse({"error": message_of(error)}, status, _HEADERS.get(status))


def seconds_since_proxy(headers: Iterable[tuple[bytes, bytes]], now: float) -> float:
    """Return the seconds since a proxy took the request, by the `X-Request-Start` header.

    They are 0 without the header, and for a time in the future or more than an hour ago, longer
    than any deadline, by which clocks of machines differ and not requests. `now` is the wall
    clock's time.
    """
    for name, value in headers:
        if name == REQUEST_START and (found := _TIME.fullmatch(value.strip())) is not None:
            start = float(found[1])
            start *= next((unit for least, unit in _UNITS if start >= least), 1.0)
            return now - start if 0 < now - start < MAX_DEADLINE_S else 0.0
    return 0.0


async def _read(
    scope: Scope, receive: Receive, settings: ServerSettings, add: Callable[[int], None]
) -> tuple[bytearray, str | None]:
    """Return the body, decompressed, and the length of its JSON by the header.

    Raises as `read_body`, `decompress` and `json_size` do.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    length = headers.get(b"inference-header-content-length")
    body = await read_body(receive, add)
    if (encoding := headers.get(b"content-encoding")) is not None:
        pieces = decompress(body, encoding, settings.max_body_bytes)
        body = bytearray()
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            add(len(piece))
            body += piece
            if length is None:
                json_size(len(body), None, settings.max_json_bytes)
    json_size(len(body), length, settings.max_json_bytes)
    return body, length


async def _while_connected(
    receive: Receive, answer: Coroutine[Any, Any, tuple[Reply, InferRequest]]
) -> tuple[Reply, InferRequest]:
    """Await the answer; raise ClientDisconnect once the client has gone away."""
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
