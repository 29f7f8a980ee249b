"""A transcript of one server by REST, gRPC and Python, pinned from outside: fields and errors.

Further fields may come, and messages may change; what is named here may neither go nor be renamed.
"""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import threading
import time

import numpy as np
from conftest import require

httpx, grpc = require("httpx", "serve-test"), require("grpc", "serve-test")
require("fastapi", "serve")

from serving.grpc_stub import GRPCInferenceServiceStub

from nercc_jax import NeRCC, serving
from nercc_jax.serving.transport import open_inference_pb2 as messages

WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))
USUAL, HARD = [0.1, 0.2, 0.3, 0.4], [7.0, 0.2, 0.3, 0.4]
RELEASED = threading.Event()  # until then, no worker answers a query that is hard
MODEL, TOKEN, LONG = "classifier", "a token", 60.0
NAMES, KINDS = ["output", "exact", "expected_disagreement", "expected_error"], "FP32 BOOL FP32 FP32"
TENSORS = {
    name: (kind, [-1, 3] if name == "output" else [-1])
    for name, kind in zip(NAMES, KINDS.split(), strict=True)
}
PARAMETERS = {f"nercc_{name}" for name in NAMES[1:]} | {
    *("nercc_approximate", "nercc_predicted", "nercc_reexecuted", "nercc_suspicious"),
    *("nercc_workers_asked", "nercc_workers_responded", "nercc_queue_ms"),
}
REPLY = "predicted reexecuted suspicious asked responded expected_disagreement queued seconds"
EXACT = {"nercc_exact": True}
LATE = EXACT | {"nercc_deadline_ms": 50}
# Queries, parameters, model, token; the statuses of REST and gRPC, and Python's error.
REFUSED = [
    ([HARD], LATE, MODEL, TOKEN, 504, "DEADLINE_EXCEEDED", serving.DeadlineExceeded),
    ([[1.0, 2.0]], {}, MODEL, TOKEN, 400, "INVALID_ARGUMENT", ValueError),
    ([USUAL], {"nercc_none": True}, MODEL, TOKEN, 400, "INVALID_ARGUMENT", None),
    ([USUAL] * 30, {}, MODEL, TOKEN, 413, "RESOURCE_EXHAUSTED", serving.QueueFull),
    ([USUAL], {}, "none", TOKEN, 404, "NOT_FOUND", None),
    ([USUAL], {}, MODEL, "other", 401, "UNAUTHENTICATED", None),
]


def classify(x):
    x = np.asarray(x)  # which JAX cannot trace
    if (x[:, 0] == HARD[0]).any():
        RELEASED.wait(LONG)
    return np.tanh(x @ WEIGHTS).astype(np.float32)


def by_rest(server, rows, parameters, model=MODEL, token=TOKEN):
    tensor = {"name": "input", "datatype": "FP32", "shape": np.shape(rows), "data": rows}
    content = {"id": "mine", "parameters": parameters, "inputs": [tensor]}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/{model}/infer"
    headers = {"Authorization": f"Bearer {token}"}
    answer = httpx.post(url, json=content, headers=headers, timeout=LONG, trust_env=False)
    return answer.status_code, answer.json()


def by_grpc(server, rows, parameters, model=MODEL, token=TOKEN):
    request = messages.ModelInferRequest(model_name=model, id="mine")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=np.shape(rows))
    tensor.contents.fp32_contents.extend(np.ravel(rows).tolist())
    for name, value in parameters.items():
        kind = "bool_param" if value is True else "int64_param"
        setattr(request.parameters[name], kind, value)
    given = [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        try:
            stub = GRPCInferenceServiceStub(channel)
            return "OK", stub.ModelInfer(request, metadata=given, timeout=LONG)
        except grpc.RpcError as error:
            return error.code().name, error.details()


def by_python(model, rows, parameters):
    deadline = parameters.get("nercc_deadline_ms", 1e4) / 1000
    infer = model.infer(np.array(rows), exact="nercc_exact" in parameters, deadline=deadline)
    try:
        return None, asyncio.run(infer)
    except Exception as error:
        return type(error), str(error)


def test_a_transcript_of_one_server(tmp_path):
    """Metadata, exact and approximate answers, refusals, and a drain, by all three faces."""
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    server = serving.make_server(
        classify, NeRCC(2, 4, points="interleaved", lambda_dec=0.0), (4,), name=MODEL,
        settings=serving.ModelSettings(
            workers=12, max_batch_size=1, max_disagreement=1, max_queue_size=8
        ),
        server_settings=serving.ServerSettings(
            http_port=0, grpc_port=0, token_file=tmp_path / "tokens", drain_delay_s=2.0
        ),
    )  # fmt: skip
    models, start = [], server.starts[MODEL]
    server.starts[MODEL] = lambda: models.append(start()) or models[-1]
    with server:
        url, bearer = f"http://127.0.0.1:{server.http_port}", {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=bearer, trust_env=False) as client:
            for path, status in (("live", 200), ("ready", 200), ("none", 404)):
                assert client.get(f"/v2/health/{path}").status_code == status
            about = client.get("/v2").json()
            assert {"name", "version", "extensions"} <= set(about)
            assert {"binary_tensor_data", "statistics"} <= set(about["extensions"])
            about = client.get(f"/v2/models/{MODEL}").json()
            assert (about["name"], about["versions"]) == (MODEL, ["1"])
            assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
            outputs = {each["name"]: (each["datatype"], each["shape"]) for each in about["outputs"]}
            assert outputs == TENSORS
            index = client.post("/v2/repository/index").json()
            assert index == [{"name": MODEL, "version": "1", "state": "READY", "reason": ""}]

        for _ in range(30):  # medians, by which stragglers are known
            by_rest(server, [USUAL], {})
        for rows, given, exact in (([USUAL], EXACT, [True]), ([HARD, USUAL], {}, [False, True])):
            RELEASED.clear()
            (status, rest), (code, rpc) = (ask(server, rows, given) for ask in (by_rest, by_grpc))
            error, reply = by_python(models[0], rows, given)
            RELEASED.set()
            assert (status, code, error) == (200, "OK", None)
            assert {"id", "model_name", "model_version", "outputs", "parameters"} <= set(rest)
            assert set(rest["parameters"]) >= PARAMETERS
            assert set(rpc.parameters) >= PARAMETERS
            assert all(hasattr(reply, name) for name in REPLY.split())
            assert [each["name"] for each in rest["outputs"]] == NAMES
            assert [each.name for each in rpc.outputs] == NAMES
            own, data = (
                np.tanh(np.array(rows) @ WEIGHTS),
                [each["data"] for each in rest["outputs"]],
            )
            for found in (data[0], np.frombuffer(rpc.raw_output_contents[0], "<f4"), reply.values):
                values = np.reshape(found, own.shape)
                np.testing.assert_allclose(values[exact], own[exact], atol=1e-6)
                assert np.abs(values - own).max() < 1.0, "decoded from workers beside the curve"
            assert data[1] == reply.exact.tolist() == list(rpc.raw_output_contents[1]) == exact
            # Errors are 0 where exact, and else unknown as long as nothing is calibrated.
            assert data[2] == data[3] == np.where(exact, 0.0, -1.0).tolist()
            assert np.isnan(reply.expected_error).tolist() == np.logical_not(exact).tolist()

        for rows, given, model, token, status, code, error in REFUSED:
            RELEASED.clear()
            found = [ask(server, rows, given, model, token) for ask in (by_rest, by_grpc)]
            assert [each for each, _ in found] == [status, code], found
            assert set(found[0][1]) == {"error"}
            assert error is None or by_python(models[0], rows, given)[0] is error
            RELEASED.set()

        # It drains: it is not ready, then takes nothing new, and answers what it accepted.
        RELEASED.clear()
        held = []
        thread = threading.Thread(target=lambda: held.append(by_rest(server, [HARD], EXACT)))
        thread.start()
        while not models[0].in_flight:
            time.sleep(0.01)
        server.stop()
        ready = httpx.get(f"{url}/v2/health/ready", headers=bearer, trust_env=False)
        assert (ready.status_code, by_rest(server, [USUAL], {})[0]) == (503, 200)
        status, end = 200, time.monotonic() + LONG
        while status == 200 and time.monotonic() < end:
            try:
                status, _ = by_rest(server, [USUAL], {})
            except httpx.ConnectError:
                status = 503
        assert (status, by_grpc(server, [USUAL], {})[0], held) == (503, "UNAVAILABLE", [])
        RELEASED.set()
        thread.join(LONG)
        assert held[0][0] == 200
    assert by_python(models[0], [USUAL], {})[0] is serving.ServerClosing
    assert not server.lost
