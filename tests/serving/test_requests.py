"""What a request becomes by every face: its answer, or one error that says why; and the next works.

Tables of requests, asked of one server by REST (JSON and binary), gRPC (typed and raw), and Python.
"""

# ruff: noqa: E402 (`require` comes before what needs it)

import itertools
import json
import socket

import numpy as np
import pytest
from attack import post as as_bytes
from conftest import require
from faces import FACES, LONG, Tensor, ask, by_python, content, message, post, stub_of
from in_process import ONE, Doubles, becomes, connect, http, real, serving

grpc = require("grpc", "serve-test")

from prometheus_client import CollectorRegistry

from nercc_jax import NeRCC, Replication, Uncoded
from nercc_jax import serving as public
from nercc_jax.serving import Health, Metrics, Reply
from nercc_jax.serving.transport import open_inference_pb2 as messages

REGISTRY, BODY_LIMIT = CollectorRegistry(), 2_000_000
SIGNS = np.array([1, -1], np.float32)
WORDS = ["BOOL", *(f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)), "FP32"]


def double(x):
    return 2 * x.reshape(len(x), -1)[:, :3]


def moody(x):
    x = np.asarray(x)  # which JAX cannot trace
    if (x < 0).any():
        raise RuntimeError("no negative numbers, please")
    return np.float32(2 * x[:, :3])


def heads(x):
    """Linear, and one head is twice the other: in what is decoded, too."""
    total = x["image"].sum(axis=(1, 2))
    small = total[:, None] + x["meta"]
    return {"small": small, "twice": 2 * small, "total": total[:, None] * SIGNS}


def tokens(x):
    seen = (x["ids"] * x["mask"]).sum(axis=1)
    return {"seen": seen, "scaled": seen * x["scale"]}


@pytest.fixture(scope="module")
def models():
    metrics, one = Metrics(REGISTRY), {"workers": 1, "max_batch_size": 1}
    loose = {"max_disagreement": 1, "workers": 4}
    loose["faults"] = {"straggler_rate": 0.3, "straggler_delay_s": 0.2}
    late = {"service_delay_s": 0.4}

    def make(name, model, code, shape, **options):
        return real(name, model, code, shape, metrics=metrics, **options)

    found = [
        make("double", double, Uncoded(1), (4,)),
        make("slow", double, Uncoded(1), (4,), **one, max_queue_size=4, faults=late),
        make("moody", moody, Uncoded(1), (4,)),
        make(
            *("heads", heads, NeRCC(2, 4, points="interleaved"), {"image": (2, 3), "meta": (4,)}),
            **loose,
            outputs="logits",
        ),
        make(
            *("tokens", tokens, Uncoded(1), {"ids": (5,), "mask": (5,), "scale": ()}),
            datatype="INT64",
        ),
        make("scaled", lambda x: 1e38 * x, Uncoded(1), (3,)),
        make("count", lambda x: (x > 0).sum(1, keepdims=True) * 1.0, Replication(1, 2), (3,),
             datatype="INT8"),
        *(make(word, lambda x: x, Uncoded(1), [(), (3,), (2, 2)][place % 3], datatype=word, **one)
          for place, word in enumerate(WORDS)),
        Doubles(),
    ]  # fmt: skip
    return {each.servable.name: each for each in found}


@pytest.fixture(scope="module")
def server(models):
    with serving(*models.values(), grpc_port=0, max_body_bytes=BODY_LIMIT) as server:
        yield server


@pytest.fixture
def told(models):
    """The model that answers as it is told."""
    yield models["digits"]
    models["digits"].error = models["digits"].reply = None


def counted(name, model, **labels):
    return REGISTRY.get_sample_value(f"nercc_{name}_total", {"model": model, **labels})


# Answers.


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("count", [1, 3, 100])
def test_answers_are_the_models_own_and_in_order(server, face, count):
    x = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)
    answer = ask(face, server, "double", {"input": x}, id="mine")
    np.testing.assert_array_equal(answer.outputs["output"], 2 * x[:, :3])
    assert (answer.id, answer.version) == ("mine", "1")
    assert answer.outputs["exact"].tolist() == [True] * count


def body(data=ONE["input"], shape=(1, 4), name="input", datatype="FP32", **more):
    tensor = {"name": name, "shape": list(shape), "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


RAW = np.array(ONE["input"], "<f4").tobytes()


def binary(raw=RAW, shape=(1, 4), size=None, shift=0):
    """A body with a binary tensor, and a header with the length of its JSON."""
    tensor = {"name": "input", "shape": list(shape), "datatype": "FP32"}
    tensor["parameters"] = {"binary_data_size": len(raw) if size is None else size}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + raw, {"inference-header-content-length": str(len(head) + shift)}


def packed(kind):
    return body(), {"content-encoding": kind}


def length(text):
    return body(), {"inference-header-content-length": text}


@pytest.mark.parametrize(
    "given",
    [
        body(),
        body([1, 2, 3, 4]),
        body([[1, 2], [3.0, 4]]),
        (body(), {"content-type": "text/plain"}),
        packed("Identity"),
        length(str(len(body()))),
        binary(),
        (iter((body()[:20], body()[20:])), {}),  # without a length
    ],
    ids=itertools.count(),
)
def test_bodies_come_in_many_ways(server, given):
    data, headers = given if isinstance(given, tuple) else (given, {})
    answer = post(server, "/v2/models/double/infer", content=data, headers=headers)
    assert answer.json()["outputs"][0]["data"] == [2, 4, 6]
    assert answer.headers["content-type"] == "application/json"


def pictures(number, seed=0):
    rng = np.random.default_rng(seed)
    image, meta = rng.normal(size=(number, 2, 3)), rng.normal(size=(number, 4))
    return {"meta": meta.astype(np.float32), "image": image.astype(np.float32)}


@pytest.mark.parametrize("face", FACES)
def test_several_inputs_and_outputs_exact_and_decoded(server, models, face):
    """Each answer says what it rests on: outputs, parameters, metrics and status agree."""
    x = pictures(3)
    found = ask(face, server, "heads", x, parameters={"nercc_exact": True}).outputs
    assert found["exact"].all()
    for name, each in heads(x).items():
        np.testing.assert_allclose(found[name], each, rtol=1e-5)
    decoded = reexecuted = 0
    before, earlier = counted("queries", "heads", answer="decoded"), models["heads"].status()
    for seed in range(100):
        x = pictures(2, seed)
        answer = ask(face, server, "heads", x)
        found, parameters = answer.outputs, answer.parameters
        np.testing.assert_allclose(found["twice"], 2 * found["small"], rtol=1e-4, atol=1e-4)
        assert found["total"].shape == (2, 2)
        assert np.isfinite(found["total"]).all()
        exact, doubt = found["exact"], found["expected_disagreement"]
        np.testing.assert_allclose(found["total"][exact], heads(x)["total"][exact], rtol=1e-5)
        assert (doubt[exact] == 0).all()
        assert ((doubt == -1) | ((doubt >= 0) & (doubt <= 1))).all()
        assert parameters["nercc_exact"] == exact.all()
        assert parameters["nercc_approximate"] == (~exact).sum()
        assert parameters["nercc_workers_responded"] <= parameters["nercc_workers_asked"]
        decoded += parameters["nercc_approximate"]
        reexecuted += parameters["nercc_reexecuted"]
        if decoded:
            break
    assert 0 < decoded == counted("queries", "heads", answer="decoded") - before
    totals, earlier = models["heads"].status()["totals"], earlier["totals"]
    assert totals["queries"]["decoded"] - earlier["queries"]["decoded"] == decoded
    assert totals["reexecutions"] - earlier["reexecutions"] >= reexecuted
    assert min(totals["stragglers"], totals["groups"]) > 0


@pytest.mark.parametrize("face", FACES)
def test_every_datatype_comes_and_goes(server, face):
    """Whole numbers of 64 bits as far as 32 bits have them, in which JAX computes."""
    rng = np.random.default_rng(0)
    for word in WORDS:
        with http(server) as client:
            about = client.get(f"/v2/models/{word}").json()
        shape = (5, *about["inputs"][0]["shape"][1:])
        if word in ("BOOL", "FP32"):
            drawn = rng.normal(size=shape)
            x = drawn > 0 if word == "BOOL" else drawn.astype(np.float32)
        else:
            limits = np.iinfo(word.lower().replace("64", "32"))
            x = rng.integers(limits.min, limits.max, shape, np.int64, endpoint=True)
            x.flat[:2] = limits.min, limits.max
            x = x.astype(word.lower())
        found = ask(face, server, word, {"input": x}, {"input": word}).outputs
        assert about["outputs"][0]["datatype"] == word.replace("64", "32")
        np.testing.assert_array_equal(found["output"], x)


# Refusals.

DIGITS = body()[12:-2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        *((b'{"inputs": [%s]}' % number, "not JSON") for number in (b"NaN", b"Infinity", b"1e400")),
        (b'{"id": "\xed\xa0\x80", "inputs": []}', "not JSON"),
        (b"[" * 3000 + b"]" * 3000, "not JSON"),
        (b"7", "should be a dictionary"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": {}}', "inputs: Input should be a valid list"),
        (b'{"inputs": [{}]}', "inputs.0.name: Field required"),
        (body(id=7), "id: Input should be a valid string"),
        (body(parameters=[]), "parameters: Input should be a valid dictionary"),
        (body(parameters={"a": None}), "parameters.a"),
        (body(outputs=[{}]), "outputs.0.name: Field required"),
        (body(shape=["two", 4]), "inputs.0.shape.0"),
        (body(shape=[2.5, 4]), "inputs.0.shape.0"),
        (body(shape=[2**70, 4]), "inputs.0.shape.0"),
        (body(data=None), "neither data nor a binary_data_size"),
        (body(data="words"), "inputs.0.data"),
        (body(shape=[-1, 4]), "not of shape [-1, 4]"),
        (body(shape=[2**40, 4]), "do not make a tensor"),
        (body(data=[[1, 2, 3], [4]]), "do not make a tensor"),
        (body(data=json.loads("[" * 200 + "]" * 200)), "do not make a tensor"),
        *((body([1.0, 2, 3, odd]), "not all of it are numbers") for odd in (None, "1", True, {})),
        (body([[2**64]], (1, 1), datatype="INT64"), "not INT64"),
        # Nonsense without end, of which only the first part is looked at.
        (body(shape=[9] * 10**5), "inputs.0.shape: List should have at most 64 items"),
        (body(shape=["x"] * 10**5), "inputs.0.shape.0: Input should be a valid integer"),
        (body(outputs=[{"name": "x"}] * 10**4), "outputs: List should have at most 1024 items"),
        (body(outputs=[{}] * 10**5), "outputs.0.name: Field required"),
        (body(parameters=dict.fromkeys(map(str, range(65)))), "65 parameters; at most 64"),
        (b'{"inputs": [' + b"{}," * 10**5 + b"{}]}", "inputs.0.name: Field required"),
        (b'{"inputs": [' + b",".join([DIGITS] * 2) + b"]}", "not inputs"),
        # What would be ignored, or taken for something else.
        (body(parameters={"binary_data_output": "yes"}), "must be a boolean, not 'yes'"),
        (body(outputs=[{"name": "output", "parameters": {"binary_data": 1}}]), "must be a boolean"),
        (body(outputs=[{"name": "output", "parameters": {"class": 3}}]), "no parameters ['class"),
        (body()[:-3] + b', "parameters": {"shared_memory_region": "a"}}]}', "no parameters ['sh"),
        (body()[:-3] + b', "parameters": {"binary_data_size": 0}}]}', "both data and a b"),
        *(
            (length(text), "Inference-Header-Content-Length")
            for text in ("", "-1", "1.5", "0x10", "ten", "+5", "9" * 6, "9" * 5000)
        ),
        (length("7"), "not JSON"),
        (binary(shift=-1), "not JSON"),
        (binary(shift=1), "not JSON"),
        (binary()[0], "not JSON"),
        (binary(bytes(12)), "takes 16 bytes of FP32, but 12 came"),
        (binary(bytes(20)), "takes 16 bytes of FP32, but 20 came"),
        (binary(shape=(2**62, 4)), "bytes of FP32, but 16 came"),
        (binary(bytes(12), size=16), "does not fit the 12 bytes"),
        (binary(size=12), "4 bytes are left over"),
        *((binary(size=size), f"_size {size!r} does not fit") for size in (-4, True, "16")),
        # Of a model that takes INT8.
        (body([1, 2.5, 3], (1, 3), datatype="INT8"), "not all of it are whole numbers"),
        (body([2**64, 2, 3], (1, 3), datatype="INT8"), "not all of it are whole numbers"),
        (body([1, 2, 300], (1, 3), datatype="INT8"), "numbers beyond int8"),
        (packed("br"), "'br': send the body as it is, or let a proxy decompress it"),
        (packed("gzip"), "'gzip': send the body as it is"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_bodies_that_are_no_requests(server, given, words):
    data, headers = given if isinstance(given, tuple) else (given, {})
    model = "count" if b"INT8" in data else "double"
    answer = post(server, f"/v2/models/{model}/infer", content=data, headers=headers)
    status = 415 if "content-encoding" in headers else 400
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert words in answer.json()["error"]
    assert len(answer.text) < 1000, "it echoes what was sent"


X, IDS = pictures(2), {"ids": np.ones((2, 5), int), "mask": np.ones((2, 5), int)}
IDS["scale"] = np.ones(2, int)
TAKES = "takes inputs 'image', FP32, of shape [-1, 2, 3]; 'meta', FP32, of shape [-1, 4], not "
BYTE = {"input": Tensor([[1, 2, 3]], (1, 3), "INT8")}
ODD = {**X, "meta": X["meta"] + [[0], [np.nan]]}
LARGE = {**IDS, "ids": IDS["ids"] << 31}
LATE = "not answered within 0.05 s"
FAILED = "no answer: 3 workers failed: the server's log says why, by id 7"
INFINITE = "the last: the model's output 'output' is not finite"
DEADLINE = "nercc_deadline_ms must be a positive number up to 3600000, an hour"


def refused(model, inputs, status, words, python=None, *, outputs=(), version="", id="", **given):
    """A request, how it is refused, and by which error in Python, unless it cannot come there."""
    inputs = inputs if isinstance(inputs, dict) else {"input": inputs}
    more = {"outputs": outputs, "version": version, "id": id, "parameters": given}
    return model, inputs, {key: each for key, each in more.items() if each}, status, words, python


@pytest.mark.parametrize(
    ("model", "inputs", "more", "status", "words", "python"),
    [
        refused("double", Tensor([1, 2, 3, 4], (2, 4)), 400, "do not make a tensor | 32 bytes"),
        refused("double", Tensor([1, 2, 3], (1, 4)), 400, "do not make a tensor | 16 bytes"),
        refused("double", [1.0, 2, 3, 4], 400, "not of shape [4]", "ValueError"),
        refused("double", Tensor([], (0, 4)), 400, "not of shape [0, 4]"),
        refused("double", [[1.0, 2, 3, 1e39]], 400, "queries [0] are not finite in", "ValueError"),
        refused("double", Tensor([[1, 2, 3, 4]], (1, 4), "FP64"), 400, "not FP64"),
        refused("double", Tensor([[1, 2, 3, 4]], (1, 4), "INT8"), 400, "not INT8"),
        refused("double", {"images": ONE["input"]}, 400, "not inputs ['images']"),
        refused("double", {}, 400, "not inputs []"),
        refused("double", ONE, 400, "each once, not ['nothing']", outputs=["nothing"]),
        refused("double", ONE, 400, "each once", outputs=["exact", "exact"]),
        refused("double", ONE, 400, "must be a boolean, not 'yes'", nercc_exact="yes"),
        refused("double", ONE, 400, "must be a boolean, not 1", nercc_exact=1),
        refused("double", ONE, 400, "no parameters ['nercc_deadline'],", nercc_deadline=1),
        *(
            refused("double", ONE, 400, DEADLINE, nercc_deadline_ms=value)
            for value in (0, -5, True, "250", 1e300, 9 * 10**14)
        ),
        refused("double", ONE, 400, "no parameters ['priority'], only", priority=1),
        refused("nothing", ONE, 404, "nothing"),
        refused("double", ONE, 404, "version 2", version="2"),
        refused("slow", [[0.0] * 4] * 5, 413, "5 queries in one request; the queue of"),
        refused("slow", ONE, 504, LATE, "DeadlineExceeded", nercc_deadline_ms=50),
        refused("moody", [[-1.0, 2, 3, 4]], 502, FAILED, id="7"),
        refused("moody", [[-1.0, 2, 3, 4]], 502, "3 workers failed", "InferenceFailed"),
        # Several tensors, and others than floats.
        refused("heads", {"image": X["image"]}, 400, f"{TAKES}inputs ['image']: ['meta'] m"),
        refused("heads", {"x": X["meta"], **X}, 400, "['x'] unknown"),
        refused("heads", {**X, "meta": X["meta"][:1]}, 400, "but 'image' has 2, 'meta' has 1"),
        refused("heads", {**X, "meta": X["image"]}, 400, "of shape [-1, 4], not of shape [2, 2"),
        refused("heads", ODD, 400, "'meta': queries [1] are not finite in float32", "ValueError"),
        refused("tokens", LARGE, 400, "'ids': queries [0, 1] have numbers beyond", "ValueError"),
        refused("tokens", {**IDS, "ids": Tensor([[1] * 5], (1, 5))}, 400, "[-1, 5], not FP32"),
        refused("scaled", [[1.0, 1e30, 2.0]], 502, INFINITE, "InferenceFailed"),
        refused("count", [[1.0, 2, 3]], 400, "takes 'input', INT8"),
        refused("count", BYTE, 400, DEADLINE, nercc_deadline_ms=-1),
    ],
    ids=itertools.count(),
)
def test_refusals_are_alike_by_every_face(
    server, models, caplog, model, inputs, more, status, words, python
):
    kinds = dict.fromkeys(inputs, "INT64") if model == "tokens" else {}
    for face in FACES:
        if face == "json" and any(
            np.isnan(x).any() for x in inputs.values() if type(x) is not Tensor
        ):
            continue  # JSON has no such numbers
        answer = ask(face, server, model, inputs, kinds, **more)
        assert answer.is_(status), (face, answer)
        assert any(word in answer.error for word in words.split(" | ")), (face, answer)
        assert "no negative numbers" not in answer.error, "what a model raises is in the log only"
    if python is not None:
        given = inputs["input"] if inputs.keys() == {"input"} else inputs
        name, why = by_python(models[model], given, more.get("parameters", {}))
        assert name == python, why
    if more.get("id"):
        records = [each for each in caplog.records if getattr(each, "id", None) == more["id"]]
        assert any("no negative numbers, please" in str(vars(each)) for each in records)
    assert ask("json", server, "double", ONE).outputs["output"].tolist() == [[2, 4, 6]]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.raw_input_contents.extend([bytes(16)] * 2), "have 2 raw contents"),
        (lambda r: r.raw_input_contents.append(bytes(16)), "has both contents"),
        (lambda r: r.inputs[0].parameters["class"].MergeFromString(b"\x10\x03"), "no par"),
        (lambda r: r.outputs.add(name="output").parameters["class"].MergeFromString(b"\x10\x03"),
         "no parameters ['class']"),
        (lambda r: r.parameters["nercc_exact"].MergeFromString(b"\x3a\x01a"), "of an unknown kind"),
        (lambda r: setattr(r.inputs[0], "datatype", "COMPLEX"), "not COMPLEX"),
        (lambda r: setattr(r, "id", "x" * BODY_LIMIT), ""),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_messages_that_are_no_requests(server, spoil, words):
    request = message("double", ONE)
    spoil(request)
    with stub_of(server) as stub, pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(request, timeout=LONG)
    assert error.value.code().name == ("INVALID_ARGUMENT" if words else "RESOURCE_EXHAUSTED")
    assert words in error.value.details()


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "GET /nothing: Not Found"),
        ("POST", "/v2/models/digits/nothing", 404, "POST /v2/models/digits/nothing: Not Found"),
        ("GET", "/v2/models/digits/infer", 405, "GET /v2/models/digits/infer: Method Not Allowed"),
        ("DELETE", "/v2", 405, "DELETE /v2: Method Not Allowed"),
        ("PUT", "/metrics", 405, "PUT /metrics: Method Not Allowed"),
        ("GET", "/v2/models/nothing", 404, "nothing"),
        ("GET", "/v2/models/nothing/ready", 404, "nothing"),
        ("GET", "/v2/models/double/versions/2", 404, "version 2"),
        ("GET", f"/v2/models/{'x' * 20_000}", 404, "xxx"),
        ("GET", f"/{'x' * 20_000}", 404, "xxx"),
        ("HEAD", "/v2/health/live", 200, ""),
        ("HEAD", "/metrics", 200, ""),
    ],
)
def test_paths_and_methods(server, method, path, status, words):
    with http(server) as client:
        answer = client.request(method, path)
    assert answer.status_code == status
    if status != 200:
        assert (list(answer.json()), words in answer.json()["error"]) == (["error"], True)
        assert ("allow" in answer.headers) == (status == 405)
    assert len(answer.content) < (1000 if status != 200 else 1)


def test_grpc_knows_no_other_model_or_version_and_loads_none(server):
    with stub_of(server) as stub:
        for call, about, code in (
            ("ModelReady", {"name": "nothing"}, "NOT_FOUND"),
            ("ModelMetadata", {"name": "double", "version": "2"}, "NOT_FOUND"),
            ("RepositoryModelLoad", {"model_name": "double"}, "UNIMPLEMENTED"),
        ):
            with pytest.raises(grpc.RpcError) as error:
                getattr(stub, call)(getattr(messages, f"{call}Request")(**about), timeout=LONG)
            assert error.value.code().name == code


# What a model is asked, and what its reply becomes.


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, {}),
        ({"nercc_exact": True}, {"exact": True}),
        ({"nercc_exact": False, "binary_data_output": True}, {}),
        ({"nercc_deadline_ms": 250}, {"deadline": 0.25}),
        ({"nercc_deadline_ms": 0.5}, {"deadline": 0.0005}),
        ({"nercc_deadline_ms": 3_600_000}, {"deadline": 3600}),
    ],
)
def test_deadline_and_exactness(server, told, parameters, expected):
    for face in FACES:
        assert ask(face, server, "digits", ONE, parameters=parameters).is_(200)
        x, demanded = told.asked[-1]
        np.testing.assert_array_equal(x, ONE["input"])
        assert demanded == {"deadline": None, "exact": False} | expected


def reply(disagreement=(0.0, 0.25), error=(0.0, 1.5)):
    flags = np.array([[True, False], [False, True], [True, False], [True, False]])
    numbers = np.array([1, 8]), np.array([1, 6]), np.array(disagreement), np.array(error)
    return Reply(np.arange(8, dtype=np.float32).reshape(2, 4), *flags, *numbers,
                 queued=0.25, seconds=0.5)  # fmt: skip


@pytest.mark.parametrize("face", FACES)
def test_a_reply_says_what_it_rests_on(server, told, face):
    told.reply = reply()
    found = ask(face, server, "digits", ONE, id="mine")
    assert list(found.outputs) == ["output", "exact", "expected_disagreement", "expected_error"]
    expected = told.reply.values, [True, False], [0, 0.25], [0, 1.5]
    for each, wanted in zip(found.outputs.values(), expected, strict=True):
        np.testing.assert_array_equal(each, wanted)
    assert (found.id, found.version) == ("mine", "1")
    assert {name: float(value) for name, value in found.parameters.items()} == {
        "nercc_exact": 0,
        "nercc_approximate": 1,
        "nercc_predicted": 1,
        "nercc_reexecuted": 1,
        "nercc_suspicious": 1,
        "nercc_workers_asked": 9,
        "nercc_workers_responded": 7,
        "nercc_expected_disagreement": 0.25,
        "nercc_expected_error": 1.5,
        "nercc_queue_ms": 250,
    }
    told.reply = reply((0.0, np.nan), (0.0, np.nan))  # JSON has no NaN
    found = ask(face, server, "digits", ONE, outputs=["expected_error", "exact"])
    assert list(found.outputs) == ["expected_error", "exact"]
    assert found.outputs["expected_error"].tolist() == [0, -1]
    assert float(found.parameters["nercc_expected_error"]) == 0, "the largest that is known"
    ids = {found.id, ask(face, server, "digits", ONE).id}
    assert len(ids - {""}) == 2, "each its own, where none was given"


@pytest.mark.parametrize("usual", [None, False, True])
def test_outputs_say_each_whether_they_are_binary(server, told, usual):
    """The extension's rule: an output's own word, otherwise the request's, otherwise JSON."""
    told.reply = reply()
    outputs = [
        {"name": "expected_error", "parameters": {"binary_data": False}},
        {"name": "output"},
        {"name": "exact", "parameters": {"binary_data": True}},
    ]
    parameters = {} if usual is None else {"binary_data_output": usual}
    given = body(outputs=outputs, parameters=parameters)
    answer = post(server, "/v2/models/digits/infer", content=given)
    head = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])
    assert answer.headers["content-type"] == "application/octet-stream"
    sizes = [each.get("parameters", {}).get("binary_data_size") for each in head["outputs"]]
    assert sizes == [None, 32 if usual else None, 2]
    raw = told.reply.values.tobytes() if usual else b""
    assert answer.content.endswith(raw + b"\x01\x00")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (public.QueueFull("a reason"), 429),
        (public.InferenceFailed("a reason"), 502),
        (public.ServerClosing("a reason"), 503),
        (public.DeadlineExceeded("a reason"), 504),
        (KeyError("a bug"), 500),
    ],
)
def test_errors_are_statuses_with_their_reason(server, told, caplog, error, status):
    told.error = error
    for face in FACES:
        answer = ask(face, server, "digits", ONE)
        assert answer.is_(status)
        said = "internal error: see the server's log" if status == 500 else "a reason"
        assert answer.error.startswith(
            said + ": the server's log says why, by id " * (status == 502)
        )
    headers = post(server, "/v2/models/digits/infer", content=body()).headers
    assert headers.get("retry-after") == ("1" if status in (429, 503) else None)
    assert ("a bug" in caplog.text) == (status == 500)
    assert ("a gRPC call failed" in caplog.text) == (status == 500)


# Clients that go away, queues that are full, health.


@pytest.mark.parametrize(
    "rest", [b"Content-Length: 99\r\n\r\n{", b"Content-Length: 99\r\n\r\n", b""]
)
def test_a_client_that_goes_away_is_no_error(server, caplog, rest):
    with connect(server) as connection:
        connection.sendall(b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\n" + rest)
    assert ask("json", server, "double", ONE).is_(200)
    # The error of the test before may be logged after its answer.
    ours = [each for each in caplog.records if "a bug" not in str(each.exc_info)]
    assert not [each for each in ours if each.levelname not in ("INFO", "DEBUG")]


@pytest.mark.parametrize("face", ["json", "raw"])
def test_a_client_that_goes_away_while_it_waits_is_computed_for_no_longer(server, models, face):
    x, slow = {"input": [[1.0] * 4] * 4}, models["slow"]
    before = [counted("requests", "slow", outcome=each) for each in ("cancelled", "ok")]
    with connect(server) as connection, stub_of(server) as stub:
        if face == "json":
            connection.sendall(as_bytes("/v2/models/slow/infer", content("slow", x)[0]))
        else:
            future = stub.ModelInfer.future(message("slow", x))
        becomes(lambda: slow.status()["queue"]["in_flight"])
        connection.shutdown(socket.SHUT_RDWR) if face == "json" else future.cancel()
        becomes(lambda: not slow.status()["queue"]["in_flight"])
    assert slow.status()["queue"] == {"waiting": 0, "max": 4, "in_flight": 0}
    after = [counted("requests", "slow", outcome=each) for each in ("cancelled", "ok")]
    assert after == [before[0] + 1, before[1]]


def test_a_full_queue_and_a_clients_own_deadline(server, models):
    x, slow = {"input": [[1.0] * 4] * 4}, models["slow"]
    before = counted("requests", "slow", outcome="queue_full")
    with stub_of(server) as stub:
        held = stub.ModelInfer.future(message("slow", x), timeout=LONG)
        becomes(lambda: slow.status()["queue"]["waiting"])
        for face in FACES:
            answer = ask(face, server, "slow", x)
            assert answer.is_(429)
            assert "4 more came; the queue holds 4" in answer.error
        assert held.result().id
        with pytest.raises(grpc.RpcError) as error:
            stub.ModelInfer(message("slow", ONE), timeout=0.05)
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert counted("requests", "slow", outcome="queue_full") == before + len(FACES)


def test_both_faces_tell_health(server, told):
    with http(server) as client, stub_of(server) as stub:
        for health, statuses, why in (
            (Health(True, True), (200, 200, 200), ""),
            (Health(True, False, "no worker is ready"), (200, 503, 503), "no worker is ready"),
            (Health(False, False, "the batcher is stuck"), (503, 503, 503), "stuck"),
        ):
            told.is_well = health
            paths = "health/live", "health/ready", "models/digits/ready"
            answers = [client.get(f"/v2/{path}") for path in paths]
            assert tuple(each.status_code for each in answers) == statuses
            assert why in answers[-1].text
            assert stub.ServerReady(messages.ServerReadyRequest()).ready == health.ready
            asked_for = messages.ModelReadyRequest(name="digits")
            assert stub.ModelReady(asked_for).ready == health.ready
    told.is_well = Health(True, True)


def test_metadata_say_what_goes_in_and_out_and_what_is_coded(server):
    with http(server) as client, stub_of(server) as stub:
        of_server = client.get("/v2").json()
        by_grpc = stub.ServerMetadata(messages.ServerMetadataRequest())
        assert (by_grpc.name, by_grpc.version) == ("nercc_jax", of_server["version"])
        assert of_server["name"] == "nercc_jax"
        assert of_server["extensions"] == ["binary_tensor_data", "model_repository"]
        path = "/v2/models/double/versions/1"
        assert client.get(f"{path}/ready").json() == {"name": "double", "ready": True}
        assert client.get(path).json() == client.get("/v2/models/double").json()

        def about(model):
            """The metadata, which are the same by gRPC."""
            found = client.get(f"/v2/models/{model}").json()
            by_grpc = stub.ModelMetadata(messages.ModelMetadataRequest(name=model))
            for part in ("inputs", "outputs"):
                same = [
                    (each.name, each.datatype, [*each.shape]) for each in getattr(by_grpc, part)
                ]
                assert same == [tuple(each.values()) for each in found[part]]
            return found

        assert about("heads")["inputs"] == [
            {"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]},
            {"name": "meta", "datatype": "FP32", "shape": [-1, 4]},
        ]
        outputs = [tuple(each.values()) for each in about("tokens")["outputs"]]
        assert outputs == [
            *(("scaled", "INT32", [-1]), ("seen", "INT32", [-1])),
            ("exact", "BOOL", [-1]),
            *((name, "FP32", [-1]) for name in ("expected_disagreement", "expected_error")),
        ]
        assert about("heads")["parameters"]["nercc_coded"] is True
        found = about("tokens")["parameters"]
        assert found["nercc_coded"] is False
        assert found["nercc_uncoded"] == "input 'ids' is INT64, and codes mix floats (FP32) only"
        hints = {each["name"]: each.get("hints") for each in client.get("/status").json()["models"]}
        assert any("nothing is coded: input 'input' is INT8" in hint for hint in hints["count"])


def test_a_code_for_integers_is_refused_before_workers_start():
    with pytest.raises(ValueError, match="NeRCC for tokens: input 'input' is INT64"):
        real("tokens", lambda x: x, NeRCC(2, 4), datatype="INT64")
