"""A server from outside: both faces, several models, errors, metrics, the log."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import concurrent.futures
import gzip
import json
import re
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from nercc_server import ENDS, patience, running

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from grpc_stub import GRPCInferenceServiceStub

from nercc_jax.serving.transport import open_inference_pb2 as messages
from nercc_jax.serving.transport._rest import SharedAnswer

pytestmark = pytest.mark.slow

LIMIT = 10_000_000
CONFIG = f"""
max_body_bytes = {LIMIT}
request_log_rate = 1
[defaults]
scheme = "uncoded"
input_shape = [4]
workers = 2
max_batch_size = 2
[[models]]
model = "own:double"
name = "double"
[[models]]
model = "own:moody"
name = "moody"
max_attempts = 2
[[models]]
model = "own:from_weights"
weights = "weights.npy"
output_name = "scores"
[[models]]
model = "own:double"
name = "slow"
workers = 1
max_batch_size = 1
max_queue_size = 4
service_delay_s = 0.4
[[models]]
model = "own:double"
name = "counted"
[[models]]
model = "own:double"
name = "untouched"
"""
NAMES = ["double", "moody", "own.from_weights", "slow", "counted", "untouched"]
MATRIX = np.arange(20, dtype=np.float32).reshape(4, 5)
ROOT = Path(__file__).parents[2]
EXTENSIONS = ["model_configuration", "model_repository", "schedule_policy", "statistics"]
OUTCOMES = ("ok", "deadline", "failed", "cancelled")
OUTCOMES += ("invalid", "overloaded", "queue_full", "draining")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    np.save(folder / "weights.npy", MATRIX)
    with running(folder, config=CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield GRPCInferenceServiceStub(channel)


def numbers(count):
    return np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)


def outputs(answer):
    """Of a REST answer in JSON, by name."""
    assert answer.status_code == 200, answer.text
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer.json()["outputs"]}


def message(model="double", data=(1, 2, 3, 4), shape=(1, 4), name="input", outputs=(), **more):
    parameters = more.pop("parameters", {})
    request = messages.ModelInferRequest(model_name=model, **more)
    tensor = request.inputs.add(name=name, datatype="FP32", shape=shape)
    tensor.contents.fp32_contents.extend(np.ravel(data).tolist())
    for each in outputs:
        request.outputs.add(name=each)
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], kind, value)
    return request


# Answers.


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_both_faces_answer_in_order(server, stub, count):
    x = numbers(count)
    answer = outputs(server.infer("double", x.tolist(), [count, 4]))
    np.testing.assert_array_equal(answer["output"].astype(np.float32), 2 * x[:, :3])
    assert answer["exact"].tolist() == [True] * count
    reply = stub.ModelInfer(message(data=x, shape=[count, 4]), timeout=ENDS)
    values = np.frombuffer(reply.raw_output_contents[0], "<f4").reshape(count, 3)
    np.testing.assert_array_equal(values, 2 * x[:, :3])


def test_many_clients_at_once_get_each_their_own_answer(server):
    def ask(number):
        count = 1 + number % 5
        x = numbers(count) + number
        answer = outputs(server.infer("double", x.tolist(), [count, 4]))["output"]
        np.testing.assert_array_equal(answer.astype(np.float32), 2 * x[:, :3])

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, range(200)))


def test_a_model_made_from_weights(server):
    answer = outputs(server.infer("own.from_weights", [1, 0, 0, 2]))
    assert list(answer) == ["scores", "exact", "expected_disagreement", "expected_error"]
    np.testing.assert_array_equal(answer["scores"], [MATRIX[0] + 2 * MATRIX[3]])


def test_a_large_body(server):
    count = 900  # about the queue's length; spaces make JSON large
    x = numbers(count)
    tensor = {"name": "input", "datatype": "FP32", "shape": [count, 4], "data": x.tolist()}
    content = json.dumps({"inputs": [tensor]}).encode() + b" " * 100_000
    answer = outputs(server.http.post("/v2/models/double/infer", content=content))
    np.testing.assert_array_equal(answer["output"].astype(np.float32), 2 * x[:, :3])


BODY = json.dumps(
    {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
).encode()


def post(server, content=BODY, path="/v2/models/double/infer", **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.http.post(path, content=content, headers=names)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (BODY, {}),
        (BODY, {"content_type": "text/plain"}),
        (BODY, {"content_encoding": "identity"}),
        (gzip.compress(BODY), {"content_encoding": "gzip"}),
        (gzip.compress(BODY), {"content_encoding": "GZip"}),
        (zlib.compress(BODY), {"content_encoding": "deflate"}),
        (BODY, {"inference_header_content_length": str(len(BODY))}),
    ],
    ids=["", "as text", "identity", "gzip", "GZip", "deflate", "with its length"],
)
def test_bodies_come_in_many_ways(server, content, headers):
    answer = post(server, content, **headers)
    assert outputs(answer)["output"].tolist() == [[2, 4, 6]]
    assert answer.headers["content-type"] == "application/json"


def test_a_body_without_a_content_type_or_a_length(server):
    with socket.create_connection(("127.0.0.1", server.http_port), ENDS) as raw:
        raw.sendall(
            b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n"
        )
        for part in (BODY[:20], BODY[20:]):
            raw.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        raw.sendall(b"0\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b'"data":[2.0,4.0,6.0]' in answer


# What the server says of itself.


def test_health_and_metadata(server, stub):
    assert server.http.get("/v2/health/live").json() == {"live": True}
    assert server.http.get("/v2/health/ready").json() == {"ready": True}
    assert server.http.get("/v2/models").json() == {"models": NAMES}
    about = server.http.get("/v2").json()
    assert about["name"] == "nercc_jax"
    assert about["extensions"] == ["binary_tensor_data", *EXTENSIONS]
    by_grpc = stub.ServerMetadata(messages.ServerMetadataRequest())
    assert (by_grpc.name, by_grpc.version) == ("nercc_jax", about["version"])
    assert stub.ServerLive(messages.ServerLiveRequest()).live
    assert stub.ServerReady(messages.ServerReadyRequest()).ready


@pytest.mark.parametrize("version", ["", "1"])
def test_metadata_of_a_model(server, stub, version):
    path = "/v2/models/own.from_weights" + (f"/versions/{version}" if version else "")
    about = server.http.get(path).json()
    assert about["name"] == "own.from_weights"
    assert about["versions"] == ["1"]
    assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
    assert about["outputs"][0] == {"name": "scores", "datatype": "FP32", "shape": [-1, 5]}
    assert server.http.get(f"{path}/ready").json() == {"name": "own.from_weights", "ready": True}
    assert about["parameters"] == {
        "nercc_max_queries": 1024,
        "nercc_deadline_ms": 10_000,
        "nercc_max_deadline_ms": 3_600_000,
        "nercc_coded": False,
        "nercc_uncoded": "it is served by Uncoded",
        "nercc_outputs": "scores",
    }
    asked = {"name": "own.from_weights", "version": version}
    by_grpc = stub.ModelMetadata(messages.ModelMetadataRequest(**asked))
    assert list(by_grpc.versions) == ["1"]
    assert [(o.name, o.datatype, list(o.shape)) for o in by_grpc.outputs] == [
        (o["name"], o["datatype"], o["shape"]) for o in about["outputs"]
    ]
    assert stub.ModelReady(messages.ModelReadyRequest(**asked)).ready


def test_openapi_describes_what_it_refers_to(server):
    schema = server.http.get("/openapi.json").json()
    known = {f"#/components/schemas/{name}" for name in schema["components"]["schemas"]}
    assert set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(schema))) <= known
    assert "/v2/models/{model_name}/infer" in schema["paths"]


def test_the_page(server):
    answer = server.http.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.text == (ROOT / "nercc_jax/serving/status.html").read_text()


# Refusals, by both faces.

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("more", "status", "code", "words"),
    [
        ({"shape": [2, 4]}, 400, INVALID, "do not make a tensor of shape [2, 4]"),
        ({"shape": [4]}, 400, INVALID, "not of shape [4]"),
        ({"shape": [0, 4], "data": []}, 400, INVALID, "not of shape [0, 4]"),
        ({"data": [1, 2, 3, 1e39]}, 400, INVALID, "queries [0] are not finite in float32"),
        ({"name": "images"}, 400, INVALID, "not inputs ['images']"),
        ({"outputs": ["nothing"]}, 400, INVALID, "each once, not ['nothing']"),
        ({"outputs": ["exact", "exact"]}, 400, INVALID, "each once"),
        ({"parameters": {"nercc_exact": "yes"}}, 400, INVALID, "must be a boolean, not 'yes'"),
        ({"parameters": {"nercc_deadline_ms": -1}}, 400, INVALID, "must be a positive number"),
        ({"parameters": {"nercc_deadline_ms": 9 * 10**14}}, 400, INVALID, "up to 3600000, an hour"),
        ({"model": "nothing"}, 404, grpc.StatusCode.NOT_FOUND, "nothing"),
        ({"model_version": "2"}, 404, grpc.StatusCode.NOT_FOUND, "version 2"),
        (
            {"model": "slow", "data": [0] * 20, "shape": [5, 4]},
            413,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "5 queries in one request; the queue of slow holds 4",
        ),
        (
            {"model": "moody", "data": [-1, 2, 3, 4]},
            502,
            grpc.StatusCode.INTERNAL,
            "a query got no answer: 2 workers failed: the server's log says why, by id ",
        ),
        (
            {"model": "slow", "parameters": {"nercc_deadline_ms": 50}},
            504,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "not answered within 0.05 s",
        ),
        (
            {"model": "slow", "parameters": {"timeout": 50_000}},
            504,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "not answered within 0.05 s",
        ),
    ],
)
def test_errors_by_both_faces(server, stub, more, status, code, words):
    given = {"model": "double", "data": [1, 2, 3, 4], "shape": [1, 4]} | more
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(message(**given), timeout=ENDS)
    assert (error.value.code(), words in error.value.details()) == (code, True), error.value
    tensor = {"name": given.get("name", "input"), "datatype": "FP32"}
    tensor |= {"shape": given["shape"], "data": given["data"]}
    content = {"inputs": [tensor]}
    if "outputs" in given:
        content["outputs"] = [{"name": name} for name in given["outputs"]]
    if "parameters" in given:
        content["parameters"] = given["parameters"]
    version = f"/versions/{given['model_version']}" if "model_version" in given else ""
    answer = server.http.post(f"/v2/models/{given['model']}{version}/infer", json=content)
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert words in answer.json()["error"]
    # And goes on.
    assert outputs(server.infer("double", [1, 2, 3, 4]))["output"].tolist() == [[2, 4, 6]]


def test_what_a_model_raises_is_in_the_log_only(server):
    answer = server.infer("moody", [-1, 2, 3, 4], id="moody 7")
    assert "no negative numbers" not in answer.json()["error"]
    assert answer.json()["error"].endswith("the server's log says why, by id moody 7")
    lines = [line for line in server.log() if line.get("id") == "moody 7"]
    (line,) = [line for line in lines if line["message"] == "inference failed"]
    assert line["level"] == "WARNING"
    assert "no negative numbers, please" in line["why"]


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v2", "/metrics"])
def test_head_has_the_status_of_get(server, path):
    answer = server.http.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_the_description_loads_nothing_from_elsewhere(server):
    page = server.http.get("/docs").text
    assert "http" not in page
    assert "/v2/models/{model_name}/infer" in page


def test_errors_do_not_echo_all_that_was_sent(server):
    long = "x" * 20_000
    for answer in (
        server.infer("double", [1, 2, 3, 4], outputs=[{"name": long}]),
        server.infer("double", [1, 2, 3, 4], parameters={long: 1}),
        server.http.get(f"/v2/models/{long}"),
        server.http.get(f"/{long}"),
    ):
        assert 400 <= answer.status_code < 500
        assert len(answer.text) < 1000


@pytest.mark.parametrize("kind", ["ModelReady", "ModelMetadata"])
@pytest.mark.parametrize("about", [{"name": "nothing"}, {"name": "double", "version": "2"}])
def test_grpc_knows_no_other_model_or_version(stub, kind, about):
    with pytest.raises(grpc.RpcError) as error:
        getattr(stub, kind)(getattr(messages, f"{kind}Request")(**about))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "path",
    ["/v2/models/nothing", "/v2/models/nothing/ready", "/v2/models/double/versions/2", "/nothing"],
)
def test_rest_knows_no_other_model_or_version(server, path):
    assert server.http.get(path).status_code == 404


def test_models_are_not_loaded_at_run_time(stub):
    with pytest.raises(grpc.RpcError) as error:
        stub.RepositoryModelLoad(messages.RepositoryModelLoadRequest(model_name="double"))
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("raw", "words"),
    [([b"\0" * 12], "takes 16 bytes"), ([b"\0" * 16] * 2, "does not match")],
)
def test_grpc_refuses_raw_contents_that_do_not_fit(stub, raw, words):
    request = message(data=[])
    request.inputs[0].ClearField("contents")
    request.raw_input_contents.extend(raw)
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.value.details()


@pytest.mark.parametrize("datatype", ["FP64", "BYTES", "FP16", "COMPLEX", ""])
def test_grpc_refuses_other_types(stub, datatype):
    request = message()
    request.inputs[0].datatype = datatype
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def pieces(total):
    for _ in range(total // 100_000):
        yield bytes(100_000)


@pytest.mark.parametrize(
    ("content", "headers", "status", "words"),
    [
        (b"{", {}, 400, "the body is not JSON"),
        (b"", {}, 400, "the body is not JSON"),
        (BODY, {"inference_header_content_length": "7"}, 400, "the body is not JSON"),
        (BODY, {"inference_header_content_length": "9" * 5000}, 400, "is no length within"),
        (BODY, {"content_encoding": "gzip"}, 400, "the body is not gzip"),
        (BODY, {"content_encoding": "br"}, 415, "gzip and deflate are known"),
        (b"x" * (LIMIT + 1), {}, 413, f"at most {LIMIT} are taken"),
        (lambda: pieces(2 * LIMIT), {}, 413, "at most 1048576 are taken: send tensors as binary"),
        (
            gzip.compress(bytes(LIMIT)),
            {"content_encoding": "gzip"},
            413,
            "at most 1048576 are taken",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bodies_that_are_refused(server, content, headers, status, words):
    """Too large ones before they are read: the client may find its connection closed."""
    answer = post(server, content() if callable(content) else content, **headers)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_grpc_refuses_messages_that_are_too_large(stub):
    count = LIMIT // 16 + 1
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(message(data=np.zeros((count, 4)), shape=[count, 4]))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{",
        b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n",
        b"POST /v2/models/double/infer HTTP/1.1\r\n",
    ],
)
def test_a_client_that_goes_away_is_no_error(server, raw):
    lines = len(server.log())
    with socket.create_connection(("127.0.0.1", server.http_port), ENDS) as connection:
        connection.sendall(raw)
    assert server.infer("double", [1, 2, 3, 4]).status_code == 200
    assert {line["level"] for line in server.log()[lines:]} == {"INFO"}


def ask_by_rest(server, data):
    """Asks the slow model; what makes the client go away."""
    tensor = {"name": "input", "datatype": "FP32", "shape": np.shape(data), "data": data}
    content = json.dumps({"inputs": [tensor]}).encode()
    connection = socket.create_connection(("127.0.0.1", server.http_port), ENDS)
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection.close


def ask_by_grpc(server, data):
    asked = message(model="slow", data=data, shape=np.shape(data))
    stub = GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc))
    return stub.ModelInfer.future(asked).cancel


@pytest.mark.parametrize("ask", [ask_by_rest, ask_by_grpc])
def test_a_client_that_goes_away_while_it_waits_is_dropped(server, ask):
    def ended():
        outcomes = ("cancelled", "ok")
        return [server.count("requests_total", model="slow", outcome=each) for each in outcomes]

    cancelled, ok = ended()
    go_away = ask(server, [[1.0] * 4] * 4)
    for _ in patience(ENDS):
        if server.status("slow")["queue"]["in_flight"]:
            break
    go_away()
    for _ in patience(ENDS):
        if not server.status("slow")["queue"]["in_flight"]:
            break
    assert ended() == [cancelled + 1, ok]
    assert server.status("slow")["queue"] == {"waiting": 0, "max": 4, "in_flight": 0}


def test_a_queue_that_is_full_is_reported_by_both_faces(server, stub):
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        answered = thread.submit(server.infer, "slow", [1.0] * 16)
        for _ in patience(ENDS):
            if server.status("slow")["queue"]["waiting"]:
                break
        answer = server.infer("slow", [1.0] * 16)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "4 more came; the queue holds 4" in answer.json()["error"]
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(message(model="slow", data=[1.0] * 16, shape=[4, 4]))
        assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert answered.result(ENDS).status_code == 200
    assert server.count("requests_total", model="slow", outcome="queue_full") == 2


def test_a_deadline_of_the_grpc_client_is_kept(server, stub):
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(message(model="slow"), timeout=0.05)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


# Metrics and status.


def test_every_label_is_there_from_the_start(server):
    metrics = server.metrics()

    def values(name, label):
        return {
            dict(labels)[label]: value
            for (sample, labels), value in metrics.items()
            if sample == f"nercc_{name}" and ("model", "untouched") in labels
        }

    assert values("requests_total", "outcome") == dict.fromkeys(OUTCOMES, 0)
    answers = ("exact", "decoded", "predicted", "reexecuted")
    assert values("queries_total", "answer") == dict.fromkeys(answers, 0)
    assert values("audited_total", "label") == {"same": 0, "other": 0, "unknown": 0}
    assert values("worker_calls_total", "result") == {"answered": 0, "late": 0, "error": 0}
    states = {"idle": 2, "busy": 0, "overdue": 0, "starting": 0, "fenced": 0}
    assert values("workers", "state") == states
    for name in ("stragglers_total", "reexecutions_total", "worker_deaths_total", "queue_queries"):
        assert values(name, "model") == {"untouched": 0}
    for name in (
        "request_seconds",
        "queue_seconds",
        "batch_size",
        "group_fill",
        "workers_responded",
    ):
        assert values(f"{name}_count", "model") == {"untouched": 0}
        assert set(values(f"{name}_bucket", "le").values()) == {0}


def test_metrics_and_status_agree_with_what_was_sent(server, stub):
    for count in (1, 2, 7):
        assert server.infer("counted", numbers(count).tolist(), [count, 4]).status_code == 200
    stub.ModelInfer(message(model="counted"))
    # Refused where they are read, by the model, and by the batcher; by either face.
    for content in (b"{", BODY.replace(b"FP32", b"INT8"), BODY.replace(b"4]}", b"1e39]}")):
        assert post(server, content, "/v2/models/counted/infer").status_code == 400
    assert post(server, BODY, "/v2/models/counted/infer", content_encoding="br").status_code == 415
    for wrong in ({"shape": [4]}, {"data": [1e39] * 4}):
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(message(model="counted", **wrong))

    def count(name, **labels):
        return server.count(name, model="counted", **labels)

    assert count("requests_total", outcome="ok") == 4
    assert count("requests_total", outcome="invalid") == 6
    assert count("queries_total", answer="exact") == 11
    assert count("request_seconds_count") == 4
    assert count("batch_size_sum") == 11
    assert count("queue_queries") == 0
    calls = count("batch_size_count")
    assert count("worker_calls_total", result="answered") == calls
    status = server.status("counted")
    assert status["totals"]["requests"] == 10
    none = dict.fromkeys(("decoded", "predicted", "reexecuted"), 0)
    assert status["totals"]["queries"] == {"exact": 11} | none
    assert status["totals"]["errors"]["invalid"] == 6
    assert status["latency"]["number"] == sum(status["latency"]["counts"]) == 4
    assert 0 < status["latency"]["p50_ms"] <= status["latency"]["p999_ms"]


def test_errors_are_counted_by_what_they_are(server):
    def counted():
        found = {"invalid": "double", "deadline": "slow", "failed": "moody"}
        return {
            outcome: server.count("requests_total", model=model, outcome=outcome)
            for outcome, model in found.items()
        }

    before = counted()
    server.infer("double", [1, 2, 3])
    server.infer("slow", [0] * 4, parameters={"nercc_deadline_ms": 20})
    server.infer("moody", [-1] * 4)
    assert counted() == {outcome: number + 1 for outcome, number in before.items()}


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    dashboard = (ROOT / "docs/deploy/grafana-dashboard.json").read_text()
    asked = set(re.findall(r"\b(?:nercc|process)_[a-z_]+\b", dashboard))
    asked -= {"nercc_jax"}
    assert len(asked) > 15
    assert asked <= {name for name, _ in server.metrics()}


def test_openmetrics_are_served_to_those_who_ask(server):
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = server.http.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert "nercc_requests" in names


NUMBER, MAYBE = (int, float), (int, float, type(None))
STATUS = {
    "name": str,
    "health": {"live": bool, "ready": bool, "trouble": (str, type(None))},
    "hints": list,
    "code": {"name": str, "num_data": int, "num_workers": int},
    "outputs": {"read_as": (str, type(None)), "why": (str, type(None))},
    "policy": (dict, type(None)),
    "predictor": (dict, type(None)),
    "checks": (dict, type(None)),
    "pool": {"kind": str, "num_workers": int},
    "workers": [{"state": str, "deaths": int, "busy_s": NUMBER}],
    "queue": {"waiting": int, "max": int, "in_flight": int},
    "totals": {
        "requests": int,
        "queries": dict.fromkeys(("exact", "decoded", "predicted", "reexecuted"), int),
        "errors": dict.fromkeys(sorted(set(OUTCOMES) - {"ok"}), int),
        "groups": int,
        "stragglers": int,
        "reexecutions": int,
        "deaths": int,
    },
    "latency": {
        "bounds_ms": [NUMBER],
        "counts": [int],
        "p50_ms": MAYBE,
        "p99_ms": MAYBE,
        "p999_ms": MAYBE,
        "number": int,
        "seconds": NUMBER,
    },
    "responded": {"counts": [int]},
    "fidelity": {
        "decoded_share": MAYBE,
        "expected_disagreement": MAYBE,
        "audited": int,
        "audited_disagreement": MAYBE,
        "stragglers": (dict, type(None)),
    },
}


def check(value, shape):
    if isinstance(shape, dict):
        assert set(value) == set(shape)
        for name, inner in shape.items():
            check(value[name], inner)
    elif isinstance(shape, list):
        assert value
        for each in value:
            check(each, shape[0])
    else:
        assert isinstance(value, shape)


def test_all_workers_have_their_weights(server):
    found = server.http.get("/weights").json()
    assert found.keys() == {*NAMES}
    workers = server.status("counted")["pool"]["num_workers"]
    assert found["counted"] == {str(worker): True for worker in range(workers)}


def test_what_is_expensive_is_found_out_once_for_all_that_ask():
    asked = []

    async def find():
        asked.append(len(asked))
        await asyncio.sleep(0.05)
        if len(asked) == 2:
            raise OSError("it cannot be found out")
        return len(asked)

    async def ask():
        shared = SharedAnswer(find, 0.2)
        assert await asyncio.gather(*(shared() for _ in range(50))) == [1] * 50
        assert await shared() == 1
        await asyncio.sleep(0.2)
        given_up = asyncio.ensure_future(shared())
        await asyncio.sleep(0)
        given_up.cancel()  # which takes nothing from the others
        with pytest.raises(OSError, match="cannot be found out"):
            await shared()
        await asyncio.sleep(0.2)
        assert await shared() == 3

    asyncio.run(ask())


def test_the_status_has_what_the_page_reads(server):
    answer = server.http.get("/status")
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    check(status["server"], {"name": str, "version": str, "state": str, "uptime_s": NUMBER})
    assert status["server"]["state"] == "serving"
    assert [model["name"] for model in status["models"]] == NAMES
    for model in status["models"]:
        check(model, STATUS)
        assert len(model["latency"]["counts"]) == len(model["latency"]["bounds_ms"]) + 1
        assert len(model["workers"]) == model["pool"]["num_workers"]
    assert server.status("counted")["code"] == {"name": "Uncoded", "num_data": 1, "num_workers": 1}
    # Whatever the page takes out of an object by name is in the status somewhere.
    page = (ROOT / "nercc_jax/serving/status.html").read_text()
    read = set(re.findall(r"\b(?:totals|queue|pool|code|fidelity|latency|responded)\.(\w+)", page))
    read -= {"expected_beyond_bar", "audited_beyond_bar"}  # of models with a tolerance
    assert len(read) > 8
    assert all(f'"{name}":' in answer.text for name in read)


# The log.


def called_once(name, ask):
    """Ask until no call is made again, as one is on a busy machine; return the request's id."""
    for attempt in range(20):
        if not ask(f"{name}-{attempt}"):
            return f"{name}-{attempt}"
    raise AssertionError("each call was made again")


def test_every_request_is_a_line_of_json_if_that_is_wished(server, stub):
    def by_rest(name):
        answer = server.infer("double", [1, 2, 3, 4], id=name).json()
        return answer["parameters"]["nercc_reexecuted"]

    def by_grpc(name):
        return stub.ModelInfer(message(id=name)).parameters["nercc_reexecuted"].int64_param

    names = called_once("by-rest", by_rest), called_once("by-grpc", by_grpc)
    server.infer("double", [1, 2, 3], id="wrong")
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(message(shape=[7]))
    lines = server.log()
    for name in names:
        (line,) = [line for line in lines if line.get("id") == name]
        assert line["message"] == "answered"
        assert (line["model"], line["level"]) == ("double", "INFO")
        assert (line["outcome"], line["answers"]) == ("ok", ["exact"])
        assert 0 < line["queue_ms"] < line["ms"] < 1e3 * ENDS
        (group,) = line["groups"]
        assert group.pop("group") > 0
        assert group == {"queries": [0], "shared_with": [], "asked": 1, "responded": 1}
        assert line["time"]
    refused = [line for line in lines if line["message"] == "not answered"]
    assert [line["outcome"] for line in refused[-2:]] == ["invalid", "invalid"]
    assert "not of shape [0, 4]" in refused[-2]["error"]
    assert "not of shape [7]" in refused[-1]["error"]


def test_without_the_wish_there_are_no_lines_of_requests(tmp_path):
    config = CONFIG.split("[[models]]")[0].replace("request_log_rate = 1", "") + (
        '[[models]]\nmodel = "own:double"\n'
    )
    with running(tmp_path, config=config, NERCC_GRPC_PORT="none") as server:
        assert server.grpc_port is None
        assert server.infer("own.double", [1, 2, 3, 4]).status_code == 200
        assert server.infer("own.double", [1, 2, 3]).status_code == 400
        assert "answered" not in {line["message"] for line in server.log()}
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/v2", trust_env=False)
