"""How a server starts: it listens at once, says that it is not ready, and answers once it is."""

# ruff: noqa: E402 (`require` comes before what needs it)

import gc
import socket
import threading

import pytest
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_stub import GRPCInferenceServiceStub
from in_process import Doubles, body, channel, listening
from nercc_server import ENDS, patience

from nercc_jax.serving.transport import open_inference_pb2 as messages


class Starts:
    """A model that starts when it may."""

    def __init__(self):
        self.model, self.begun, self.may = Doubles(), threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.may.wait(ENDS)
        return self.model


def http(server):
    return httpx.Client(
        base_url=f"http://127.0.0.1:{server.http_port}", timeout=ENDS, trust_env=False
    )


def infer(client, model):
    return client.post(f"/v2/models/{model}/infer", content=body())


def ready(client, path="/v2/health/ready"):
    return any(client.get(path).status_code == 200 for _ in patience(ENDS))


def test_it_says_by_rest_that_it_starts():
    start = Starts()
    with listening({"digits": start}) as server, http(server) as client:
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/models").json() == {"models": ["digits"]}
        for path in ("/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert list(answer.json()) == ["error"]
            assert answer.json()["error"].startswith("Server is not ready.")
        answer = infer(client, "digits")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "digits is being started" in answer.json()["error"]
        assert infer(client, "nothing").status_code == 404
        status = client.get("/status").json()
        assert (status["server"]["state"], status["models"]) == ("starting", [])
        start.may.set()
        assert ready(client)
        assert infer(client, "digits").status_code == 200
        assert client.get("/status").json()["server"]["state"] == "serving"
    assert start.model.closed


def test_it_says_by_grpc_that_it_starts():
    start = Starts()
    with listening({"digits": start}, grpc_port=0) as server, channel(server) as there:
        stub = GRPCInferenceServiceStub(there)
        assert stub.ServerLive(messages.ServerLiveRequest(), timeout=ENDS).live
        assert not stub.ServerReady(messages.ServerReadyRequest()).ready
        asked = messages.ModelReadyRequest(name="digits")
        assert not stub.ModelReady(asked).ready
        request = messages.ModelInferRequest(model_name="digits")
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(request, timeout=ENDS)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        start.may.set()
        for _ in patience(ENDS):
            if stub.ServerReady(messages.ServerReadyRequest()).ready:
                break
        assert stub.ModelReady(asked).ready


def test_grpcs_own_health_service_tells_every_change():
    start = Starts()
    with listening({"digits": start}, grpc_port=0) as server, channel(server) as there:
        stub = HealthStub(there)
        watched = {
            name: stub.Watch(HealthCheckRequest(service=name), timeout=ENDS)
            for name in ("", "digits", "nothing")
        }
        states = {name: [next(watch).status] for name, watch in watched.items()}
        for name in ("", "digits", "inference.GRPCInferenceService"):
            asked = HealthCheckRequest(service=name)
            assert stub.Check(asked, timeout=ENDS).status == HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(HealthCheckRequest(service="nothing"), timeout=ENDS)
        assert error.value.code() == grpc.StatusCode.NOT_FOUND
        start.may.set()
        for name in ("", "digits"):
            states[name].append(next(watched[name]).status)
        asked = HealthCheckRequest(service="digits")
        assert stub.Check(asked, timeout=ENDS).status == HealthCheckResponse.SERVING
        server.stop()
        for name, watch in watched.items():
            states[name] += [each.status for each in watch]  # which end by themselves
    changes = [HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVING]
    changes += changes[:1]
    unknown = [HealthCheckResponse.SERVICE_UNKNOWN]
    assert states == {"": changes, "digits": changes, "nothing": unknown}


def test_a_model_answers_while_another_starts():
    first, second = Starts(), Starts()
    first.may.set()
    with listening({"first": first, "second": second}) as server, http(server) as client:
        assert ready(client, "/v2/models/first/ready")
        assert infer(client, "first").status_code == 200
        assert infer(client, "second").status_code == 503
        assert client.get("/v2/health/ready").status_code == 503
        second.may.set()
        assert ready(client)


def test_collections_of_garbage_are_short_from_its_start_to_its_end():
    before = list(gc.callbacks)
    with listening({"digits": Doubles}) as server:
        for _ in patience(ENDS):
            if server.state.phase == "serving":
                break
        assert len(gc.callbacks) == len(before) + 1
    assert gc.callbacks == before


def test_a_start_that_fails_ends_it_with_the_reason():
    first = Starts()
    first.may.set()

    def fails():
        raise ValueError("no such model")

    with listening({"first": first, "second": fails}) as server:
        for _ in patience(ENDS):
            if server.ended:
                break
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
    for _ in patience(ENDS):
        if start.model.closed:
            break
    assert start.model.closed
