"""A server from Python: a model needs no more than its code and shape."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from nercc_server import Server
from pages import blocks

require("starlette", "serve")

from nercc_jax import Berrut
from nercc_jax.serving import ModelSettings, ServerSettings, make_servable, make_server

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
