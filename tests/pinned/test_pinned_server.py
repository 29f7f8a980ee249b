"""A transcript of one server, pinned from outside: fields and errors; further fields may come."""

# ruff: noqa: E402 (`require` comes before what needs it)

import threading

import numpy as np
from conftest import require
from pinned_values import TABLES

httpx = require("httpx", "serve-test")
require("grpc", "serve-test")
require("starlette", "serve")

from serving.faces import by_grpc, by_python, by_rest
from serving.nercc_server import patience

from nercc_jax import NeRCC, serving

NAMES, WEIGHTS = TABLES["server"], np.random.default_rng(0).normal(size=(4, 3))
USUAL, HARD, LONG = [0.1, 0.2, 0.3, 0.4], [7.0] * 4, 60.0
CLIENT = MODEL, TOKEN = "classifier", "a token"
QUERIES = {"usual": [USUAL], "hard": [HARD], "many": [USUAL] * 30, "short": [[1.0, 2.0]]}
EXACT, RELEASED = {"nercc_exact": True}, threading.Event()  # hard queries are answered after it


def classify(x):
    x = np.asarray(x)  # which JAX cannot trace
    if (x[:, 0] == HARD[0]).any():
        RELEASED.wait(LONG)
    return np.tanh(x @ WEIGHTS).astype(np.float32)


def test_a_transcript_of_one_server(tmp_path):
    """Metadata, exact and approximate answers, refusals, and a drain, by all three faces."""
    (tokens := tmp_path / "tokens").write_text(f"{TOKEN}\n")
    served = {"workers": 12, "max_batch_size": 1, "max_disagreement": 1, "max_queue_size": 8}
    served |= {"outputs": "logits", "straggler_threshold": 100.0}  # only hard ones are that late
    listen = {"http_port": 0, "grpc_port": 0, "token_file": tokens, "drain_delay_s": 2.0}
    server = serving.make_server(
        classify, NeRCC(2, 4, points="interleaved", lambda_dec=0.0), (4,), name=MODEL,
        settings=serving.ModelSettings(**served), server_settings=serving.ServerSettings(**listen),
    )  # fmt: skip
    models, start = [], server.starts[MODEL]
    server.starts[MODEL] = lambda: models.append(start()) or models[-1]
    with server:
        url, bearer = f"http://127.0.0.1:{server.http_port}", {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=bearer, trust_env=False) as client:
            for path, status in NAMES["health"].items():
                assert client.get(f"/v2/health/{path}").status_code == status
            assert {"name", "version", "extensions"} <= set(client.get("/v2").json())
            about = client.get(f"/v2/models/{MODEL}").json()
            assert (about["name"], about["versions"]) == (MODEL, ["1"])
            assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 4]}]
            found = {each["name"]: [each["datatype"], each["shape"]] for each in about["outputs"]}
            assert found == NAMES["tensors"]
            index = client.post("/v2/repository/index").json()
            assert index == [{"name": MODEL, "version": "1", "state": "READY", "reason": ""}]

        for _ in range(30):  # medians, by which stragglers are known
            by_rest(server, [USUAL], {}, *CLIENT)
        for rows, given, exact in (([USUAL], EXACT, [True]), ([HARD, USUAL], {}, [False, True])):
            RELEASED.clear()
            (status, rest), (code, rpc) = (
                ask(server, rows, given, *CLIENT) for ask in (by_rest, by_grpc)
            )
            error, reply = by_python(models[0], rows, given)
            RELEASED.set()
            assert (status, code, error) == (200, "OK", None)
            assert set(NAMES["answer"]) <= set(rest)
            for found in (rest["parameters"], rpc.parameters):
                assert {f"nercc_{name}" for name in NAMES["parameters"]} <= set(found)
            assert all(hasattr(reply, name) for name in NAMES["reply"])
            assert [each["name"] for each in rest["outputs"]] == list(NAMES["tensors"])
            assert [each.name for each in rpc.outputs] == list(NAMES["tensors"])
            own, data = (
                np.tanh(np.array(rows) @ WEIGHTS),
                [each["data"] for each in rest["outputs"]],
            )
            for found in (data[0], np.frombuffer(rpc.raw_output_contents[0], "<f4"), reply.values):
                values = np.reshape(found, own.shape)
                np.testing.assert_allclose(values[exact], own[exact], atol=1e-6)
                assert np.isfinite(values).all()
            assert data[1] == reply.exact.tolist() == list(rpc.raw_output_contents[1]) == exact
            # Errors are 0 where exact, and else unknown as long as nothing is calibrated.
            assert data[2] == data[3] == np.where(exact, 0.0, -1.0).tolist()
            assert np.isnan(reply.expected_error).tolist() == np.logical_not(exact).tolist()

        for queries, given, model, token, status, code, error in NAMES["refused"]:
            RELEASED.clear()
            rows = QUERIES[queries]
            found = [ask(server, rows, given, model, token) for ask in (by_rest, by_grpc)]
            assert [each for each, _ in found] == [status, code], found
            assert set(found[0][1]) == {"error"}
            assert error is None or by_python(models[0], rows, given)[0] == error
            RELEASED.set()

        # It drains: it is not ready, then takes nothing new, and answers what it accepted.
        RELEASED.clear()
        held = []
        thread = threading.Thread(
            target=lambda: held.append(by_rest(server, [HARD], EXACT, *CLIENT))
        )
        thread.start()
        assert any(models[0].in_flight for _ in patience(LONG))
        server.stop()
        ready = httpx.get(f"{url}/v2/health/ready", headers=bearer, trust_env=False)
        assert (ready.status_code, by_rest(server, [USUAL], {}, *CLIENT)[0]) == (503, 200)
        assert any(
            by_grpc(server, [USUAL], {}, *CLIENT)[0] == "UNAVAILABLE" for _ in patience(LONG)
        )
        assert not held
        RELEASED.set()
        thread.join(LONG)
        assert held[0][0] == 200
    assert by_python(models[0], [USUAL], {})[0] == "ServerClosing"
    assert not server.lost
