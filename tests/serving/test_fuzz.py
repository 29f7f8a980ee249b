"""Whatever is sent, the server answers, blames who is to blame, and goes on."""

# ruff: noqa: E402 (`require` comes before what needs it)

import json
import logging

import numpy as np
import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st
from nercc_server import ENDS

grpc = require("grpc", "serve-test")
require("starlette", "serve")

from faces import CODES, ask, message, stub_of
from in_process import ONE, http, real, serving

from nercc_jax import Uncoded
from nercc_jax.serving.transport import open_inference_pb2 as messages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return real("double", lambda x: 2 * x[:, :3], Uncoded(1), max_batch_size=16)


@pytest.fixture(scope="module")
def server(model):
    """Uvicorn warns of what is no HTTP. An error in its log is a request that we failed at."""
    errors = []
    log = logging.Handler(logging.ERROR)
    log.emit = errors.append
    logging.getLogger().addHandler(log)
    with serving(model, grpc_port=0, max_body_bytes=1_000_000) as server:
        yield server
    logging.getLogger().removeHandler(log)
    assert not errors, errors


@pytest.fixture(scope="module")
def client(server):
    with http(server) as client:
        yield client


@pytest.fixture(scope="module")
def stub(server):
    with stub_of(server) as stub:
        yield stub


# Requests that are nearly right.

words = st.sampled_from(["input", "output", "exact", "", "input\0", "ï", "a" * 300])
integers = st.one_of(st.integers(-3, 5), st.sampled_from([2**31, 2**63, 2**64, -(2**63)]))


def overflows(numbers):
    """Return whether the model, which doubles, makes infinity of a finite float32: a 502."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        numbers = np.abs(np.asarray(numbers, float))
    return np.any((numbers >= 2.0**127) & (numbers < 2.0**128))


def binary(max_size):
    """Bytes, which a request may give for float32."""
    fine = st.binary(max_size=max_size)
    return fine.filter(lambda raw: not overflows(np.frombuffer(raw[: len(raw) & -4], "<f4")))


numbers = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not overflows(x))
values = st.one_of(numbers, integers, st.none(), st.booleans(), words)
row_values = st.floats(-(2.0**126), 2.0**126, width=32)
rows = st.lists(row_values, min_size=4, max_size=4)
parameters = st.dictionaries(
    st.sampled_from(
        ["nercc_exact", "nercc_deadline_ms", "binary_data_output", "binary_data_size", "x"]
    ),
    values,
    max_size=3,
)
# What may stand in a tensor in place of what is right.
SPOILED = {
    "name": words,
    "shape": st.lists(integers, max_size=4),
    "datatype": st.sampled_from(["fp32", "FP64", "FP16", "BYTES", "INT8", ""]),
    "data": st.one_of(rows, st.lists(rows, max_size=3), st.lists(values, max_size=9), values),
    "parameters": parameters,
}


@st.composite
def nearly_right(draw):
    """A tensor, of which one part may be spoiled."""
    data = draw(st.lists(rows, min_size=1, max_size=3))
    tensor = {"name": "input", "shape": [len(data), 4], "datatype": "FP32", "data": data}
    for part in draw(st.lists(st.sampled_from(sorted(SPOILED)), max_size=1)):
        tensor[part] = draw(SPOILED[part])
    return tensor


one = nearly_right().map(lambda tensor: [tensor])
requests = st.fixed_dictionaries(
    {"inputs": one | one | st.lists(nearly_right(), max_size=2)},
    optional={
        "id": words,
        "parameters": parameters,
        "outputs": st.lists(st.fixed_dictionaries({"name": words}), max_size=3),
    },
)
# 504: a deadline of milliseconds.
FINE = {200, 400, 429, 504}


def check(answer, asked=None):
    assert answer.status_code in FINE, (answer.status_code, answer.text, asked)
    if answer.status_code != 200:
        assert list(answer.json()) == ["error"]
    elif answer.headers["content-type"] == "application/json" and not asked.get("outputs"):
        x = np.array(asked["inputs"][0]["data"], np.float32).reshape(-1, 4)
        found = np.array(answer.json()["outputs"][0]["data"], np.float32)
        doubled = (2 * x[:, :3]).ravel()
        # XLA makes zeros of subnormal numbers.
        np.testing.assert_allclose(found, doubled, rtol=0, atol=np.finfo(np.float32).tiny)


@given(requests)
def test_requests_in_json(client, asked):
    answer = client.post("/v2/models/double/infer", content=json.dumps(asked).encode())
    check(answer, asked)


@given(requests, binary(40), st.sampled_from([0, 0, 0, -1, 1, 10**6, None]))
def test_requests_in_binary(client, asked, raw, shift):
    for tensor in asked["inputs"]:
        data = tensor.pop("data")
        if isinstance(data, list) and np.shape(data) == (1, 4):
            raw = np.array(data, "<f4").tobytes()
        tensor.setdefault("parameters", {}).setdefault("binary_data_size", len(raw))
    head = json.dumps(asked).encode()
    length = "much" if shift is None else str(len(head) + shift)
    message = {"inference-header-content-length": length}
    answer = client.post("/v2/models/double/infer", content=head + raw, headers=message)
    assert answer.status_code in FINE, answer.text


@given(
    st.binary(max_size=200),
    st.sampled_from(["", "gzip", "deflate", "identity", "br", "gzip, gzip"]),
    st.sampled_from(["application/json", "text/plain", "multipart/form-data", "x"]),
)
def test_bodies_of_bytes(client, content, encoding, kind):
    message = {"content-encoding": encoding, "content-type": kind}
    answer = client.post("/v2/models/double/infer", content=content, headers=message)
    assert answer.status_code in (400, 415), answer.text


@given(
    st.sampled_from(["double", "double", "double", "other"]),
    one | st.lists(nearly_right(), max_size=2),
    st.none() | st.lists(binary(20) | st.just(bytes(16)), max_size=2),
    st.lists(st.sampled_from(["output", "exact", "nothing"]), max_size=2),
    st.dictionaries(
        words | st.just("nercc_deadline_ms"), st.booleans() | st.integers(-5, 5), max_size=2
    ),
)
def test_requests_by_grpc(stub, model, inputs, raw, outputs, parameters):
    request = message(model, {}, parameters=parameters, outputs=outputs)
    request.raw_input_contents.extend(raw or ())
    for each in inputs:
        shape = [length for length in each["shape"] if -(2**63) <= length < 2**63]
        tensor = request.inputs.add(name=each["name"], shape=shape, datatype=each["datatype"])
        data = each["data"]
        if raw is None and isinstance(data, list) and np.ndim(data) == 2:
            tensor.contents.fp32_contents.extend(np.ravel(data).tolist())
    call = stub.ModelInfer.future(request, timeout=ENDS)
    code = call.code().name
    assert code in [CODES[status] for status in (200, 400, 404, 504)], (call.details(), request)
    assert call.details() or call.result().model_name == "double"


def test_it_goes_on(server, model):
    assert ask("json", server, "double", ONE).outputs["output"].tolist() == [[2, 4, 6]]
    status = model.status()
    assert status["queue"]["in_flight"] == status["queue"]["waiting"] == 0
    assert {worker["state"] for worker in status["workers"]} == {"idle"}
    assert status["totals"]["queries"]["exact"] > 20
    assert status["totals"]["deaths"] == status["totals"]["errors"]["failed"] == 0


def test_bytes_that_are_no_message(server, stub):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError) as error:
            call(b"\xff" * 50, timeout=ENDS)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert stub.ServerReady(messages.ServerReadyRequest()).ready
