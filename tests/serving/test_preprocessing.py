"""Bytes that become floats before they are coded: by REST and gRPC, exact and decoded."""

# ruff: noqa: E402 (`require` comes before what needs it)

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("starlette", "serve")

from faces import ask

from nercc_jax import NeRCC
from nercc_jax.serving import ModelSettings, ServerSettings, make_servable, make_server
from nercc_jax.serving.protocol._servable import Preprocessing

ROOT = Path(__file__).parents[2]
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
