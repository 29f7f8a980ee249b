"""How a server starts and stops: it listens at once, and says what it cannot do yet or any more."""

# ruff: noqa: E402 (`require` comes before what needs it)

import collections
import contextlib
import socket
import threading
import time

import pytest
from conftest import require

grpc = require("grpc", "serve-test")
require("starlette", "serve")

from faces import Stub, ask, message
from in_process import Doubles, becomes, channel, http, listening, serving
from nercc_server import ENDS

from nercc_jax.serving.transport import open_inference_pb2 as messages

ONE = {"input": [[1.0, 2, 3, 4]]}


class Starts:
    """A model that starts when it may."""

    def __init__(self):
        self.model, self.begun, self.may = Doubles(), threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.may.wait(ENDS)
        return self.model


def test_it_says_that_it_starts():
    start = Starts()
    with (
        listening({"digits": start}, grpc_port=0) as server,
        http(server) as client,
        channel(server) as there,
    ):
        stub, asked = Stub(there), messages.ModelReadyRequest(name="digits")
        assert client.get("/v2/health/live").json() == {"live": True}
        assert stub.ServerLive(messages.ServerLiveRequest(), timeout=ENDS).live
        assert not stub.ServerReady(messages.ServerReadyRequest()).ready
        assert not stub.ModelReady(asked).ready
        assert client.get("/v2/models").json() == {"models": ["digits"]}
        for path in ("/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"].startswith("Server is not ready.")
        for face in ("json", "raw"):
            answer = ask(face, server, "digits", ONE)
            assert (answer.is_(503), "digits is being started" in answer.error) == (True, True)
            assert ask(face, server, "nothing", ONE).is_(404)
        status = client.get("/status").json()
        assert (status["server"]["state"], status["models"]) == ("starting", [])
        start.may.set()
        becomes(lambda: client.get("/v2/health/ready").status_code == 200)
        assert stub.ServerReady(messages.ServerReadyRequest()).ready
        assert stub.ModelReady(asked).ready
        assert ask("json", server, "digits", ONE).is_(200)
        assert client.get("/status").json()["server"]["state"] == "serving"
    assert start.model.closed


def test_a_model_answers_while_another_starts():
    first, second = Starts(), Starts()
    first.may.set()
    with listening({"first": first, "second": second}) as server, http(server) as client:
        becomes(lambda: client.get("/v2/models/first/ready").status_code == 200)
        assert ask("json", server, "first", ONE).is_(200)
        assert ask("json", server, "second", ONE).is_(503)
        assert client.get("/v2/health/ready").status_code == 503
        second.may.set()
        becomes(lambda: client.get("/v2/health/ready").status_code == 200)


def test_a_start_that_fails_ends_it_with_the_reason():
    first = Starts()
    first.may.set()

    def fails():
        raise ValueError("no such model")

    with listening({"first": first, "second": fails}) as server:
        becomes(lambda: server.ended)
    assert str(server.ended) == "no such model"
    assert first.model.closed
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.http_port), ENDS)


def test_a_model_that_starts_after_the_end_is_closed():
    """The end comes at once: no load balancer has to notice."""
    start = Starts()
    with listening({"digits": start}, drain_delay_s=500.0):
        assert start.begun.wait(ENDS)
    assert not start.model.closed
    start.may.set()
    becomes(lambda: start.model.closed)


# How its gRPC ends: UNAVAILABLE, which clients send elsewhere.

CALLS = 400  # more than the server takes in a moment


@pytest.mark.parametrize("signals", [1, 2])
def test_calls_that_nobody_has_taken_yet_end_as_unavailable(signals):
    """Also those that are sent again at once, and where the server ends at once."""
    request = message("digits", {"input": [[1.0] * 4]})
    codes, stopped = collections.Counter(), threading.Event()
    some, left = threading.Event(), threading.Semaphore(0)

    def send(stub):
        stub.ModelInfer.future(request, timeout=ENDS).add_done_callback(
            lambda call: ended(call, stub)
        )

    def ended(call, stub):
        codes[call.code()] += 1
        some.set()
        if stopped.is_set():
            left.release()
        else:
            send(stub)

    with contextlib.ExitStack() as later:  # a channel that is closed cancels its calls
        with serving(Doubles(signals == 1), grpc_port=0, drain_timeout_s=ENDS) as server:
            stub = Stub(later.enter_context(channel(server)))
            for _ in range(CALLS):
                send(stub)
            assert signals == 2 or some.wait(ENDS)
            for _ in range(signals):
                server.stop()
        stopped.set()
        for _ in range(CALLS):
            assert left.acquire(timeout=ENDS)
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert codes[grpc.StatusCode.UNAVAILABLE]


def test_a_call_by_grpc_has_as_long_as_draining_takes():
    """Longer than what the server keeps for last errors."""
    model = Doubles(at_once=False)
    with serving(model, grpc_port=0, drain_timeout_s=60.0) as server, channel(server) as there:
        request = message("digits", {"input": [[1.0, 2, 3, 4]]})
        future = Stub(there).ModelInfer.future(request, timeout=ENDS)
        becomes(lambda: model.asked)
        server.stop()
        timer = threading.Timer(3.5, model.may_answer.set)
        timer.start()
        begin = time.monotonic()
        assert future.code() is grpc.StatusCode.OK
        assert time.monotonic() - begin >= 3
        timer.join()
