"""What clients may send: whoever goes too far gets the reason, and harms nobody."""

# ruff: noqa: E402 (`require` comes before what needs it)

import gzip
import json

import numpy as np
import pytest
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from grpc_stub import GRPCInferenceServiceStub
from in_process import Doubles, body, channel, connect, is_cut_off, post, read_answer, serving
from nercc_server import ENDS, patience

from nercc_jax.serving import make_servable
from nercc_jax.serving.protocol._errors import Overloaded
from nercc_jax.serving.transport import open_inference_pb2 as messages
from nercc_jax.serving.transport._bodies import RequestMemory


@pytest.fixture(scope="module")
def server():
    with serving(Doubles(), max_body_bytes=100_000, max_json_bytes=10_000) as server:
        yield server


def is_fine(server):
    with connect(server) as connection:
        connection.sendall(post(body()))
        status, _, response = read_answer(connection)
        assert (status, response["outputs"][0]["data"]) == (200, [2, 4, 6, 8])
    return True


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
    """The answer is uvicorn's own, and whoever closes one makes room."""
    with serving(Doubles(), max_connections=2) as server:
        with connect(server), connect(server) as second:
            second.sendall(post(body()))
            assert second.recv(1000).startswith(b"HTTP/1.1 503")
        for _ in patience(ENDS):
            if not server._http.server_state.connections:
                break
        assert is_fine(server)


def test_images_come_and_go_as_binary_tensors():
    model = Doubles()
    model.servable = make_servable("digits", lambda x: 2 * x, (224, 224, 3))
    x = np.random.default_rng(0).normal(size=(8, 224, 224, 3)).astype("<f4")
    tensor = {"name": "input", "datatype": "FP32", "shape": x.shape}
    tensor |= {"parameters": {"binary_data_size": x.nbytes}}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json.dumps(asked).encode()
    with serving(model) as server:
        length = {"inference_header_content_length": str(len(head))}
        answer = ask(server, head + x.tobytes(), **length)
        start = int(answer.headers["inference-header-content-length"])
        found = np.frombuffer(answer.content, "<f4", x.size, start)
    np.testing.assert_array_equal(found, 2 * x.ravel())


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


def test_an_intake_gives_back_what_it_held():
    memory = RequestMemory(10)
    with memory.request() as take:
        take(6)
        with memory.request() as other, pytest.raises(Overloaded, match="6 bytes and 5 more came"):
            other(5)
        take(4)
        assert memory.used == 10
    assert memory.used == 0
