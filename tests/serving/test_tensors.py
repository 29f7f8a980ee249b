"""Models of several tensors, and of integers, from both faces: answers, refusals, what is coded."""

# ruff: noqa: E402 (`require` comes before what needs it)

import contextlib
import json

import numpy as np
import pytest
from conftest import require
from in_process import listening
from nercc_server import ENDS, patience

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from grpc_stub import GRPCInferenceServiceStub
from prometheus_client import CollectorRegistry

from nercc_jax import NeRCC, Replication, Uncoded
from nercc_jax.serving import make_servable
from nercc_jax.serving._metrics import Metrics
from nercc_jax.serving._served_model import ServedModel
from nercc_jax.serving._settings import ModelSettings
from nercc_jax.serving.protocol._servable import DTYPES
from nercc_jax.serving.transport import open_inference_pb2 as messages

LONG, REGISTRY = ENDS, CollectorRegistry()
SIGNS = np.array([1, -1], np.float32)


def heads(x):
    """Linear, and one head is twice the other: in what is decoded, too."""
    total = x["image"].sum(axis=(1, 2))
    small = total[:, None] + x["meta"]
    return {"small": small, "twice": 2 * small, "total": total[:, None] * SIGNS}


def tokens(x):
    seen = (x["ids"] * x["mask"]).sum(axis=1)
    return {"seen": seen, "odd": seen % 2 > 0, "scaled": seen * x["scale"]}


def count(ids):
    return (ids > 0).sum(axis=1, keepdims=True) * 1.0


MODELS = {
    "heads": (heads, {"image": (2, 3), "meta": (4,)}, "FP32"),
    "tokens": (tokens, {"ids": (5,), "mask": (5,), "scale": ()}, {"ids": "INT64", "mask": "BOOL"}),
    "count": (count, (3,), "INT8"),
}
WORKERS = {"heads": 4, "tokens": 1, "count": 2}


def start(name, code, meters, **response):
    model, shape, datatype = MODELS[name]
    servable = make_servable(name, model, shape, datatype=datatype)
    settings = ModelSettings(model=name, workers=WORKERS[name], max_batch_size=2, **response)
    return ServedModel(servable, code, settings, meters)


@pytest.fixture(scope="module")
def server():
    meters = Metrics(REGISTRY)
    loose = {"max_disagreement": 1, "straggler_rate": 0.3, "straggler_delay_s": 0.2}
    loose["outputs"] = "logits"
    codes = {
        "heads": lambda: start("heads", NeRCC(2, 4, points="interleaved"), meters, **loose),
        "tokens": lambda: start("tokens", Uncoded(1), meters),
        "count": lambda: start("count", Replication(1, 2), meters),
    }
    with listening(codes, grpc_port=0) as server:
        for _ in patience(LONG):
            if server.state.phase == "serving":
                break
        yield server


@pytest.fixture(params=["json", "binary", "grpc", "typed"])
def ask(request, server):
    """Asks a model with arrays by name: its outputs by name, or its error's words."""
    with contextlib.ExitStack() as stack:
        if request.param in ("json", "binary"):
            http = httpx.Client(base_url=f"http://127.0.0.1:{server.http_port}", timeout=LONG)
            stack.enter_context(http)
            yield lambda *asked, **more: by_rest(http, request.param == "binary", *asked, **more)
        else:
            channel = grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}")
            stub = GRPCInferenceServiceStub(stack.enter_context(channel))
            yield lambda *asked, **more: by_grpc(stub, request.param == "grpc", *asked, **more)


def by_rest(http, binary, model, arrays, words, **parameters):
    inputs, raw = [], b""
    for name, array in arrays.items():
        inputs.append({"name": name, "shape": array.shape, "datatype": words[name]})
        if binary:
            inputs[-1]["parameters"] = {"binary_data_size": array.nbytes}
            raw += array.tobytes()
        else:
            inputs[-1]["data"] = array.tolist()
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    headers = {"inference-header-content-length": str(len(head))} if binary else {}
    answer = http.post(f"/v2/models/{model}/infer", content=head + raw, headers=headers)
    if answer.status_code != 200:
        assert answer.status_code in (400, 502)
        return answer.json()["error"]
    return {
        each["name"]: np.array(each["data"], DTYPES[each["datatype"]]).reshape(each["shape"])
        for each in answer.json()["outputs"]
    }


def by_grpc(stub, raw, model, arrays, words, **parameters):
    request = messages.ModelInferRequest(model_name=model)
    for name, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param"
        setattr(request.parameters[name], kind, value)
    for name, array in arrays.items():
        tensor = request.inputs.add(name=name, shape=array.shape, datatype=words[name])
        if raw:
            request.raw_input_contents.append(array.tobytes())
        else:
            kinds = {"FP32": "fp32", "INT64": "int64", "BOOL": "bool", "INT8": "int"}
            contents = getattr(tensor.contents, f"{kinds[words[name]]}_contents")
            contents.extend(array.ravel().tolist())
    called = stub.ModelInfer.future(request, timeout=LONG)
    if called.exception() is not None:
        assert called.code().name in ("INVALID_ARGUMENT", "INTERNAL")
        return called.details()
    answer = called.result()
    return {
        each.name: np.frombuffer(content, DTYPES[each.datatype]).reshape(each.shape)
        for each, content in zip(answer.outputs, answer.raw_output_contents, strict=True)
    }


def pictures(number, seed=0):
    rng = np.random.default_rng(seed)
    image, meta = rng.normal(size=(number, 2, 3)), rng.normal(size=(number, 4))
    return {"meta": meta.astype(np.float32), "image": image.astype(np.float32)}


FLOATS = dict.fromkeys(("image", "meta"), "FP32")
WORDS = {"ids": "INT64", "mask": "BOOL", "scale": "FP32"}


@pytest.mark.parametrize("number", [1, 3])
def test_several_inputs_and_outputs(ask, number):
    x = pictures(number)
    found = ask("heads", x, FLOATS, nercc_exact=True)
    assert found.pop("exact").tolist() == [True] * number
    for name, each in heads(x).items():
        np.testing.assert_allclose(found[name], each, rtol=1e-5)


def test_what_is_decoded_has_all_its_parts(ask):
    decoded = 0
    for seed in range(100):
        found = ask("heads", pictures(2, seed), FLOATS)
        np.testing.assert_allclose(found["twice"], 2 * found["small"], rtol=1e-4, atol=1e-4)
        assert found["total"].shape == (2, 2)
        decoded += int((~found["exact"]).sum())
        if decoded >= 2:
            break
    assert decoded >= 2


def test_integers_are_served_exactly(ask):
    rng = np.random.default_rng(0)
    x = {
        "ids": rng.integers(-(10**6), 10**6, (7, 5)),
        "mask": rng.integers(0, 2, (7, 5)) > 0,
        "scale": rng.normal(size=7).astype(np.float32),
    }
    found = ask("tokens", x, WORDS)
    assert found["exact"].all()
    expected = tokens(x)
    assert (found["seen"].dtype, found["odd"].dtype) == (np.int32, bool)
    for name, each in expected.items():
        np.testing.assert_allclose(found[name], each, rtol=1e-6)
    found = ask("count", {"input": np.array([[1, -1, 127]], np.int8)}, {"input": "INT8"})
    assert found["output"].tolist() == [[2.0]]


SCALED = "the model's output 'scaled'"


def test_no_answer_that_is_not_finite_is_given(ask):
    """Among integers, too, where the pool sees bytes: it is tried at one other first."""
    x = {"ids": np.full((1, 5), 10**6), "mask": np.ones((1, 5), bool)}
    response = ask("tokens", {**x, "scale": np.full(1, 3e38, "<f4")}, WORDS)
    why = f"a query got no answer: 2 workers failed, the last: {SCALED} is not finite: "
    assert response.startswith(why)


X, ONES = pictures(2), np.ones((2, 4), np.int8)
IDS = {"ids": np.ones((2, 5), np.int64), "mask": np.ones((2, 5), bool), "scale": np.ones(2, "<f4")}
TAKES = "takes inputs 'image', FP32, of shape [-1, 2, 3]; 'meta', FP32, of shape [-1, 4], not "


@pytest.mark.parametrize(
    ("model", "arrays", "words", "message"),
    [
        ("heads", {"image": X["image"]}, FLOATS, f"{TAKES}inputs ['image']: ['meta'] missing"),
        ("heads", {"x": X["meta"], **X}, {"x": "FP32", **FLOATS}, "['x'] unknown"),
        ("heads", {**X, "meta": X["meta"][:1]}, FLOATS, "but 'image' has 2, 'meta' has 1"),
        ("heads", {**X, "meta": X["image"]}, FLOATS, "FP32, of shape [-1, 4], not of shape [2, 2"),
        ("heads", {**X, "meta": ONES}, {**FLOATS, "meta": "INT8"}, "of shape [-1, 4], not INT8"),
        ("tokens", {**IDS, "ids": IDS["ids"] << 31}, WORDS, "'ids': queries [0, 1] have number"),
        ("tokens", IDS, {**WORDS, "ids": "FP32"}, "'ids', INT64, of shape [-1, 5], not FP32"),
        ("count", {"input": np.ones((1, 3), "<f4")}, {"input": "FP32"}, "takes 'input', INT8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_reported_by_name(ask, model, arrays, words, message):
    response = ask(model, arrays, words)
    assert isinstance(response, str)
    assert message in response


def test_what_is_not_finite_is_reported_by_name(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        x = {**X, "meta": np.array([[1, 2, 3, 4], [1, 2, np.nan, 4]], "<f4")}
        response = by_grpc(GRPCInferenceServiceStub(channel), True, "heads", x, FLOATS)
    assert response == "'meta': queries [1] are not finite in float32"


def test_priority_by_every_face(ask):
    def counted():
        return REGISTRY.get_sample_value("nercc_high_priority_queries_total", {"model": "heads"})

    before = counted()
    for priority in (1, 2, 0):
        assert ask("heads", X, FLOATS, priority=priority)["exact"].shape == (2,)
    assert counted() == before + 2
    assert "priority must be 1 (high) or 2 (as usual), not 3" in ask("heads", X, FLOATS, priority=3)


@pytest.fixture
def http(server):
    address = f"http://127.0.0.1:{server.http_port}"
    with httpx.Client(base_url=address, timeout=LONG, trust_env=False) as http:
        yield http


def test_json_that_is_not_what_it_says_is_refused(http):
    for word, data, message in (
        ("INT8", [1, 2.5, 3], "not all of it are whole numbers"),
        ("INT8", [1, 2, 300], "numbers beyond int8"),
        ("INT8", ["a", "b", "c"], "not all of it are whole numbers"),
    ):
        tensor = {"name": "input", "shape": [1, 3], "datatype": word, "data": data}
        answer = http.post("/v2/models/count/infer", json={"inputs": [tensor]})
        assert answer.status_code == 400
        assert message in answer.json()["error"]


def test_metadata_and_status_say_what_is_coded(http):
    def about(model):
        return http.get(f"/v2/models/{model}").json()

    assert about("heads")["inputs"] == [
        {"name": "image", "datatype": "FP32", "shape": [-1, 2, 3]},
        {"name": "meta", "datatype": "FP32", "shape": [-1, 4]},
    ]
    outputs = [tuple(each.values()) for each in about("tokens")["outputs"]]
    assert outputs[:3] == [("odd", "BOOL", [-1]), ("scaled", "FP32", [-1]), ("seen", "INT32", [-1])]
    assert about("heads")["parameters"]["nercc_coded"] is True
    response = about("tokens")["parameters"]
    assert response["nercc_coded"] is False
    assert response["nercc_uncoded"] == "input 'ids' is INT64, and codes mix floats (FP32) only"
    hints = {each["name"]: each["hints"] for each in http.get("/status").json()["models"]}
    assert any("nothing is coded: input 'input' is INT8" in hint for hint in hints["count"])


def test_a_code_for_integers_is_refused_before_workers_start():
    with pytest.raises(ValueError, match="NeRCC for tokens: input 'ids' is INT64"):
        start("tokens", NeRCC(2, 4), Metrics(CollectorRegistry()))
