"""Calls that meet the end of a server by gRPC: UNAVAILABLE, which clients send elsewhere."""

# ruff: noqa: E402 (`require` comes before what needs it)

import collections
import contextlib
import threading

import pytest
from conftest import require

grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from faces import Stub, message
from in_process import Doubles, channel, serving
from nercc_server import ENDS

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
