"""Messages: what is read of a request, what is refused, what a reply becomes. Without a server."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import gzip
import json
import math
import zlib

import numpy as np
import pytest
from conftest import require

httpx = require("httpx", "serve-test")
require("fastapi", "serve")

from prometheus_client import CollectorRegistry

from nercc_jax import Uncoded
from nercc_jax.serving import Reply, make_servable
from nercc_jax.serving._metrics import Metrics
from nercc_jax.serving._policy import MAX_DEADLINE_S
from nercc_jax.serving._served_model import ServedModel
from nercc_jax.serving._settings import ModelSettings, read_settings
from nercc_jax.serving.core import _request as errors
from nercc_jax.serving.core._health import Health
from nercc_jax.serving.protocol._errors import INTERNAL, InvalidInput, TooLarge, UnsupportedEncoding
from nercc_jax.serving.protocol._messages import (
    answer_options,
    check_outputs,
    decompress,
    input_types,
    output_types,
    queries_of,
    read_request,
    write_reply,
)
from nercc_jax.serving.transport import open_inference_pb2 as messages
from nercc_jax.serving.transport._grpc import read_message, write_message
from nercc_jax.serving.transport._rest import make_app
from nercc_jax.serving.transport._state import ServerState


def double(x):
    return 2 * x.reshape(len(x), -1)[:, :3]


SERVABLE = make_servable("digits", double, (2, 2))
DATA = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]


def body(data=DATA, shape=(2, 2, 2), name="input", datatype="FP32", **more):
    tensor = {"name": name, "shape": list(shape), "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def binary(raw, shape=(2, 2, 2), size=None, **more):
    """A body with a binary tensor, and the length of its JSON."""
    size = len(raw) if size is None else size
    tensor = {"name": "input", "shape": list(shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + raw, str(len(head))


def read(content, length=None):
    return queries_of(read_request(content, length), SERVABLE)


# Reading.


@pytest.mark.parametrize(
    "data",
    [DATA, np.ravel(DATA).tolist(), [1, 2, 3, 4, 5, 6, 7, 8], [[1, 2], [3.0, 4], [5, 6], [7, 8]]],
    ids=["nested", "flat", "whole numbers", "of another shape"],
)
def test_json_is_read_in_row_major_order(data):
    np.testing.assert_array_equal(read(body(data)), np.array(DATA, np.float32))
    assert read(body(data)).dtype == np.float32


def test_binary_is_read_as_it_is():
    x = np.arange(8, dtype="<f4").reshape(2, 2, 2) / 3
    np.testing.assert_array_equal(read(*binary(x.tobytes())), x)


def test_json_may_come_with_its_length():
    content = body()
    np.testing.assert_array_equal(read(content, str(len(content))), DATA)


@pytest.mark.parametrize("number", [1e-46, 3.4e38, -0.0, 2**53 + 1, 2**64 - 1, -(2**63)])
def test_numbers_are_rounded_to_float32(number):
    np.testing.assert_array_equal(
        read(body([number] * 8)).ravel(), np.full(8, np.float32(number), np.float32)
    )


@pytest.mark.parametrize("number", [1e39, 10**39])
def test_too_large_a_number_is_left_to_the_batcher_which_refuses_what_is_not_finite(number):
    assert np.isinf(read(body([number] * 8))).all()


def test_whole_numbers_beyond_64_bits_are_refused():
    servable = make_servable("digits", double, (2,), datatype="INT64")
    content = body([2**64, 1], (1, 2), datatype="INT64")
    with pytest.raises(InvalidInput, match="not all of it are whole numbers"):
        queries_of(read_request(content, None), servable)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        *((b'{"inputs": [%s]}' % number, "not JSON") for number in (b"NaN", b"Infinity", b"1e400")),
        (b'{"id": "\xed\xa0\x80", "inputs": []}', "not JSON"),
        (b"[" * 3000 + b"]" * 3000, "not JSON"),
        (b"[]", "should be a valid dictionary"),
        (b"7", "should be a valid dictionary"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": {}}', "inputs: Input should be a valid list"),
        (b'{"inputs": []}', r"not inputs \[\]"),
        (b'{"inputs": [{}]}', "inputs.0.name: Field required"),
        (body(id=7), "id: Input should be a valid string"),
        (body(parameters=[]), "parameters: Input should be a valid dictionary"),
        (body(parameters={"a": None}), "parameters.a"),
        (body(outputs=[{}]), "outputs.0.name: Field required"),
        (body(shape=["two", 2, 2]), "inputs.0.shape.0"),
        (body(shape=[2.5, 2, 2]), "inputs.0.shape.0"),
        (body(data=None), "neither data nor a binary_data_size"),
        (body(data="words"), "inputs.0.data"),
        (body(name="images"), r"takes one input 'input', FP32, of shape \[-1, 2, 2\], not inputs"),
        (body(datatype="FP64"), "not FP64"),
        (body(datatype="BYTES"), "not BYTES"),
        (body(shape=[2, 4]), r"not of shape \[2, 4\]"),
        (body(shape=[8]), r"not of shape \[8\]"),
        (body(shape=[2, 2, 2, 1]), "not of shape"),
        (body(data=[], shape=[0, 2, 2]), r"not of shape \[0, 2, 2\]"),
        (body(shape=[-1, 2, 2]), r"not of shape \[-1, 2, 2\]"),
        (body(shape=[-2, -2, 2]), "not of shape"),
        (body(shape=[3, 2, 2]), r"do not make a tensor of shape \[3, 2, 2\]"),
        (body(shape=[2**40, 2, 2]), "do not make a tensor"),
        (body(shape=[2**70, 2, 2]), "inputs.0.shape.0"),
        (body(data=[]), "do not make a tensor"),
        (body(data=[1, 2, 3]), "do not make a tensor"),
        (body(data=[[1, 2], [3]]), "do not make a tensor"),
        (body(data=[None] * 8), "not all of it are numbers"),
        (body(data=[1.0] * 7 + [None]), "not all of it are numbers"),
        (body(data=["1"] * 8), "not all of it are numbers"),
        (body(data=[1.0] * 7 + ["1"]), "not all of it are numbers"),
        (body(data=[True] * 8), "not all of it are numbers"),
        (body(data=[{}] * 8), "not all of it are numbers"),
        # Nonsense without end, of which only the first part is looked at.
        (body(shape=[9] * 10**5), "inputs.0.shape: List should have at most 64 items"),
        (body(shape=["x"] * 10**5), "inputs.0.shape.0: Input should be a valid integer"),
        (body(outputs=[{"name": "x"}] * 10**4), "outputs: List should have at most 1024 items"),
        (body(outputs=[{}] * 10**5), "outputs.0.name: Field required"),
        (body(parameters=dict.fromkeys(map(str, range(65)))), "65 parameters; at most 64"),
        (b'{"inputs": [' + b"{}," * 10**5 + b"{}]}", "inputs.0.name: Field required"),
        (body(data=json.loads("[" * 200 + "]" * 200)), "do not make a tensor"),
        (b'{"inputs": [' + b",".join([body()[12:-2]] * 2) + b"]}", "not inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_request_is_refused(content, message):
    with pytest.raises(InvalidInput, match=message):
        read(content)


@pytest.mark.parametrize(
    "length",
    ["", "-1", "1.5", "0x10", "ten", "+5", " 5", "²", "٣", "9" * 6, "9" * 5000],
)
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(InvalidInput, match="Inference-Header-Content-Length"):
        read(body(), length)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_length_that_is_not_that_of_the_json_is_refused(wrong):
    content, length = binary(bytes(32))
    with pytest.raises(InvalidInput, match=r"not JSON|left"):
        read(content, str(int(length) + wrong))


@pytest.mark.parametrize(
    ("sent", "size", "shape", "message"),
    [
        (28, 28, (2, 2, 2), "takes 32 bytes of FP32, but 28 came"),
        (36, 36, (2, 2, 2), "takes 32 bytes of FP32, but 36 came"),
        (0, 0, (2, 2, 2), "takes 32 bytes of FP32, but 0 came"),
        (32, 32, (2**62, 2, 2), "bytes of FP32, but 32 came"),
        (28, 32, (2, 2, 2), "does not fit the 28 bytes"),
        (32, 28, (2, 2, 2), "4 bytes are left over"),
        (32, -4, (2, 2, 2), "binary_data_size -4 does not fit"),
        (32, True, (2, 2, 2), "binary_data_size True does not fit"),
        (32, 32.0, (2, 2, 2), "binary_data_size 32.0 does not fit"),
        (32, "32", (2, 2, 2), "binary_data_size '32' does not fit"),
        (32, 2**70, (2, 2, 2), "does not fit"),
    ],
)
def test_binary_data_of_the_wrong_size_are_refused(sent, size, shape, message):
    with pytest.raises(InvalidInput, match=message):
        read(*binary(bytes(sent), shape, size))


def test_binary_data_without_their_header_are_no_json():
    content, _ = binary(np.ones(8, "<f4").tobytes())
    with pytest.raises(InvalidInput, match="not JSON"):
        read(content)


# Compression.


@pytest.mark.parametrize(
    ("encoding", "squeeze"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)],
)
@pytest.mark.parametrize("content", [body(), bytes(3 * 2**20)], ids=["one piece", "pieces"])
def test_bodies_are_decompressed(encoding, squeeze, content):
    assert b"".join(decompress(squeeze(content), encoding, len(content))) == content


@pytest.mark.parametrize("squeeze", [gzip.compress, zlib.compress])
def test_a_body_that_expands_beyond_the_limit_is_refused(squeeze):
    bomb = squeeze(bytes(10**7))
    assert len(bomb) < 10**5
    with pytest.raises(TooLarge, match="more than 100000 bytes when decompressed"):
        list(decompress(bomb, "gzip", 10**5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"words", "is not gzip"),
        (b"", "ends too early"),
        (gzip.compress(bytes(1000))[:-1], "ends too early"),
        (gzip.compress(bytes(1000)) + b"more", "bytes after"),
    ],
    ids=["words", "nothing", "cut off", "with more"],  # gzip writes the time
)
def test_what_is_not_gzip_is_refused(content, message):
    with pytest.raises(InvalidInput, match=message):
        list(decompress(content, "gzip", 10**6))


def test_an_unknown_encoding_is_refused():
    with pytest.raises(UnsupportedEncoding, match="'br': gzip and deflate are known"):
        list(decompress(b"", "br", 10))


# Parameters.


def asked(**parameters):
    return read_request(body(parameters=parameters), None)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {}),
        ({"nercc_exact": True}, {"exact": True}),
        ({"nercc_exact": False, "binary_data_output": True}, {}),
        ({"nercc_deadline_ms": 250}, {"deadline": 0.25}),
        ({"nercc_deadline_ms": 0.5}, {"deadline": 0.0005}),
        ({"timeout": 250_000}, {"deadline": 0.25}),
        ({"timeout": 0}, {}),  # Triton's clients say so for none
        ({"timeout": 9_000_000, "nercc_deadline_ms": 250}, {"deadline": 0.25}),
        ({"nercc_deadline_ms": 3_600_000}, {"deadline": MAX_DEADLINE_S}),
        ({"timeout": 3_600_000_000}, {"deadline": MAX_DEADLINE_S}),
        ({"priority": 1}, {"high": True}),
        ({"priority": 2}, {}),
        ({"priority": 0}, {}),  # Triton's for the default
    ],
)
def test_deadline_exactness_and_priority(parameters, expected):
    usual = {"deadline": None, "exact": False, "high": False}
    assert answer_options(asked(**parameters)) == usual | expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"nercc_exact": "true"}, "nercc_exact must be a boolean, not 'true'"),
        ({"nercc_exact": 1}, "nercc_exact must be a boolean, not 1"),
        ({"nercc_deadline_ms": 0}, "nercc_deadline_ms must be a positive number"),
        ({"nercc_deadline_ms": -5}, "must be a positive number"),
        ({"nercc_deadline_ms": True}, "must be a positive number"),
        ({"nercc_deadline_ms": "250"}, "must be a positive number"),
        ({"nercc_deadline_ms": 1e300}, "must be a positive number"),
        ({"nercc_deadline_ms": 9e14}, "nercc_deadline_ms must be .* up to 3600000, an hour"),
        ({"timeout": 3_600_000_001}, "timeout must be .* up to 3600000000, an hour"),
        ({"timeout": -1}, "timeout must be a positive number"),
        ({"priority": 3}, r"priority must be 1 \(high\) or 2 \(as usual\), not 3"),
        ({"priority": -1}, "priority must be 1"),
        ({"priority": True}, "priority must be 1"),
        ({"priority": "high"}, "priority must be 1"),
        ({"nercc_deadline": 1}, r"a request has no parameters \['nercc_deadline'\], only"),
    ],
)
def test_parameters_of_the_wrong_kind_are_refused(parameters, message):
    with pytest.raises(InvalidInput, match=message):
        answer_options(asked(**parameters))


NAMED = {"name": "logits"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parameters": {"binary_data_output": "yes"}}, "must be a boolean, not 'yes'"),
        ({"parameters": {"binary_data_output": 1}}, "must be a boolean, not 1"),
        ({"outputs": [NAMED | {"parameters": {"binary_data": "yes"}}]}, "must be a boolean"),
        ({"outputs": [NAMED | {"parameters": {"classification": 3}}]}, "no parameters .'classif"),
    ],
)
def test_what_would_be_ignored_is_refused(more, message):
    with pytest.raises(InvalidInput, match=message):
        read_request(body(**more), None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": [True, *[1.0] * 7]}, "not all of it are numbers"),
        ({"parameters": {"shared_memory_region": "a"}}, "no parameters .'shared_memory_region'"),
        ({"parameters": {"binary_data_size": 0}}, "has both data and a binary_data_size"),
    ],
)
def test_inputs_that_would_be_taken_for_others_are_refused(more, message):
    tensor = {"name": "input", "shape": [2, 2, 2], "datatype": "FP32", "data": [0.5] * 8} | more
    with pytest.raises(InvalidInput, match=message):
        read(json.dumps({"inputs": [tensor]}).encode())


def test_grpc_refuses_what_would_be_ignored():
    for tensors in ("inputs", "outputs"):
        request = messages.ModelInferRequest(model_name="digits")
        request.inputs.add(name="input", datatype="FP32", shape=[2, 2, 2])
        request.outputs.add(name="logits")
        getattr(request, tensors)[0].parameters["classification"].int64_param = 3
        with pytest.raises(InvalidInput, match=r"no parameters \['classification'\]"):
            read_message(request)


def by_grpc(raw=None, outputs=(), **parameters):
    """A gRPC request, with a parameter for each keyword, as its message has them."""
    request = messages.ModelInferRequest(model_name="digits", id="7")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[2, 2, 2])
    if raw is None:
        tensor.contents.fp32_contents.extend(np.ravel(DATA).tolist())
    else:
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=name)
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], kind, value)
    return read_message(request)


def test_grpc_parameters_are_unwrapped():
    parameters = {"nercc_deadline_ms": ("int64_param", 250), "priority": ("int64_param", 1)}
    request = by_grpc(nercc_exact=("bool_param", True), **parameters)
    assert answer_options(request) == {"deadline": 0.25, "exact": True, "high": True}


def test_grpc_parameters_of_kinds_that_only_triton_knows_are_read():
    """`double_param` and `uint64_param`, which its client takes for priorities."""
    known = {"nercc_deadline_ms": ("double_param", 0.5), "priority": ("uint64_param", 1)}
    expected = {"deadline": 0.0005, "exact": False, "high": True}
    assert answer_options(by_grpc(**known)) == expected
    wire = messages.ModelInferRequest()
    wire.parameters["nercc_deadline_ms"].MergeFromString(b"\x21" + np.float64(0.5).tobytes())
    wire.parameters["priority"].MergeFromString(b"\x28\x01")
    assert answer_options(read_message(wire)) == expected
    wire.parameters["nercc_exact"].MergeFromString(b"\x3a\x01a")  # nobody's kind
    with pytest.raises(InvalidInput, match="nercc_exact must be a boolean, not None"):
        answer_options(read_message(wire))


@pytest.mark.parametrize("raw", [None, np.array(DATA, "<f4").tobytes()], ids=["typed", "raw"])
def test_grpc_tensors_are_read(raw):
    np.testing.assert_array_equal(queries_of(by_grpc(raw), SERVABLE), DATA)


# Outputs.


@pytest.mark.parametrize("names", [["nothing"], ["output", "nothing"], ["output", "output"]])
def test_outputs_that_are_not_there_are_refused(names):
    request = read_request(body(outputs=[{"name": name} for name in names]), None)
    with pytest.raises(InvalidInput, match=r"has outputs \['output', 'exact', "):
        check_outputs(request, SERVABLE)


def test_a_batch_that_would_never_fit_is_refused():
    assert len(queries_of(read_request(body(), None), SERVABLE, 2)) == 2
    with pytest.raises(TooLarge, match="2 queries in one request; the queue of digits holds 1"):
        queries_of(read_request(body(), None), SERVABLE, 1)


def test_metadata_names_what_goes_in_and_out():
    assert input_types(SERVABLE) == [{"name": "input", "datatype": "FP32", "shape": [-1, 2, 2]}]
    assert output_types(SERVABLE) == [
        {"name": "output", "datatype": "FP32", "shape": [-1, 3]},
        {"name": "exact", "datatype": "BOOL", "shape": [-1]},
        {"name": "expected_disagreement", "datatype": "FP32", "shape": [-1]},
        {"name": "expected_error", "datatype": "FP32", "shape": [-1]},
    ]


VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def reply(disagreement=(0.0, 0.25), error=(0.0, 1.5)):
    return Reply(
        VALUES,
        np.array([True, False]),
        np.array([False, True]),
        np.array([True, False]),
        np.array([True, False]),
        np.array([1, 8]),
        np.array([1, 6]),
        np.array(disagreement),
        np.array(error),
        queued=0.25,
        seconds=0.5,
    )


def rest(**more):
    request = read_request(body(**more), None)
    return write_reply(reply(), request, SERVABLE)


def test_a_reply_in_json():
    content, headers = rest(id="mine")
    assert headers["content-type"] == "application/json"
    answer = json.loads(content)
    assert answer["id"] == "mine"
    assert (answer["model_name"], answer["model_version"]) == ("digits", "1")
    assert [output["name"] for output in answer["outputs"]] == [
        "output", "exact", "expected_disagreement", "expected_error",
    ]  # fmt: skip
    values, exact, disagreement, error = answer["outputs"]
    assert (values["shape"], values["datatype"], values["data"]) == (
        [2, 3], "FP32", VALUES.ravel().tolist(),
    )  # fmt: skip
    assert (exact["datatype"], exact["data"]) == ("BOOL", [True, False])
    assert (disagreement["data"], error["data"]) == ([0.0, 0.25], [0.0, 1.5])
    assert answer["parameters"] == {
        "nercc_exact": False,
        "nercc_approximate": 1,
        "nercc_predicted": 1,
        "nercc_reexecuted": 1,
        "nercc_suspicious": 1,
        "nercc_workers_asked": 9,
        "nercc_workers_responded": 7,
        "nercc_expected_disagreement": 0.25,
        "nercc_expected_error": 1.5,
        "nercc_queue_ms": 250.0,
    }


def test_a_request_without_an_id_gets_one_of_its_own():
    first, second = (json.loads(rest()[0])["id"] for _ in range(2))
    assert first
    assert second
    assert first != second


def test_what_is_not_known_is_minus_one():
    request = read_request(body(), None)
    unknown = reply((0.0, math.nan), (0.0, math.nan))
    answer = json.loads(write_reply(unknown, request, SERVABLE)[0])
    assert answer["outputs"][2]["data"] == [0.0, -1.0]
    assert answer["parameters"]["nercc_expected_error"] == 0.0  # the largest that is known


def parts(content, headers):
    """A binary answer's outputs, by name: bytes, or the data in JSON."""
    length = int(headers["inference-header-content-length"])
    found, rest_of_it = {}, content[length:]
    for output in json.loads(content[:length])["outputs"]:
        if "data" in output:
            found[output["name"]] = output["data"]
        else:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]], rest_of_it = rest_of_it[:size], rest_of_it[size:]
    assert not rest_of_it
    return found


def test_a_reply_in_binary():
    content, headers = rest(parameters={"binary_data_output": True})
    assert headers["content-type"] == "application/octet-stream"
    found = parts(content, headers)
    assert found["output"] == VALUES.astype("<f4").tobytes()
    assert found["exact"] == b"\x01\x00"
    assert len(found) == 4


@pytest.mark.parametrize("usual", [None, False, True])
def test_outputs_say_each_whether_they_are_binary(usual):
    """The extension's rule: an output's own word, otherwise the request's, otherwise JSON."""
    response = {} if usual is None else {"parameters": {"binary_data_output": usual}}
    outputs = [
        {"name": "expected_error", "parameters": {"binary_data": False}},
        {"name": "output"},
        {"name": "exact", "parameters": {"binary_data": True}},
    ]
    found = parts(*rest(outputs=outputs, **response))
    assert list(found) == ["expected_error", "output", "exact"]
    assert found["exact"] == b"\x01\x00"
    assert found["expected_error"] == [0.0, 1.5]
    assert isinstance(found["output"], bytes if usual else list)


def test_a_reply_by_grpc():
    request = by_grpc(outputs=["exact", "output"])
    answer = write_message(reply(), request, SERVABLE)
    assert [output.name for output in answer.outputs] == ["exact", "output"]
    assert list(answer.raw_output_contents) == [b"\x01\x00", VALUES.astype("<f4").tobytes()]
    assert answer.id == "7"
    assert answer.parameters["nercc_exact"].bool_param is False
    assert answer.parameters["nercc_workers_asked"].int64_param == 9
    assert float(answer.parameters["nercc_expected_error"].string_param) == 1.5


# The application, without a socket.


class Fails(ServedModel):
    """A model that does."""

    servable, settings = SERVABLE, ModelSettings(model="digits")

    def __init__(self, error):
        self.error, self.refused = error, []
        self.is_well = Health(True, True)

    def health(self):
        return self.is_well

    async def infer(self, queries, **demanded):
        raise self.error

    def count(self, refusal):
        self.refused.append(refusal)


def state_of(model, **response):
    return ServerState({"digits": model}, read_settings(None, **response))


def call(state, method, path, **options):
    async def main():
        app = make_app(state, CollectorRegistry())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidInput("a reason"), 400),
        (errors.QueueFull("a reason"), 429),
        (errors.InferenceFailed("a reason"), 502),
        (errors.ServerClosing("a reason"), 503),
        (errors.DeadlineExceeded("a reason"), 504),
    ],
)
def test_errors_are_statuses_with_their_reason(error, status):
    model = Fails(error)
    answer = call(state_of(model), "POST", "/v2/models/digits/infer", content=body())
    assert answer.status_code == status
    by_id = ": the server's log says why, by id " if status == 502 else ""
    assert answer.json()["error"].startswith(f"a reason{by_id}")
    assert answer.headers.get("retry-after") == ("1" if status in (429, 503) else None)
    assert model.refused == ["request_invalid"] * (status == 400)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "GET /nothing: Not Found"),
        ("POST", "/v2/models/digits/nothing", 404, "POST /v2/models/digits/nothing: Not Found"),
        ("GET", "/v2/models/digits/infer", 405, "GET /v2/models/digits/infer: Method Not Allowed"),
        ("DELETE", "/v2", 405, "DELETE /v2: Method Not Allowed"),
        ("PUT", "/metrics", 405, "PUT /metrics: Method Not Allowed"),
    ],
)
def test_ways_that_there_are_not_are_errors_of_the_protocol(method, path, status, words):
    answer = call(state_of(Fails(RuntimeError())), method, path)
    assert (answer.status_code, answer.json()) == (status, {"error": words})
    assert answer.headers["content-type"] == "application/json"
    if status == 405:
        assert answer.headers["allow"]


def test_what_nobody_expected_is_an_error_of_the_protocol_and_is_logged():
    """The application raises it, for the server around it to log."""
    response = []

    async def main():
        app = make_app(state_of(Fails(KeyError("a bug"))), CollectorRegistry())

        async def logged(scope, receive, send):
            try:
                await app(scope, receive, send)
            except Exception as error:
                response.append(error)

        transport = httpx.ASGITransport(logged)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v2/models/digits/infer", content=body())

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()) == (500, {"error": INTERNAL})
    assert answer.headers["content-type"] == "application/json"
    assert [repr(error) for error in response] == ["KeyError('a bug')"]


class Remembers(Fails):
    """A model that keeps what it was asked."""

    def __init__(self):
        super().__init__(None)
        self.asked = []

    async def infer(self, queries, **demanded):
        self.asked.append((queries, demanded))
        return reply()


def test_a_model_is_asked_in_plain_words_and_its_reply_becomes_a_message():
    model = Remembers()
    path = "/v2/models/digits/infer"
    content = body(parameters={"nercc_exact": True, "nercc_deadline_ms": 250}, id="mine")
    answer = call(state_of(model), "POST", path, content=content)
    ((queries, demanded),) = model.asked
    np.testing.assert_array_equal(queries, DATA)
    assert demanded == {"deadline": 0.25, "exact": True, "high": False}
    assert (answer.json()["id"], answer.json()["outputs"][0]["data"]) == ("mine", [*range(6)])
    wrong = body(parameters={"nercc_exact": 1})
    assert call(state_of(model), "POST", path, content=wrong).status_code == 400
    assert len(model.asked) == 1


class Waits(Fails):
    """A model that answers nobody, and says who has come and gone."""

    def __init__(self):
        super().__init__(None)
        self.response = []

    async def infer(self, queries, **demanded):
        self.response.append("came")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.response.append("gone")
            raise


def test_a_client_that_goes_away_while_it_waits_is_not_computed_for():
    model = Waits()

    async def main():
        app = make_app(state_of(model), CollectorRegistry())
        parts = [{"type": "http.request", "body": body()}, {"type": "http.disconnect"}]
        path = "/v2/models/digits/infer"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
        scope |= {"headers": [], "query_string": b"", "http_version": "1.1", "scheme": "http"}

        async def receive():
            while len(parts) == 1 and model.response != ["came"]:
                await asyncio.sleep(0)
            return parts.pop(0)

        sent = []

        async def send(part):
            sent.append(part)

        await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(main()) == 499
    assert model.response == ["came", "gone"]


def test_a_server_that_drains_says_so_everywhere():
    state = state_of(Fails(RuntimeError()))
    assert call(state, "GET", "/v2/health/ready").status_code == 200
    assert call(state, "GET", "/v2/models/digits/ready").status_code == 200
    state.draining = True
    for path in ("/v2/health/ready", "/v2/models/digits/ready"):
        assert call(state, "GET", path).status_code == 503
    assert call(state, "GET", "/v2/health/live").json() == {"live": True}


def test_both_faces_tell_health():
    model = Fails(RuntimeError())
    state = state_of(model)
    model.is_well = Health(True, False, "no worker is ready")
    assert call(state, "GET", "/v2/health/ready").status_code == 503
    response = call(state, "GET", "/v2/models/digits/ready")
    assert response.status_code == 503
    assert "no worker is ready" in response.json()["error"]
    assert call(state, "GET", "/v2/health/live").status_code == 200
    assert not state.ready()  # what gRPC's face asks
    model.is_well = Health(False, False, "the batcher is stuck")
    response = call(state, "GET", "/v2/health/live")
    assert response.status_code == 503
    assert "stuck" in response.json()["error"]


def test_a_model_that_is_closed_refuses_with_503_and_counts_it():
    registry = CollectorRegistry()
    settings = ModelSettings(scheme="uncoded", workers=1, max_batch_size=1)
    model = ServedModel(SERVABLE, Uncoded(1), settings, Metrics(registry))
    x = np.array(DATA, np.float32)
    np.testing.assert_array_equal(asyncio.run(model.infer(x)).values, double(x))
    model.close(0.0)
    answer = call(state_of(model), "POST", "/v2/models/digits/infer", content=body())
    assert answer.status_code == 503
    assert "shutting down" in answer.json()["error"]

    def counted(outcome):
        return registry.get_sample_value(
            "nercc_requests_total", {"model": "digits", "outcome": outcome}
        )

    assert (counted("ok"), counted("draining"), counted("invalid")) == (1, 1, 0)
