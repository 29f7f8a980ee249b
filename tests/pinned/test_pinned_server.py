"""A transcript of one server by REST, gRPC and Python, pinned from outside: fields and errors.

Further fields may come, and messages may change; what is named here may neither go nor be renamed.
"""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import dataclasses
import threading
import time

import numpy as np
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from serving.grpc_stub import GRPCInferenceServiceStub

from nercc_jax import NeRCC
from nercc_jax.serving import (
    DeadlineExceeded,
    ModelSettings,
    QueueFull,
    Reply,
    ServerClosing,
    ServerSettings,
    make_server,
)
from nercc_jax.serving.transport import open_inference_pb2 as messages

WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))
USUAL, HARD = [0.1, 0.2, 0.3, 0.4], [7.0, 0.2, 0.3, 0.4]
RELEASED = threading.Event()  # until then, nobody answers a query that is hard
MODEL, TOKEN, LONG = "classifier", "a token", 60.0
TENSORS = {
    "output": ("FP32", [-1, 3]),
    "exact": ("BOOL", [-1]),
    "expected_disagreement": ("FP32", [-1]),
    "expected_error": ("FP32", [-1]),
}
PARAMETERS = {"exact", "approximate", "predicted", "reexecuted", "suspicious", "queue_ms"}
PARAMETERS |= {"workers_asked", "workers_responded", "expected_disagreement", "expected_error"}
REPLY = {"values", "exact", "predicted", "reexecuted", "suspicious", "asked", "responded"}
REPLY |= {"expected_disagreement", "expected_error", "queued", "seconds"}
EXACT = {"nercc_exact": True}
LATE = EXACT | {"nercc_deadline_ms": 50}
# Queries, their parameters, what else differs; status by REST and by gRPC, and Python's error.
REFUSED = {
    "late": ([HARD], LATE, {}, 504, "DEADLINE_EXCEEDED", DeadlineExceeded),
    "of another shape": ([[1.0, 2.0]], {}, {}, 400, "INVALID_ARGUMENT", ValueError),
    "no parameter": ([USUAL], {"nercc_none": 1}, {}, 400, "INVALID_ARGUMENT", None),
    "too many": ([USUAL] * 30, {}, {}, 413, "RESOURCE_EXHAUSTED", QueueFull),
    "no model": ([USUAL], {}, {"model": "none"}, 404, "NOT_FOUND", None),
    "no token": ([USUAL], {}, {"token": "other"}, 401, "UNAUTHENTICATED", None),
}


def classify(x):
    x = np.asarray(x)  # which JAX cannot trace
    if (x[:, 0] == HARD[0]).any():
        RELEASED.wait(LONG)
    return np.tanh(x @ WEIGHTS).astype(np.float32)


def by_rest(server, rows, parameters=None, model=MODEL, token=TOKEN):
    """The status, and the answer's JSON."""
    tensor = {"name": "input", "datatype": "FP32", "shape": np.shape(rows), "data": rows}
    content = {"id": "mine", "parameters": parameters or {}, "inputs": [tensor]}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/{model}/infer"
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.post(url, json=content, headers=headers, timeout=LONG, trust_env=False)
    return answer.status_code, answer.json()


def by_grpc(server, rows, parameters=None, model=MODEL, token=TOKEN):
    """The status, and the answer."""
    request = messages.ModelInferRequest(model_name=model, id="mine")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=np.shape(rows))
    tensor.contents.fp32_contents.extend(np.float32(rows).ravel().tolist())
    for name, value in (parameters or {}).items():
        kind = "bool_param" if value is True else "int64_param"
        setattr(request.parameters[name], kind, value)
    given = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        try:
            stub = GRPCInferenceServiceStub(channel)
            return "OK", stub.ModelInfer(request, metadata=given, timeout=LONG)
        except grpc.RpcError as error:
            return error.code().name, error.details()


def by_python(served, rows, parameters):
    """The error's class or None, and the reply."""
    options = {"exact": "nercc_exact" in parameters}
    if "nercc_deadline_ms" in parameters:
        options["deadline"] = parameters["nercc_deadline_ms"] / 1000
    try:
        return None, asyncio.run(served.infer(np.array(rows), **options))
    except Exception as error:
        return type(error), str(error)


def test_a_transcript_of_one_server(tmp_path):
    """Metadata, exact and approximate answers, all refusals, and a drain, by all three faces."""
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    settings = ModelSettings(workers=12, max_batch_size=1, max_disagreement=1, max_queue_size=8)
    listen = ServerSettings(
        http_port=0, grpc_port=0, token_file=tmp_path / "tokens", drain_delay_s=2.0
    )
    code = NeRCC(2, 4, points="interleaved", lambda_dec=0.0)
    options = {"name": MODEL, "settings": settings, "server_settings": listen}
    server = make_server(classify, code, (4,), **options)
    models, start = [], server.starts[MODEL]
    server.starts[MODEL] = lambda: models.append(start()) or models[-1]
    with server:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        url = f"http://127.0.0.1:{server.http_port}"
        client = httpx.Client(base_url=url, headers=bearer, timeout=LONG, trust_env=False)

        about = client.get("/v2").json()
        assert {"name", "version", "extensions"} <= set(about)
        assert {"binary_tensor_data", "model_repository", "statistics"} <= set(about["extensions"])
        about = client.get(f"/v2/models/{MODEL}").json()
        assert (about["name"], about["versions"], about["platform"]) == (MODEL, ["1"], "nercc_jax")
        assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
        found = {each["name"]: (each["datatype"], each["shape"]) for each in about["outputs"]}
        assert found == TENSORS
        assert {"nercc_max_queries", "nercc_deadline_ms", "nercc_coded"} <= set(about["parameters"])
        for path, status in (("/v2/health/live", 200), ("/v2/health/ready", 200), ("/none", 404)):
            assert client.get(path).status_code == status
        index = client.post("/v2/repository/index").json()
        assert index == [{"name": MODEL, "version": "1", "state": "READY", "reason": ""}]

        for _ in range(30):  # medians, by which stragglers are known
            by_rest(server, [USUAL])
        for rows, parameters, exact in (
            ([USUAL], EXACT, [True]),
            ([HARD, USUAL], {}, [False, True]),
        ):
            RELEASED.clear()
            own = np.tanh(np.array(rows) @ WEIGHTS)
            (status, rest), (code, rpc) = (f(server, rows, parameters) for f in (by_rest, by_grpc))
            error, reply = by_python(models[0], rows, parameters)
            RELEASED.set()
            assert (status, code, error) == (200, "OK", None)
            assert {"id", "model_name", "model_version", "outputs", "parameters"} <= set(rest)
            assert {f"nercc_{name}" for name in PARAMETERS} <= set(rest["parameters"])
            assert {f"nercc_{name}" for name in PARAMETERS} <= set(rpc.parameters)
            assert [each["name"] for each in rest["outputs"]] == list(TENSORS)
            assert [each.name for each in rpc.outputs] == list(TENSORS)
            assert {each.name for each in dataclasses.fields(Reply)} >= REPLY
            values = np.frombuffer(rpc.raw_output_contents[0], "<f4")
            for found in (rest["outputs"][0]["data"], values, reply.values):
                found = np.reshape(found, own.shape)
                np.testing.assert_allclose(found[exact], own[exact], atol=1e-6)
                assert np.abs(found - own).max() < 1.0, "by two workers' answers of four"
            assert rest["outputs"][1]["data"] == reply.exact.tolist() == exact
            assert list(rpc.raw_output_contents[1]) == exact
            # A wrong label is impossible where it is exact, and unknown without calibration.
            for number in (rest["outputs"][2]["data"], rest["outputs"][3]["data"]):
                assert number == np.where(exact, 0.0, -1.0).tolist()
            assert np.isnan(reply.expected_error).tolist() == np.logical_not(exact).tolist()

        for name, (rows, parameters, other, status, code, error) in REFUSED.items():
            RELEASED.clear()
            found = [ask(server, rows, parameters, **other) for ask in (by_rest, by_grpc)]
            assert [each for each, _ in found] == [status, code], name
            assert set(found[0][1]) == {"error"}, name
            if error is not None:
                assert by_python(models[0], rows, parameters)[0] is error, name
            RELEASED.set()

        # A drain: not ready, then nothing new is taken, and what was accepted is answered.
        RELEASED.clear()
        held = []
        thread = threading.Thread(target=lambda: held.append(by_rest(server, [HARD], EXACT)))
        thread.start()
        while not models[0].in_flight:
            time.sleep(0.01)
        server.stop()
        assert client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200
        assert by_rest(server, [USUAL])[0] == 200
        client.close()
        end, refused = time.monotonic() + LONG, False
        while not refused and time.monotonic() < end:
            try:
                refused = by_rest(server, [USUAL])[0] == 503
            except httpx.ConnectError:
                refused = True
        assert refused
        assert by_grpc(server, [USUAL])[0] == "UNAVAILABLE"
        assert not held
        RELEASED.set()
        thread.join(LONG)
        assert held[0][0] == 200
    assert by_python(models[0], [USUAL], {})[0] is ServerClosing
    assert server.lost == {}
