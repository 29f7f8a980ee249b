"""Triton's clients, by REST and by gRPC, and what a coded server adds to answers."""

import numpy as np
import pytest
import triton_calls
from conftest import require
from faces import ask
from nercc_server import ENDS, running

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("starlette", "serve")
require("tritonclient", "serve-test")

pytestmark = pytest.mark.slow

CONFIG = """
[defaults]
input_shape = [4]
num_data = 2
num_workers = 4
max_batch_size = 2
[[models]]
model = "own:double"
name = "double"
max_disagreement = 0
[[models]]
model = "own:double"
name = "rack"
max_batch_size = 1
outputs = "logits"
max_disagreement = 1
faults = {straggler_rate = 0.3, straggler_delay_s = 0.3}
[[models]]
model = "own:double"
name = "slow"
scheme = "uncoded"
workers = 1
max_batch_size = 1
max_queue_size = 100
faults = {service_delay_s = 0.4}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("server"), config=CONFIG) as server:
        yield server


def numbers(count):
    return np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def elsewhere():
    with triton_calls.in_a_process(ENDS) as call:
        yield call


@pytest.fixture(params=["http", "grpc"])
def triton(request, server, elsewhere):
    """Triton's client: `infer` or `ask` with the server's address filled in."""
    address = {"http": f"127.0.0.1:{server.http_port}", "grpc": server.grpc}[request.param]

    def call(function, *arguments, **options):
        return elsewhere(function, request.param, address, *arguments, **options)

    call.face = request.param
    return call


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_triton_gets_right_answers_and_the_outputs_it_asks_for(triton, algorithm, binary):
    """Compressed by gRPC; by HTTP a proxy would have to decompress requests."""
    options = {"request_id": "mine"}
    way = "response_compression_algorithm" if triton.face == "http" else "compression_algorithm"
    options[way] = algorithm
    for count in (1, 50):
        x = numbers(count)
        answer = triton(triton_calls.infer, "double", x, binary=binary, **options)
        assert (answer["id"], answer["version"]) == ("mine", "1")
        np.testing.assert_array_equal(answer["outputs"]["output"], 2 * x[:, :3])
        assert answer["outputs"]["output"].dtype == np.float32
        assert answer["outputs"]["exact"].tolist() == [True] * count
        assert answer["outputs"]["expected_error"].tolist() == [0.0] * count
    asked = {"exact": not binary, "output": binary}
    answers = [triton(triton_calls.infer, "double", numbers(3), outputs=asked) for _ in "12"]
    assert len({answer["id"] for answer in answers}) == 2, "it needs none"
    assert list(answers[0]["outputs"]) == ["exact", "output"]
    np.testing.assert_array_equal(answers[0]["outputs"]["output"], 2 * numbers(3)[:, :3])
    if triton.face == "http":
        assert answers[0]["in_json"] == [name for name, binary in asked.items() if not binary]


def test_triton_learns_what_there_is(triton):
    assert triton(triton_calls.ask, "is_server_live") is True
    assert triton(triton_calls.ask, "is_server_ready") is True
    assert triton(triton_calls.ask, "is_model_ready", "double", "1") is True
    assert triton(triton_calls.ask, "get_server_metadata")["name"] == "nercc_jax"
    about = triton(triton_calls.ask, "get_model_metadata", "double", "1")
    assert (about["name"], about["versions"]) == ("double", ["1"])
    shape = [int(length) for length in about["inputs"][0]["shape"]]  # strings by gRPC's JSON
    assert (about["inputs"][0]["name"], shape) == ("input", [-1, 4])


def test_answers_say_what_they_rest_on(server):
    """Stragglers' queries are decoded, and each says so: output, parameters and metrics agree."""
    decoded = reexecuted = 0
    before = server.status("rack")["totals"]["queries"]["decoded"]  # of other tests
    for _ in range(25):
        answer = ask("json", server, "rack", {"input": (x := numbers(4))})
        found, parameters = answer.outputs, answer.parameters
        exact, doubt = found["exact"], found["expected_disagreement"]
        np.testing.assert_array_equal(found["output"][exact], 2 * x[exact, :3])
        assert np.isfinite(found["output"]).all()
        assert (doubt[exact] == 0).all()
        assert ((doubt == -1) | ((doubt >= 0) & (doubt <= 1))).all()
        assert parameters["nercc_exact"] == exact.all()
        assert parameters["nercc_approximate"] == (~exact).sum()
        assert parameters["nercc_workers_responded"] <= parameters["nercc_workers_asked"]
        decoded += parameters["nercc_approximate"]
        reexecuted += parameters["nercc_reexecuted"]
    assert decoded > 0
    counted = server.status("rack")["totals"]
    assert counted["queries"]["decoded"] == before + decoded
    assert counted["reexecutions"] >= reexecuted
    assert server.count("queries_total", model="rack", answer="decoded") == before + decoded
    assert min(counted["stragglers"], counted["groups"]) > 0
