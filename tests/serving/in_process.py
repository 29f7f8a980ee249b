"""A server in a thread of the tests' own process, around a model that computes nothing."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from conftest import require
from faces import content
from nercc_server import ENDS, patience

httpx = require("httpx", "serve-test")
require("starlette", "serve")

from prometheus_client import CollectorRegistry

from nercc_jax.codes import AbstractCode
from nercc_jax.serving import (
    Health,
    Metrics,
    ModelSettings,
    Reply,
    ServedModel,
    Server,
    make_servable,
)
from nercc_jax.serving.settings import read_settings

SERVABLE = make_servable("digits", lambda x: 2 * x, (4,))
# A query of it, and the whole body.
ONE = {"input": [[1.0, 2, 3, 4]]}
BODY = content("digits", ONE)[0]


class Doubles(ServedModel):
    """Answers as it is told, at once or once it may; knows what came, and what became of it."""

    servable, settings = SERVABLE, ModelSettings(model="digits")
    is_well = Health(True, True)
    ends_at = math.inf
    in_flight = 0

    def __init__(self, at_once: bool = True, error: Exception | None = None, reply=None):
        self.may_answer = threading.Event()
        if at_once:
            self.may_answer.set()
        self.error, self.reply = error, reply
        self.asked: list[tuple[Any, dict[str, Any]]] = []  # queries, and how they were asked
        self.cancelled = 0
        self.refused: list[str] = []
        self.closed = False
        self.pool = self.meter = self  # pyright: ignore

    def health(self):
        return self.is_well

    async def infer(self, queries, **demanded):
        self.asked.append((queries, demanded))
        try:
            while not self.may_answer.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        if self.reply is not None:
            return self.reply
        zeros, ones = np.zeros(len(queries)), np.ones(len(queries), int)
        options = (ones > 0, ones < 1, ones < 1, ones < 1, ones, ones, zeros, zeros)
        return Reply(2 * queries, *options, queued=0.0, seconds=0.0)

    def observe(self, refusal, number):
        self.refused.append(refusal)

    def status(self):
        return {"name": "digits"}

    def close(self, drain):
        self.closed = True


def real(name: str, model: Any, code: AbstractCode, shape: Any = (4,), **options: Any):
    """A model that computes, by `make_servable` and `ModelSettings`; `metrics` are its own unless
    given."""
    metrics = options.pop("metrics", None) or Metrics(CollectorRegistry())
    made = {key: options.pop(key) for key in ("datatype", "preprocess") if key in options}
    settings = ModelSettings(**{"model": name, "workers": 2, "max_batch_size": 2} | options)
    return ServedModel(make_servable(name, model, shape, **made), code, settings, metrics)


@contextlib.contextmanager
def listening(
    starts: Mapping[str, Callable[[], ServedModel]], spans: Any = None, **options: Any
) -> Iterator[Server]:
    """A server that listens; how `run` ended is its attribute `ended` then."""
    usual = {"http_port": 0, "grpc_port": None, "drain_timeout_s": 1.0}
    server = Server(starts, read_settings(None, **usual | options), CollectorRegistry(), spans)
    server.ended = None

    def run():
        try:
            server.run()
        except BaseException as error:
            server.ended = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        by = ("http_port", "grpc_port")[: 1 if server.settings.grpc_port is None else 2]
        becomes(lambda: all(getattr(server, port) for port in by) or not thread.is_alive())
        yield server
    finally:
        server.stop()
        thread.join(ENDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(*models: ServedModel, **options: Any) -> Iterator[Server]:
    """One that is ready."""
    starts = {model.servable.name: lambda model=model: model for model in models}
    with listening(starts, **options) as server:
        becomes(lambda: server.state.models.complete)
        yield server


def becomes(true: Callable[[], Any]) -> None:
    for _ in patience(ENDS):
        if true():
            return
    raise AssertionError("it never came to be so")


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), ENDS)


def http(server: Server) -> httpx.Client:
    url = f"http://127.0.0.1:{server.http_port}"
    return httpx.Client(base_url=url, timeout=ENDS, trust_env=False)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """The next answer on it: its status, headers and JSON."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):  # and not a byte more, which may be another's
        part = connection.recv(1)
        assert part, f"cut off after {head!r}"
        head += part
    first, *lines = head.decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    content = connection.recv(int(headers["content-length"]), socket.MSG_WAITALL)
    assert headers["content-type"] == "application/json"
    return int(first.split()[1]), headers, json.loads(content)


def is_cut_off(connection: socket.socket, drip: bytes = b"") -> bool:
    """Waits until the server closes it, while `drip` is sent again and again."""
    connection.settimeout(0.02)
    for _ in patience(ENDS):
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False
