"""The REST face's inference: requests as they come from the wire, and answers as they go there.

It stands in front of FastAPI, whose routing and layers take as long as all that is done here.
"""

import asyncio
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ._arrival import under_way
from ._kserve import InferRequest
from ._plane import Plane
from ._protocol import (
    VERSION,
    BodyTimeout,
    TooLarge,
    decompress,
    json_size,
    read_request,
    write_reply,
)
from ._request import Reply, words_of
from ._settings import ServerSettings
from ._statuses import INTERNAL, STATUS

_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")

# JSON of this size is read by another thread, so that other requests go on.
_LARGE = 2**18

# Seconds until it is looked whether the client is still there: a task more, which most answers
# come sooner than.
_PATIENCE = 0.02

_AGAIN = {"retry-after": "1"}
# Of errors. After 408 nobody reads the rest of the body.
_HEADERS = {408: {"connection": "close"}, 429: _AGAIN, 503: _AGAIN}

# nginx's status for a client that went away before it was answered.
_CLOSED = 499


class Inference:
    """Answers inference requests, and leaves all others to the application behind it.

    What nobody expected is told as an error of the protocol, and raised.
    """

    def __init__(self, app: ASGIApp, plane: Plane):
        self._app, self._plane = app, plane

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if (found := _PATH.fullmatch(path)) is not None:
                name, version = found.groups(VERSION)
                await self._answer(name, version, scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _answer(
        self, name: str, version: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            content, told = await self._infer(name, version, scope, receive)
        except ClientDisconnect:
            await Response(status_code=_CLOSED)(scope, receive, send)
        except tuple(STATUS) as error:
            await answer_to(error)(scope, receive, send)
        except Exception:
            await JSONResponse({"error": INTERNAL}, 500)(scope, receive, send)
            raise  # for the server around it to log
        else:
            told["content-length"] = str(len(content))
            lines = [(key.encode(), value.encode()) for key, value in told.items()]
            await send({"type": "http.response.start", "status": 200, "headers": lines})
            await send({"type": "http.response.body", "body": content})

    async def _infer(
        self, name: str, version: str, scope: Scope, receive: Receive
    ) -> tuple[bytes, dict[str, str]]:
        plane = self._plane
        with plane.watch(name, lambda: Headers(scope=scope)), plane.intake.hold() as take:
            model = plane.find(name, version)
            request = await _read(scope, receive, name, plane.settings, take)
            before = under_way(scope["headers"], time.time())
            reply = await _while_connected(receive, plane.answer(model, request, before))
            return write_reply(reply, request, model.servable)


def answer_to(error: Exception) -> Response:
    """What a client is told of one of the errors that have a status."""
    status, _ = STATUS[type(error)]
    return JSONResponse({"error": words_of(error)}, status, _HEADERS.get(status))


async def _read(
    scope: Scope,
    receive: Receive,
    model: str,
    settings: ServerSettings,
    take: Callable[[int], None],
) -> InferRequest:
    """The request's message. What takes long is done by another thread.

    Raises: what `_read_body`, `decompress`, `json_size` and `read_request` do.
    """
    headers = dict(scope["headers"])
    length, encoding = (
        None if name not in headers else headers[name].decode("latin-1")
        for name in (b"inference-header-content-length", b"content-encoding")
    )
    announced = headers.get(b"content-length", b"0")
    _check_announced(announced, length is None and encoding is None, settings)
    body = await _read_body(receive, settings, take)
    if encoding is not None:
        packed = len(body)
        body = await asyncio.to_thread(decompress, body, encoding, settings.max_body_bytes)
        take(max(len(body) - packed, 0))
    if json_size(len(body), length, settings.max_json_bytes) > _LARGE:
        return await asyncio.to_thread(read_request, body, length, model)
    return read_request(body, length, model)


def _check_announced(announced: bytes, json: bool, settings: ServerSettings) -> None:
    """What can be seen before the body is read; `json`: it is nothing else. Raises: `TooLarge`."""
    limit = settings.max_body_bytes
    if not announced.isdigit() or int(announced) > limit:
        told = announced.decode("latin-1")
        raise TooLarge(f"the body has {told} bytes; at most {limit} are taken")
    if json:
        json_size(int(announced), None, settings.max_json_bytes)


async def _read_body(
    receive: Receive, settings: ServerSettings, take: Callable[[int], None]
) -> bytes:
    """The body as it comes.

    Raises: `TooLarge`, `Overloaded`, `BodyTimeout` before it is held; ClientDisconnect.
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
                take(len(part))
                size += len(part)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _while_connected(receive: Receive, answer: Coroutine[Any, Any, Reply]) -> Reply:
    """The answer, which is given up once the client has gone away: nobody waits for it.

    Raises: ClientDisconnect then; what making the answer does.
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

    soon = asyncio.get_running_loop().call_later(_PATIENCE, start)
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
