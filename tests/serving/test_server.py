"""`nercc serve` from outside: what it says of itself, metrics, the status, the log."""

# ruff: noqa: E402 (`require` comes before what needs it)

import concurrent.futures
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from faces import ask, stub_of
from nercc_server import running

httpx = require("httpx", "serve-test")

from nercc_jax.serving.transport import open_inference_pb2 as messages

pytestmark = pytest.mark.slow

CONFIG = """
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
[[models]]
model = "own:from_weights"
weights = "weights.npy"
[[models]]
model = "own:double"
name = "slow"
faults = {service_delay_s = 0.4}
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
EXTENSIONS = ["model_repository"]
OUTCOMES = ("ok", "deadline", "failed", "cancelled")
OUTCOMES += ("invalid", "overloaded", "queue_full", "draining")
ONE = {"input": [[1.0, 2, 3, 4]]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    np.save(folder / "weights.npy", MATRIX)
    with running(folder, config=CONFIG) as server:
        yield server


@pytest.fixture(scope="module")
def stub(server):
    with stub_of(server) as stub:
        yield stub


def test_many_clients_at_once_get_each_their_own_answer(server):
    def one(number):
        count = 1 + number % 5
        x = np.random.default_rng(number).normal(size=(count, 4)).astype(np.float32)
        answer = ask(("json", "raw")[number % 2], server, "double", {"input": x})
        np.testing.assert_array_equal(answer.outputs["output"], 2 * x[:, :3])

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        list(threads.map(one, range(200)))


# What the server says of itself.


@pytest.mark.parametrize("version", ["", "1"])
def test_health_metadata_and_a_model_made_from_weights(server, stub, version):
    assert server.http.get("/v2/health/live").json() == {"live": True}
    assert server.http.get("/v2/health/ready").json() == {"ready": True}
    assert server.http.get("/v2/models").json() == {"models": NAMES}
    about = server.http.get("/v2").json()
    assert about["name"] == "nercc_jax"
    assert about["extensions"] == ["binary_tensor_data", *EXTENSIONS]
    by_grpc = stub.ServerMetadata(messages.ServerMetadataRequest())
    assert (by_grpc.name, by_grpc.version) == ("nercc_jax", about["version"])
    name = "own.from_weights"
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    about = server.http.get(path).json()
    assert (about["name"], about["versions"]) == (name, ["1"])
    assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
    assert about["outputs"][0] == {"name": "output", "datatype": "FP32", "shape": [-1, 5]}
    assert server.http.get(f"{path}/ready").json() == {"name": name, "ready": True}
    assert about["parameters"] == {
        "nercc_coded": False,
        "nercc_uncoded": "it is served by Uncoded",
    }
    asked = {"name": name, "version": version}
    assert list(stub.ModelMetadata(messages.ModelMetadataRequest(**asked)).versions) == ["1"]
    assert stub.ModelReady(messages.ModelReadyRequest(**asked)).ready
    for face in ("json", "raw"):
        found = ask(face, server, name, {"input": [[1.0, 0, 0, 2]]}, version=version).outputs
        np.testing.assert_array_equal(found["output"], [MATRIX[0] + 2 * MATRIX[3]])


# Metrics and status.


def test_every_label_is_there_from_the_start(server):
    metrics = server.metrics()

    def values(name, label):
        return {
            dict(labels)[label]: value
            for (sample, labels), value in metrics.items()
            if sample == f"nercc_{name}" and ("model", "untouched") in labels
        }

    for name, label, expected in (
        ("requests_total", "outcome", OUTCOMES),
        ("queries_total", "answer", ("exact", "decoded", "predicted", "reexecuted")),
        ("audited_total", "label", ("same", "other", "unknown")),
        ("worker_calls_total", "result", ("answered", "late", "error")),
    ):
        assert values(name, label) == dict.fromkeys(expected, 0)
    states = {"idle": 2, "busy": 0, "overdue": 0, "starting": 0, "fenced": 0}
    assert values("workers", "state") == states
    for name in ("stragglers_total", "reexecutions_total", "worker_deaths_total", "queue_queries"):
        assert values(name, "model") == {"untouched": 0}
    for name in ("request", "queue"):
        assert values(f"{name}_seconds_count", "model") == {"untouched": 0}
    for name in ("batch_size", "group_fill", "workers_responded"):
        assert set(values(f"{name}_bucket", "le").values()) == {0}


def test_metrics_and_status_agree_with_what_was_sent(server):
    def count(name, model="counted", **labels):
        return server.count(name, model=model, **labels)

    others = {"deadline": "slow", "failed": "moody"}
    before = [count("requests_total", model, outcome=each) for each, model in others.items()]
    for face, rows in (("json", 1), ("binary", 2), ("typed", 7), ("raw", 1)):
        assert ask(face, server, "counted", {"input": np.ones((rows, 4))}).is_(200)
    # Refused where they are read, by the model, and by the batcher; by either face.
    path = "/v2/models/counted/infer"
    assert server.http.post(path, content=b"{").status_code == 400
    packed = {"content-encoding": "br"}
    assert server.http.post(path, content=b"{}", headers=packed).status_code == 415
    for x in ([1.0, 2, 3, 4], [[1e39] * 4]):
        for face in ("json", "raw"):
            assert ask(face, server, "counted", {"input": x}).is_(400)
    late = ask("json", server, "slow", ONE, parameters={"nercc_deadline_ms": 20})
    assert late.is_(504)
    assert ask("json", server, "moody", {"input": [[-1.0] * 4]}).is_(502)
    after = [count("requests_total", model, outcome=each) for each, model in others.items()]
    assert after == [number + 1 for number in before]

    assert count("requests_total", outcome="ok") == count("request_seconds_count") == 4
    assert count("requests_total", outcome="invalid") == 6
    assert count("queries_total", answer="exact") == count("batch_size_sum") == 11
    assert count("queue_queries") == 0
    assert count("worker_calls_total", result="answered") == count("batch_size_count")
    status = server.status("counted")
    assert (status["totals"]["requests"], status["totals"]["errors"]["invalid"]) == (10, 6)
    none = dict.fromkeys(("decoded", "predicted", "reexecuted"), 0)
    assert status["totals"]["queries"] == {"exact": 11} | none
    assert status["latency"]["number"] == sum(status["latency"]["counts"]) == 4
    assert 0 < status["latency"]["p50_ms"] <= status["latency"]["p999_ms"]


def test_the_dashboard_asks_for_metrics_that_there_are(server):
    dashboard = (ROOT / "docs/deploy/grafana-dashboard.json").read_text()
    asked = set(re.findall(r"\b(?:nercc|process)_[a-z_]+\b", dashboard)) - {"nercc_jax"}
    assert len(asked) > 15
    assert asked <= {name for name, _ in server.metrics()}


def test_the_status_has_what_the_page_reads(server):
    """Whatever the page takes out of an object by name."""
    answer = server.http.get("/status")
    assert answer.headers["cache-control"] == "no-store"
    status = answer.json()
    assert status["server"]["state"] == "serving"
    assert [model["name"] for model in status["models"]] == NAMES
    page = (ROOT / "nercc_jax/serving/status.html").read_text()
    of_values = {"expected_beyond_bar"}  # of models with a tolerance
    parts = "totals", "queue", "pool", "code", "fidelity", "latency"
    read = re.findall(rf"\b({'|'.join(parts)})\.(\w+)", page)
    assert len(read) > 8
    for model in status["models"]:
        assert all(name in model[part] for part, name in read if name not in of_values)
        assert {"health", "hints", "outputs", "policy", "predictor", "checks"} <= model.keys()
        assert len(model["latency"]["counts"]) == len(model["latency"]["bounds_ms"]) + 1
        assert len(model["workers"]) == model["pool"]["num_workers"]
        assert set(model["totals"]["errors"]) == set(OUTCOMES) - {"ok"}
        assert all({"state", "deaths", "busy_s"} <= worker.keys() for worker in model["workers"])
    assert server.status("counted")["code"] == {"name": "Uncoded", "num_data": 1, "num_workers": 1}


# The log.


def test_the_log_is_json_without_lines_of_requests_but_for_failures(server):
    assert ask("json", server, "double", ONE, id="right").is_(200)
    assert ask("raw", server, "double", {"input": [[1.0] * 7]}, id="wrong").is_(400)
    ask("json", server, "moody", {"input": [[-1.0] * 4]}, id="moody 7")
    lines = server.log()
    assert not [line for line in lines if line.get("id") in ("right", "wrong")]
    (line,) = [line for line in lines if line.get("id") == "moody 7"]
    assert "no negative numbers, please" in line["why"]
    assert (line["message"], line["level"]) == ("inference failed", "WARNING")
    assert line["time"]


def test_a_server_without_grpc_ends_when_it_is_told_to(tmp_path):
    config = CONFIG.split("[[models]]")[0] + '[[models]]\nmodel = "own:double"\n'
    with running(tmp_path, config=config, NERCC_GRPC_PORT="none") as server:
        assert server.grpc_port is None
        assert ask("json", server, "own.double", ONE).is_(200)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/v2", trust_env=False)


def test_the_compiled_messages_are_those_of_the_protocols_file(tmp_path):
    protoc = require("grpc_tools.protoc", "serve-test")
    folder = ROOT / "nercc_jax/serving/transport"
    made = tmp_path / "made.binpb"
    options = [f"-I{folder}", f"--descriptor_set_out={made}", "open_inference.proto"]
    assert protoc.main(["protoc", *options]) == 0
    assert made.read_bytes() == (folder / "open_inference.binpb").read_bytes()
