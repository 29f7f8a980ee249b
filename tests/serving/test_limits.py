"""What clients may send, and how slowly: whoever goes too far gets the reason, and harms nobody."""

# ruff: noqa: E402 (`require` comes before what needs it)

import contextlib
import gzip
import json
import threading

import numpy as np
import pytest
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from grpc_stub import GRPCInferenceServiceStub
from in_process import Doubles, body, channel, connect, is_cut_off, post, read_answer, serving
from nercc_server import ENDS, patience

from nercc_jax.serving.protocol._errors import Overloaded
from nercc_jax.serving.transport import open_inference_pb2 as messages
from nercc_jax.serving.transport._shares import Connections, RequestMemory

SOON, LATE = 0.2, 500.0  # seconds: of a limit that is tried, and of those that are not
HALF = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nX-Half"
MOST = 4000  # bytes of a head


@pytest.fixture(scope="module")
def server():
    limits = {
        "head_timeout_s": SOON,
        "max_header_bytes": MOST,
        "max_body_bytes": 100_000,
        "max_json_bytes": 10_000,
    }
    with serving(Doubles(), **limits) as server:
        yield server


def is_fine(server, connection=None):
    """It answers, on this connection or another."""
    with contextlib.ExitStack() as stack:
        connection = connection or stack.enter_context(connect(server))
        connection.sendall(post(body()))
        status, _, response = read_answer(connection)
        assert (status, response["outputs"][0]["data"]) == (200, [2, 4, 6, 8])
    return True


# Heads.


@pytest.mark.parametrize("sent", [HALF, b"\r\n", b"P"])
@pytest.mark.parametrize("before", [False, True], ids=["", "after an answer"])
def test_half_a_head_is_reported_and_cut_off(server, sent, before):
    with connect(server) as connection:
        if before:
            assert is_fine(server, connection)
        connection.sendall(sent)
        status, headers, response = read_answer(connection)
        assert (status, headers["connection"]) == (408, "close")
        assert response == {"error": "the request's head did not come within 0.2 s"}
        assert connection.recv(1) == b""
    assert is_fine(server)


def test_a_head_that_comes_drop_by_drop_is_cut_off(server):
    with connect(server) as connection:
        connection.sendall(HALF)
        assert is_cut_off(connection, b"x")


def test_half_a_head_behind_a_request_does_not_cost_its_answer():
    model = Doubles(at_once=False)
    with serving(model, head_timeout_s=SOON) as server, connect(server) as connection:
        connection.sendall(post(body()) + HALF)
        threading.Timer(3 * SOON, model.may_answer.set).start()
        assert [read_answer(connection)[0] for _ in range(2)] == [200, 408]


TOO_LARGE = {"error": f"the head has more than {MOST} bytes"}


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\nX-Long: " + b"x" * 2 * MOST + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"X-Many: x\r\n" * MOST + b"\r\n",
        b"GET /" + b"x" * 2 * MOST + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nX-Without-End: " + b"x" * 2 * MOST,
        b"GET /" + b"x" * 2 * MOST,
        post(
            b"2\r\nhi\r\n0\r\n" + b"X-Trailer: x\r\n" * MOST, "Transfer-Encoding: chunked"
        ).replace(b"Content-Length", b"X-Length"),
    ],
    ids=["one long header", "many", "a long path", "without end", "a path without", "trailers"],
)
def test_a_large_head_is_reported_and_cut_off(server, head):
    with connect(server) as connection:
        connection.sendall(head)
        status, headers, response = read_answer(connection)
        assert (status, headers["connection"], response) == (431, "close", TOO_LARGE)
        assert is_cut_off(connection)
    assert is_fine(server)


def test_what_is_no_http_is_an_error_of_the_protocol(server):
    with connect(server) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
        assert read_answer(connection)[::2] == (400, {"error": "the request is no HTTP"})
        assert is_cut_off(connection)


# Bodies.


@pytest.mark.parametrize("size", [5_000_000, 10**9])
def test_a_refused_body_may_come_to_its_end_but_no_further(server, size):
    """A client that sends first and reads then finds the answer, and none sends on for long."""
    with connect(server) as connection:
        connection.sendall(post(b"x" * 5_000_000, length=size))
        status, headers, response = read_answer(connection)
        assert (status, headers["connection"]) == (413, "close")
        assert response["error"] == f"the body has {size} bytes; at most 100000 are taken"
        assert is_cut_off(connection, b"x")
    assert is_fine(server)


def test_a_body_in_tiny_chunks_is_reported_and_cut_off():
    limits = {"max_body_bytes": 1000, "max_header_bytes": 2000}
    with serving(Doubles(), **limits) as server, connect(server) as connection:
        connection.sendall(post(b"", "Transfer-Encoding: chunked").replace(b"Content-L", b"X-L"))
        connection.sendall((b"1;" + b"x" * 1000 + b"\r\nx\r\n") * 20)
        status, _, response = read_answer(connection)
        assert (status, response["error"]) == (413, "the body is sent in too small chunks")
        assert is_cut_off(connection)


def ask(server, content, **headers):
    url = f"http://127.0.0.1:{server.http_port}/v2/models/digits/infer"
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(url, content=content, headers=headers, timeout=ENDS, trust_env=False)


def test_large_json_is_refused_in_favour_of_binary(server):
    answer = ask(server, body() + b" " * 10_000)
    assert answer.status_code == 413
    assert "at most 10000 are taken: send tensors as binary data" in answer.json()["error"]
    with connect(server) as connection:  # what is announced is not even read
        connection.sendall(post(b"", length=10_001))
        assert read_answer(connection)[0] == 413
    pieces = ask(server, (b" " * 5000 for _ in range(3)))
    assert (pieces.status_code, "bytes of JSON; at most" in pieces.json()["error"]) == (413, True)
    packed = ask(server, gzip.compress(body() + b" " * 10_000), content_encoding="gzip")
    assert (packed.status_code, packed.json()["error"]) == (413, answer.json()["error"])
    x = np.ones((1000, 4), "<f4")
    tensor = {"name": "input", "datatype": "FP32", "shape": x.shape}
    tensor |= {"parameters": {"binary_data_size": x.nbytes}}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json.dumps(asked).encode()
    response = {"inference_header_content_length": str(len(head))}
    assert ask(server, head + x.tobytes(), **response).status_code == 200


# All together.


def test_connections_have_a_limit():
    with serving(Doubles(), max_connections=2, head_timeout_s=LATE) as server:
        with connect(server) as first, connect(server) as second:
            for each in (first, second):
                each.sendall(HALF)
            for _ in patience(ENDS):
                if not silent(server):
                    break
            with connect(server) as third:
                status, headers, response = read_answer(third)
                assert (status, headers["connection"]) == (503, "close")
                assert response == {"error": "there are 2 connections: come again later"}
                assert is_cut_off(third)
        for _ in patience(ENDS):
            if not server._http.server_state.connections:
                break
        assert is_fine(server)


def silent(server):
    """The connections that wait for a request."""
    return [each for each in server._http.server_state.connections if each._reading == "nothing"]


def test_silent_connections_make_room_for_others():
    """The one that has been silent for longest is closed, and none that has a request."""
    model = Doubles(at_once=False)
    with serving(model, max_connections=4) as server, contextlib.ExitStack() as stack:
        busy, *idle = (stack.enter_context(connect(server)) for _ in range(4))
        busy.sendall(post(body()))
        for _ in patience(ENDS):
            if model.came:
                break
        idle[0].sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(idle[0])[0] == 200  # silent again, but not for long
        more = [stack.enter_context(connect(server)) for _ in range(2)]
        assert all(is_cut_off(each) for each in idle[1:])
        for each in (*more, idle[0]):
            each.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_answer(each)[0] == 200
        model.may_answer.set()
        assert read_answer(busy)[0] == 200


def test_a_part_of_the_connections_is_kept_for_clients_with_few():
    connections = Connections(32)
    many = [f"many {number}" for number in range(40)]
    for each in many:
        admitted = connections.admit(each, "one") is not each
        connections.remove_silent(each)
        assert admitted == (each in many[:30])
    assert connections.admit("a probe", "another") is None
    connections.remove("a probe")
    connections.remove(many[0])
    assert connections.admit("again", "one") is None


def test_whoever_has_most_connections_makes_room():
    connections = Connections(10)
    assert connections.admit("first", "few") is None
    for number in range(9):
        assert connections.admit(number, "most") is None
    assert connections.admit("second", "few") == 0
    assert connections.admit("third", "third") == 1
    assert connections.admit(9, "most") == 2


def test_bytes_in_flight_have_a_limit():
    model = Doubles(at_once=False)
    limits = {"max_body_bytes": 1000, "max_bytes_in_flight": 1500}
    with serving(model, grpc_port=0, **limits) as server:
        held = server.state.memory
        with connect(server) as stuck:
            stuck.sendall(post(b" " * 900, length=1000))
            for _ in patience(ENDS):
                if held.used == 900:
                    break
            answer = ask(server, body() + b" " * 800)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "900 bytes" in answer.json()["error"]
            request = messages.ModelInferRequest(model_name="digits", id="x" * 800)
            with channel(server) as there:
                with pytest.raises(grpc.RpcError) as error:
                    GRPCInferenceServiceStub(there).ModelInfer(request, timeout=ENDS)
                assert error.value.code() == grpc.StatusCode.UNAVAILABLE
            assert model.refused == ["request_overloaded"] * 2
            # What waits for its answer counts, too.
            with connect(server) as waits:
                waits.sendall(post(body()))
                for _ in patience(ENDS):
                    if held.used == 900 + len(body()):
                        break
                assert model.came == 1
                model.may_answer.set()
                assert read_answer(waits)[0] == 200
        for _ in patience(ENDS):
            if held.used == 0:
                break
        assert ask(server, body() + b" " * 800).status_code == 200
        assert held.used == 0


def test_what_is_unpacked_counts(server, monkeypatch):
    monkeypatch.setattr(server.state, "memory", RequestMemory(1000))
    packed = gzip.compress(body() + b" " * 2000)
    assert len(packed) < 500
    assert ask(server, packed, content_encoding="gzip").status_code == 503
    assert server.state.memory.used == 0


def test_the_last_of_the_memory_is_for_small_requests_and_those_with_one():
    memory = RequestMemory(2**20)
    with memory.request("many") as first, memory.request("many") as second:
        first(2**19)
        second(2**16)
        with pytest.raises(Overloaded):
            second(2**18)
        with memory.request("other") as other, memory.request("many") as third:
            other(2**18)
            third(2**16)


def test_an_intake_gives_back_what_it_held():
    memory = RequestMemory(10)
    with memory.request() as take:
        take(6)
        with memory.request() as other, pytest.raises(Overloaded, match="6 bytes and 5 more came"):
            other(5)
        take(4)
        assert memory.used == 10
    assert memory.used == 0
