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
from nercc_server import ENDS, patience

require("grpc", "serve-test")
require("fastapi", "serve")

import grpc
from prometheus_client import CollectorRegistry

from nercc_jax.serving import Reply, make_servable
from nercc_jax.serving._served_model import ServedModel
from nercc_jax.serving._settings import ModelSettings, read_settings
from nercc_jax.serving.core._health import Health
from nercc_jax.serving.transport._server import Server

SERVABLE = make_servable("digits", lambda x: 2 * x, (4,))


class Doubles(ServedModel):
    """Answers at once, or once it may; knows who came, who was cancelled, and whether it closed."""

    servable, settings = SERVABLE, ModelSettings(model="digits")
    is_well = Health(True, True)
    ends_at = math.inf
    in_flight = 0

    def __init__(self, at_once: bool = True):
        self.may_answer = threading.Event()
        if at_once:
            self.may_answer.set()
        self.came = self.cancelled = 0
        self.refused = []
        self.closed = False

    def health(self):
        return self.is_well

    async def infer(self, queries, **demanded):
        self.came += 1
        try:
            while not self.may_answer.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        zeros, ones = np.zeros(len(queries)), np.ones(len(queries), int)
        options = (ones > 0, ones < 1, ones < 1, ones < 1, ones, ones, zeros, zeros)
        return Reply(2 * queries, *options, queued=0.0, seconds=0.0)

    def count(self, refusal):
        self.refused.append(refusal)

    def status(self):
        return {"name": "digits"}

    def outputs(self):
        return {"read_as": "scores", "why": "as set"}

    def close(self, drain):
        self.closed = True


@contextlib.contextmanager
def listening(
    starts: Mapping[str, Callable[[], ServedModel]], telemetry: Any = None, **options: Any
) -> Iterator[Server]:
    """A server that listens; how `run` ended is its attribute `ended` then."""
    usual = {"http_port": 0, "grpc_port": None, "drain_timeout_s": 1.0}
    server = Server(starts, read_settings(None, **usual | options), CollectorRegistry(), telemetry)
    server.ended = None

    def run():
        try:
            server.run()
        except BaseException as error:
            server.ended = error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in patience(ENDS):
            if server.http_port or not thread.is_alive():
                break
        yield server
    finally:
        server.stop()
        thread.join(ENDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def serving(model: Doubles, **options: Any) -> Iterator[Server]:
    """One that is ready."""
    with listening({"digits": lambda: model}, **options) as server:
        for _ in patience(ENDS):
            if server.state.phase == "serving":
                break
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), ENDS)


@contextlib.contextmanager
def channel(server: Server) -> Iterator[grpc.Channel]:
    """To its gRPC, once it listens there."""
    for _ in patience(ENDS):
        if server.grpc_port:
            break
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield channel


def body(data: Any = (1, 2, 3, 4), **more: Any) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 4], "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def post(content: bytes, *headers: str, length: int | None = None) -> bytes:
    """An HTTP request, whose body may be announced as longer than it is."""
    size = len(content) if length is None else length
    lines = ["POST /v2/models/digits/infer HTTP/1.1", "Host: x", f"Content-Length: {size}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + content


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
