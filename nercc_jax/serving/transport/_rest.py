"""The REST application: a table of paths, limits of bodies, and inference."""

import asyncio
import contextlib
import importlib.resources
import re
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

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

_MODEL = "/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?"
# Methods, paths, and the actions to take; entries of `ServerState.says` are gRPC's method names.
_PATHS = [
    ("POST", re.compile(f"{_MODEL}/infer"), "infer"),
    ("GET", re.compile("/v2/health/live"), "ServerLive"),
    ("GET", re.compile("/v2/health/ready"), "ServerReady"),
    ("GET", re.compile(f"{_MODEL}/ready"), "ModelReady"),
    ("GET", re.compile(_MODEL), "ModelMetadata"),
    ("GET", re.compile("/v2/models"), "models"),
    ("GET", re.compile("/v2"), "ServerMetadata"),
    ("GET", re.compile("/"), "page"),
    ("GET", re.compile("/status"), "status"),
    ("GET", re.compile("/metrics"), "metrics"),
    ("POST", re.compile("/v2/repository/index"), "index"),
    ("POST", re.compile("/v2/repository/models/(?P<name>[^/]+)/load"), "load"),
    ("POST", re.compile("/v2/repository/models/(?P<name>[^/]+)/unload"), "unload"),
]
# Paths without a token: probes have none, and the status page gets its token from its own address.
_OPEN = frozenset(("/", "/v2/health/live", "/v2/health/ready"))
_RETRY = {"retry-after": "1"}
_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: _RETRY, 503: _RETRY}  # by status
# The header of a body with binary tensors: the length of the JSON before them.
_JSON_LENGTH = b"inference-header-content-length"

_MOST_JSON = 2**20  # bytes of a request's JSON, without binary tensors


class RestApp:
    """The ASGI application of a server.

    Receiving a body that is too large raises `TooLarge`, from its header or as soon as too many
    bytes have arrived. If an answer is ready before a large body has arrived, the rest is received
    slowly and dropped, and then the connection is closed: a client that sends its whole body before
    it reads still gets the answer, and hardly slows down others. After an unexpected exception the
    client gets an error of the protocol, and the exception is raised again.
    """

    # The most seconds for which the rest of a body is received, and the seconds between two pieces
    # of it (of 64 KiB or more), over all connections.
    linger_s, pause_s = 5.0, 0.005
    # Seconds until the server starts a task that notices when the client disconnects. Most answers
    # are ready before that.
    watch_after_s = 0.02

    def __init__(self, state: ServerState, registry: CollectorRegistry):
        self._state, self._registry, self._dropping = state, registry, asyncio.Lock()
        page = importlib.resources.files("nercc_jax.serving").joinpath("status.html")
        self._page = page.read_text()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            # Uvicorn itself drops the rest of small bodies.
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

        try:
            response = await self._answer(scope, headers, receive_within_limits)
        except ClientDisconnect:
            response = Response(status_code=499)  # nginx's status for a client that disconnected
        except tuple(KINDS) as error:
            status = KINDS[type(error)].http
            response = JSONResponse({"error": message_of(error)}, status, _HEADERS.get(status))
        except Exception:
            await JSONResponse({"error": INTERNAL}, 500)(scope, receive, send_and_close)
            raise  # uvicorn logs it
        await response(scope, receive_within_limits, send_and_close)

    async def _answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Any:
        """Return the response to a request; raises errors of the protocol."""
        state, path = self._state, scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in _OPEN:
            state.check_token(headers.get(b"authorization", b""))
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        fitting = {
            known: (found.groupdict(""), what)
            for known, pattern, what in _PATHS
            if (found := pattern.fullmatch(path)) is not None
        }
        if method not in fitting:
            why = "Method Not Allowed" if fitting else "Not Found"
            error = {"error": shorten(f"{scope['method']} {path}: {why}")}
            allowed = {"allow": ", ".join(fitting)} if fitting else None
            return JSONResponse(error, 405 if fitting else 404, allowed)

        models, (named, what) = state.models, fitting[method]
        name, version = named.get("name", ""), named.get("version", "")
        match what:
            case "infer":
                return await self._infer(name, version, scope, headers, receive)
            case "page":
                return HTMLResponse(self._page)
            case "status":  # in another thread, because it takes milliseconds
                content = await asyncio.to_thread(state.status)
                return JSONResponse(content, headers={"cache-control": "no-store"})
            case "metrics":
                content = await asyncio.to_thread(generate_latest, self._registry)
                return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})
            case "models":
                return JSONResponse({"models": models.names})
            case "index":
                return JSONResponse(models.index(await self._field(receive, "ready", False)))
            case "load" | "unload":
                parameters = await self._field(receive, "parameters", {})
                await models.control(name, parameters, load=what == "load")
                return Response()
        said = state.says[what](name, version)
        reason = said.pop("reason", "")
        if said.get("ready") is False:
            raise ServerNotReady(reason)
        return JSONResponse(said)

    async def _field(self, receive: Receive, name: str, default: Any) -> Any:
        """Return a field of a JSON body, which may be empty; it must have the default's type."""
        with self._state.hold() as add:
            body = await read_body(receive, add)
            try:
                content = orjson.loads(body or b"{}")
            except orjson.JSONDecodeError as error:
                raise InvalidInput(f"the body is not JSON: {error}") from error
        found = content.get(name, default) if isinstance(content, dict) else None
        if not isinstance(found, kind := type(default)):
            raise InvalidInput(f"the body is an object; {name} is a {kind.__name__}, not {found!r}")
        return found

    async def _infer(
        self,
        name: str,
        version: str,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
    ) -> Response:
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
        return Response(content, headers=about)

    async def _while_connected(self, receive: Receive, answer: Coroutine[Any, Any, Any]) -> Any:
        """Await the answer; cancel it and raise ClientDisconnect if the client disconnects."""
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
            if not gone or asker.uncancel():  # cancelled by another caller
                raise
            raise ClientDisconnect from None
        finally:
            soon.cancel()
            for watcher in watchers:
                watcher.cancel()


async def read_body(receive: Receive, add: Callable[[int], None]) -> bytearray:
    """Return the body of a request; `add` is called with the bytes of each part.

    Raises:
        ClientDisconnect: if the client disconnects.
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
