"""Deadlines are kept by whoever is awake: a batcher that is held up costs nobody more than that."""

# ruff: noqa: E402 (`require` comes before what needs it)

import concurrent.futures
import threading
import time

import pytest
from conftest import require
from nercc_server import ENDS, patience

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from in_process import SERVABLE, Doubles, body, channel, listening, serving
from prometheus_client import CollectorRegistry

from nercc_jax import Uncoded
from nercc_jax.serving._metrics import Metrics
from nercc_jax.serving._served_model import ServedModel
from nercc_jax.serving._settings import ModelSettings
from nercc_jax.serving.transport import open_inference_pb2 as messages
from nercc_jax.serving.transport._http import seconds_since_proxy

HELD = 10.0  # seconds, unless it is released


@pytest.fixture
def model():
    settings = ModelSettings(model="digits", scheme="uncoded", workers=2)
    model = ServedModel(SERVABLE, Uncoded(1), settings, Metrics(CollectorRegistry()))
    yield model
    model.close(0.0)


def by_rest(server, seconds):
    url = f"http://127.0.0.1:{server.http_port}/v2/models/digits/infer"
    content = body(parameters={"nercc_deadline_ms": 1000 * seconds})
    answer = httpx.post(url, content=content, timeout=ENDS, trust_env=False)
    return answer.status_code, answer.json().get("error")


def by_grpc(server, seconds):
    request = messages.ModelInferRequest(model_name="digits")
    request.parameters["timeout"].int64_param = int(1e6 * seconds)  # Triton's
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend([1, 2, 3, 4])
    with channel(server) as connection:
        ask = connection.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=messages.ModelInferRequest.SerializeToString,
            response_deserializer=messages.ModelInferResponse.FromString,
        )
        try:
            ask(request, timeout=ENDS)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, None


def test_a_batcher_that_is_held_up_is_not_waited_for(model, monkeypatch):
    held, release = threading.Event(), threading.Event()

    def hold(now):
        held.set()
        release.wait(HELD)

    late = "not answered within 0.3 s: the batcher is busy"
    with (
        listening({"digits": lambda: model}, grpc_port=0) as server,
        concurrent.futures.ThreadPoolExecutor() as clients,
        monkeypatch.context() as patched,
    ):
        for _ in patience(ENDS):
            if server.state.phase == "serving":
                break
        patched.setattr(model._batcher._scheduler, "_dispatch", hold)
        asked = [clients.submit(ask, server, 0.3) for ask in (by_rest, by_grpc)]
        outcomes = [each.result(ENDS) for each in asked]
        assert held.is_set()
        assert outcomes == [(504, late), (grpc.StatusCode.DEADLINE_EXCEEDED, late)]
        assert not release.is_set()
        assert model.status()["queue"]["in_flight"] == 2, "its thread is held still"
        patched.undo()
        release.set()
        assert by_rest(server, 30.0) == (200, None)
        totals = model.status()["totals"]
        assert totals["errors"]["deadline"] == 2
        assert totals["queries"]["exact"] == 1, "a late request is not answered"


NOW = 1_795_000_000.25  # in 2026


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1794999998.750", 1.5),  # nginx's $msec
        ("t=1794999998.750", 1.5),
        ("1794999998750", 1.5),  # Heroku
        ("t=1794999998750000", 1.5),  # Apache's %t
        (" t=1794999999 ", 1.25),
        ("t=1794999998.750 D=3", 0.0),
        ("yesterday", 0.0),
        ("", 0.0),
        ("-1794999998", 0.0),
        ("9" * 400, 0.0),
        ("t=1795000060", 0.0),  # a clock that goes fast
        ("t=1794990000", 0.0),  # ... and one that is hours behind
    ],
)
def test_proxies_tell_when_a_request_came(header, seconds):
    headers = [(b"host", b"x"), (b"x-request-start", header.encode())]
    assert seconds_since_proxy(headers, NOW) == pytest.approx(seconds, abs=1e-6)
    assert seconds_since_proxy(headers[:1], NOW) == 0


class Listens(Doubles):
    """Knows how long it was given."""

    async def infer(self, queries, **demanded):
        self.deadline = demanded["deadline"]
        return await super().infer(queries, **demanded)


def test_deadlines_count_from_the_proxy():
    model = Listens()
    with serving(model) as server:

        def ask(before, **parameters):
            return httpx.post(
                f"http://127.0.0.1:{server.http_port}/v2/models/digits/infer",
                content=body(parameters=parameters),
                headers={} if before is None else {"X-Request-Start": f"t={time.time() - before}"},
                timeout=ENDS,
                trust_env=False,
            )

        assert ask(None, nercc_deadline_ms=3000).status_code == 200
        assert model.deadline == 3
        assert ask(40, nercc_deadline_ms=100_000).status_code == 200
        assert 50 < model.deadline < 60.01
        usual = model.settings.deadline_s
        answer = ask(usual + 1)
        assert answer.status_code == 504
        assert f"its {usual:g} s had passed before it was read" in answer.json()["error"]
        assert (model.came, model.refused) == (2, ["request_deadline"])
