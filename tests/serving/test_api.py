"""A server from Python: a model needs no more than its code and shape; bytes become floats."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from faces import ask
from nercc_server import Server
from pages import blocks

httpx = require("httpx", "serve-test")
require("starlette", "serve")

from nercc_jax import Berrut, NeRCC
from nercc_jax.serving import ModelSettings, ServerSettings, make_servable, make_server
from nercc_jax.serving.protocol.servable import Preprocessing

BACC = Berrut(2, 3, points="interleaved")


def started(server):
    """Returns the server's only model, started."""
    (start,) = server.starts.values()
    return start()


def test_a_code_has_as_many_workers_as_it_needs():
    settings = ModelSettings(deadline_s=5, outputs="logits")
    model = started(make_server(jnp.tanh, BACC, (3,), settings=settings))
    try:
        assert model.pool.num_workers == 3
        assert (model.uncoded, model.settings.deadline_s) == (None, 5)
        x = np.array([[0.0, 0.5, 1.0]], np.float32)
        reply = asyncio.run(model.infer(x, exact=True))
        np.testing.assert_allclose(reply.values, np.tanh(x), atol=1e-6)
    finally:
        model.close(0.0)


def test_what_cannot_be_coded_is_served_uncoded():
    counts = make_servable("counts", lambda x: x + 1, (2,), datatype="INT32")
    model = started(make_server(counts, settings=ModelSettings(num_workers=2)))
    try:
        assert "codes mix floats" in str(model.uncoded)
        reply = asyncio.run(model.infer(np.array([[1, 2]], np.int32)))
        assert reply.values.tolist() == [[2, 3]]
    finally:
        model.close(0.0)


def test_a_start_that_fails_says_so():
    def fails(x):
        raise RuntimeError("no weights")

    with pytest.raises(ValueError, match="the shape of one query"):
        make_server(jnp.tanh)
    with pytest.raises(ValueError, match="no weights"):
        make_server(fails, None, (3,))
    free_port = ServerSettings(http_port=0, grpc_port=None)
    server = make_server(jnp.tanh, BACC, (3,), server_settings=free_port)
    server.starts["model"] = lambda: fails(None)
    with pytest.raises(RuntimeError, match="no weights"), server:
        raise AssertionError("it is not ready")


# docs/serve.md: its model is served by its command, and its clients are answered.

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


@pytest.mark.slow
def test_the_model_of_the_page_is_served_to_its_clients(tmp_path):
    require("tritonclient", "serve-test")
    python, bash = blocks(PAGE, "python"), blocks(PAGE, "bash")
    (shop,) = (block for block in python if block.startswith("# shop.py"))
    (client,) = (block for block in python if "tritonclient" in block)
    (curl,) = (block for block in bash if block.startswith("curl"))
    whole = (block.replace("\\\n", " ") for block in bash)
    (serve,) = (line for block in whole for line in block.splitlines() if "shop:" in line)
    (tmp_path / "shop.py").write_text(shop)
    server = Server(tmp_path, *shlex.split(serve)[2:])
    try:
        printed = subprocess.run(
            ["bash", "-c", curl.replace("localhost:8000", f"127.0.0.1:{server.http_port}")],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert '"output"' in printed.stdout, printed
        printed = subprocess.run(
            [sys.executable, "-c", client.replace("localhost:8001", server.grpc)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        labels, exact, doubts = printed.stdout.splitlines()
        assert len(labels.strip("[]").split()) == len(doubts.strip("[]").split()) == 4
        assert "True" in exact or "False" in exact
    finally:
        server.kill()


# -- Bytes that become floats before they are coded ------------------------------------------------

SHAPE = (224, 224, 3)
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
KERNEL = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def prepare(images):
    """Bytes to normalised floats of 2 x 2 places."""
    floats = images.astype(jnp.float32) / 255 - MEAN
    return jax.image.resize(floats, (len(images), 2, 2, 3), "linear")


def network(x):
    return jnp.tanh(x.reshape(len(x), -1)) @ KERNEL


def own(images):
    """The model's answers, by NumPy but for the resizing."""
    floats = images.astype(np.float32) / 255 - MEAN
    small = np.asarray(jax.image.resize(floats, (len(images), 2, 2, 3), "linear"))
    return np.tanh(small.reshape(len(images), -1)) @ KERNEL


def pictures(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def server():
    servable = make_servable("images", network, SHAPE, datatype="UINT8", preprocess=prepare)
    faults = {"straggler_rate": 0.2, "straggler_delay_s": 0.3}
    settings = ModelSettings(max_batch_size=2, outputs="logits", max_disagreement=1, faults=faults)
    code = NeRCC(2, 4, points="interleaved", lambda_dec=0.0)
    ports = ServerSettings(http_port=0, grpc_port=0)
    with make_server(servable, code, settings=settings, server_settings=ports) as server:
        yield server


@pytest.mark.parametrize("face", ["binary", "raw"])
def test_bytes_are_served_coded(server, face):
    """One call in five straggles: some answers are decoded, and all others are the model's own."""
    url = f"http://127.0.0.1:{server.http_port}/v2/models/images"
    about = httpx.get(url, trust_env=False).json()
    assert about["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, *SHAPE]}]
    assert about["parameters"]["nercc_coded"] is True
    found = set()
    for seed, number in enumerate((1, 2, 3, 4, 9) * 12):
        x = pictures(number, seed)
        answer = ask(face, server, "images", {"input": x}, {"input": "UINT8"})
        exact = answer.outputs["exact"]
        values, expected = answer.outputs["output"][exact], own(x)[exact]
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)
        found |= {*exact.tolist()}
        if len(found) == 2 and seed >= 4:
            break
    assert found == {True, False}


def test_several_inputs_become_several_arrays_of_floats():
    def to_floats(x):
        return {"both": x["image"].astype(jnp.float32) + x["shift"][:, None]}

    servable = make_servable(
        "two",
        lambda x: {"sum": x["both"].sum(axis=1)},
        {"image": (3,), "shift": ()},
        datatype={"image": "UINT8", "shift": "FP32"},
        preprocess=to_floats,
        calibration={"image": np.ones((2, 3), np.uint8), "shift": np.float32([1, 2])},
    )
    assert servable.uncodable is None
    np.testing.assert_array_equal(servable.calibration, [[2, 2, 2], [3, 3, 3]])
    given = {"image": np.uint8([[1, 2, 250]]), "shift": np.float32([0.5])}
    rows = Preprocessing(servable, (1, 2))(given)
    np.testing.assert_array_equal(rows, [[1.5, 2.5, 250.5]])
    assert servable.growth == 12 / 7


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, "to floats"),
        (lambda x: x.sum().astype(float), "to floats"),
        (lambda x: x @ jnp.ones((3, 3)), "does not run on"),
    ],
    ids=["no floats", "no batch", "no fit"],
)
def test_functions_that_are_no_preprocessing(function, message):
    with pytest.raises(ValueError, match=message):
        make_servable("odd", network, (4,), datatype="UINT8", preprocess=function)


def test_what_is_not_finite_once_prepared_is_refused():
    servable = make_servable(
        "logs", lambda x: x, (2,), datatype="UINT8", preprocess=lambda x: jnp.log(x * 1.0)
    )
    with pytest.raises(ValueError, match=r"queries \[1\] are not finite"):
        Preprocessing(servable, (1, 2))(np.uint8([[1, 2], [0, 1]]))
