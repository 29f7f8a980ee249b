"""REST: inference, the limits of every body, and the application behind them.

Inference stands in front of the application, whose routing and layers take as long as everything
that is done here.
"""

import asyncio
import contextlib
import importlib.resources
import re
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core._request import message_of, shorten
from ..protocol._messages import (
    INTERNAL,
    KINDS,
    InvalidInput,
    ServerNotReady,
    TooLarge,
    UnsupportedEncoding,
    json_size,
    read_request,
    write_response,
)
from ._state import ServerState

_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
# Paths that need no token: probes have none, and the status page sends that of its own address.
_OPEN = frozenset(("/", "/v2/health/live", "/v2/health/ready"))
_RETRY = {"retry-after": "1"}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY}  # by status
# The header of a body with binary tensors: the length of the JSON before them.
_JSON_LENGTH = b"inference-header-content-length"

_MOST_JSON = 2**20  # bytes of a request's JSON, without binary tensors


class InferenceEndpoint:
    """ASGI middleware that answers inference requests, and bounds the bodies of all others.

    Whoever asks for a body gets `TooLarge` instead, by the header or as soon as too much has come.
    Where an answer is given before a large body has come, the rest is received and dropped, slowly,
    and then the connection is closed: a client that sends everything before it reads finds the
    answer, and costs the others little. An unexpected exception is answered by an error of the
    protocol, and raised.
    """

    # Seconds for which the rest of a body is received at most, and between two pieces of it (of 64
    # KiB or more), over all connections.
    linger_s, pause_s = 5.0, 0.005
    # Seconds until the server starts to look whether the client is still there, which takes a task
    # that most answers come sooner than.
    watch_after_s = 0.02

    def __init__(self, app: ASGIApp, state: ServerState):
        self._app, self._state, self._dropping = app, state, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, settings = dict(scope["headers"]), self._state.settings
        announced = int(headers.get(b"content-length", b"0"))
        chunked = b"transfer-encoding" in headers
        came, more = 0, chunked or announced > 0

        def check(size: int) -> None:
            if size > (most := settings.max_body_bytes):
                raise TooLarge(f"the body has {size} bytes; at most {most} are taken")
            if _JSON_LENGTH not in headers:
                json_size(size, None, _MOST_JSON)

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
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.linger_s):
                            while (await receive()).get("more_body", False):
                                async with self._dropping:
                                    await asyncio.sleep(self.pause_s)
                    message = {"type": "http.response.body"}
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        found = _PATH.fullmatch(path) if scope["method"] == "POST" else None
        app = self._app
        try:
            if path not in _OPEN:
                self._state.check_token(headers.get(b"authorization", b""))
            if found is not None:
                name, version = found.groups("")
                app = await self._infer(name, version, scope, headers, receive_within_limits)
        except ClientDisconnect:
            app = Response(status_code=499)  # nginx's, for a client that went away
        except tuple(KINDS) as error:
            app = error_response(error)
        except Exception:
            await JSONResponse({"error": INTERNAL}, 500)(scope, receive, send_and_close)
            raise  # for the server around it to log
        await app(scope, receive_within_limits, send_and_close)

    async def _infer(
        self,
        name: str,
        version: str,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
    ) -> ASGIApp:
        state, length = self._state, headers.get(_JSON_LENGTH)
        length = None if length is None else length.decode("latin-1")
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        with state.watch(name, lambda: Headers(scope=scope)) as span, state.hold() as add:
            model = state.models.find(name, version)
            if encoding.lower() != "identity":
                raise UnsupportedEncoding(
                    f"Content-Encoding {encoding!r}: send the body as it is, or let a proxy "
                    "decompress it"
                )
            body = await read_body(receive, add)
            size = json_size(len(body), length, _MOST_JSON)
            add(int(model.servable.growth * len(body)))
            answer = state.answer(model, lambda: read_request(body, length), size, span)
            content, about = write_response(await self._while_connected(receive, answer))
        about["content-length"] = str(len(content))
        lines = [(key.encode(), value.encode()) for key, value in about.items()]

        async def respond(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": lines})
            await send({"type": "http.response.body", "body": content})

        return respond

    async def _while_connected(self, receive: Receive, answer: Coroutine[Any, Any, Any]) -> Any:
        """Await the answer; raise ClientDisconnect once the client has gone away."""
        asker = asyncio.current_task()
        assert asker is not None
        gone, watchers = False, []

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            asker.cancel()

        soon = asyncio.get_running_loop().call_later(
            self.watch_after_s, lambda: watchers.append(asyncio.create_task(watch()))
        )
        try:
            return await answer
        except asyncio.CancelledError:
            if not gone or asker.uncancel():  # by somebody else
                raise
            raise ClientDisconnect from None
        finally:
            soon.cancel()
            for watcher in watchers:
                watcher.cancel()


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


def error_response(error: Exception) -> Response:
    status = KINDS[type(error)].http
    return JSONResponse({"error": message_of(error)}, status, _HEADERS.get(status))


def make_app(state: ServerState, registry: CollectorRegistry) -> Starlette:
    """Return the ASGI application that an `InferenceEndpoint` stands before."""
    models = state.models

    def said(method: str) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of what the server says, by the name of gRPC's method."""

        async def endpoint(request: Request) -> Response:
            path = request.path_params
            found = state.says[method](path.get("name", ""), path.get("version", ""))
            reason = found.pop("reason", "")
            if found.get("ready") is False:
                raise ServerNotReady(reason)
            return JSONResponse(found)

        return endpoint

    async def list_models(request: Request) -> Response:
        return JSONResponse({"models": models.names})

    async def infer(request: Request) -> Response:
        raise NotImplementedError  # `InferenceEndpoint` answers it

    # The model repository.

    async def field_of(request: Request, name: str, kind: type, default: Any) -> Any:
        """Return a field of a small body, which may be empty."""
        with state.hold() as add:
            body = await read_body(request.receive, add)
            try:
                content = orjson.loads(body or b"{}")
            except orjson.JSONDecodeError as error:
                raise InvalidInput(f"the body is not JSON: {error}") from error
        found = content.get(name, default) if isinstance(content, dict) else None
        if not isinstance(found, kind):
            raise InvalidInput(f"the body is an object; {name} is a {kind.__name__}, not {found!r}")
        return found

    async def index(request: Request) -> Response:
        return JSONResponse(models.index(await field_of(request, "ready", bool, False)))

    async def load(request: Request, load: bool = True) -> Response:
        parameters = await field_of(request, "parameters", dict, {})
        await models.control(request.path_params["name"], parameters, load=load)
        return Response()

    async def unload(request: Request) -> Response:
        return await load(request, load=False)

    # Pages, which other threads put together, because it takes milliseconds.

    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def status(request: Request) -> Response:
        content = await asyncio.to_thread(state.status)
        return JSONResponse(content, headers={"cache-control": "no-store"})

    async def metrics(request: Request) -> Response:
        content = await asyncio.to_thread(generate_latest, registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    # Errors.

    async def known(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def no_such_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = shorten(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse({"error": message}, error.status_code, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": INTERNAL}, 500)  # and the server raises it, to be logged

    routes = [
        Route("/", show_page),
        Route("/status", status),
        Route("/metrics", metrics),
        Route("/v2", said("ServerMetadata")),
        Route("/v2/health/live", said("ServerLive")),
        Route("/v2/health/ready", said("ServerReady")),
        Route("/v2/models", list_models),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
    ]
    for where in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes.append(Route(where, said("ModelMetadata")))
        routes.append(Route(f"{where}/ready", said("ModelReady")))
        routes.append(Route(f"{where}/infer", infer, methods=["POST"]))
    handlers: dict[Any, Any] = dict.fromkeys(KINDS, known)
    handlers |= {HTTPException: no_such_path, Exception: unexpected}
    return Starlette(routes=routes, exception_handlers=handlers)
