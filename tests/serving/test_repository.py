"""Versions of a model, and loading and unloading: by curl, httpx, gRPC and Triton's clients."""

# ruff: noqa: E402 (`require` comes before what needs it)

import dataclasses
import json
import shutil
import subprocess
import sys
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from conftest import require

require("grpc", "serve-test")
require("fastapi", "serve")

from faces import FACES, ask
from in_process import SERVABLE, Doubles, becomes, body, http, listening, real
from nercc_server import ENDS, running

from nercc_jax import Uncoded
from nercc_jax.serving import ModelSettings, ServerSettings


class Version(Doubles):
    """A model whose version can be told from its replies."""

    def __init__(self, version):
        Doubles.__init__(self)
        self.servable = dataclasses.replace(SERVABLE, version=version)


@pytest.fixture
def started():
    return []


@pytest.fixture
def server(started):
    def start(version):
        def run():
            if len(started) > 4:
                raise ValueError("no more of it")
            started.append(Version(version))
            return started[-1]

        return run

    starts = {"digits": start("1"), "digits/10": start("10"), "digits/2": start("2")}
    with listening(starts, grpc_port=0, model_control="explicit") as server:
        becomes(lambda: server._started and server.grpc_port)
        yield server


@pytest.fixture
def client(server):
    with http(server) as client:
        yield client


ONE = {"input": [[1.0, 2, 3, 4]]}


def test_each_version_answers_and_the_latest_by_default(client, server):
    for asked, found in (("", "10"), ("1", "1"), ("2", "2"), ("10", "10"), ("3", None)):
        for face in FACES:
            answer = ask(face, server, "digits", ONE, version=asked)
            if found is None:
                assert (answer.is_(404), "version 3" in answer.error) == (True, True)
            else:
                assert answer.version == found
        path = "/v2/models/digits" + (f"/versions/{asked}" if asked else "")
        if found is not None:
            assert client.get(path).json()["versions"] == ["1", "2", "10"]
            assert client.get(f"{path}/ready").status_code == 200


def states(client):
    index = client.post("/v2/repository/index").json()
    assert {each["name"] for each in index} == {"digits"}
    return {each["version"]: each["state"] for each in index}


def test_what_is_unloaded_is_gone_until_it_is_loaded(client, started):
    assert states(client) == dict.fromkeys(("1", "2", "10"), "READY")
    assert client.post("/v2/repository/models/digits/unload").status_code == 200
    assert all(model.closed for model in started)
    assert states(client) == dict.fromkeys(("1", "2", "10"), "UNAVAILABLE")
    assert client.post("/v2/repository/index", json={"ready": True}).json() == []
    assert client.post("/v2/models/digits/infer", content=body()).status_code == 404
    assert client.get("/v2/health/ready").status_code == 200  # of what is to be served, all is
    # Two are loaded again, and the third start fails.
    answer = client.post("/v2/repository/models/digits/load", json={})
    assert (answer.status_code, "no more of it" in answer.json()["error"]) == (400, True)
    assert states(client) == {"1": "READY", "10": "READY", "2": "UNAVAILABLE"}
    answer = client.post("/v2/models/digits/infer", content=body()).json()
    assert (answer["model_version"], len(started)) == ("10", 5)


def test_what_is_unloaded_is_freed():
    weights = []

    def start():
        class Net(eqx.Module):
            matrix: jax.Array

            def __call__(self, x):
                return x @ self.matrix

        net = Net(jnp.ones((4, 3)))
        weights.append(weakref.ref(net.matrix))
        return real("digits", net, Uncoded(1), max_batch_size=1, num_workers=1)

    with listening({"digits": start}, model_control="explicit") as server, http(server) as client:
        becomes(lambda: server._started)
        assert ask("json", server, "digits", ONE).is_(200)
        assert weights[0]() is not None
        assert client.post("/v2/repository/models/digits/unload").is_success
        assert weights[0]() is None


@pytest.mark.parametrize("action", ["load", "unload"])
def test_what_cannot_be_loaded_or_unloaded(client, action):
    url = f"/v2/repository/models/{{}}/{action}"
    assert client.post(url.format("other")).status_code == 404
    wrong = client.post(url.format("digits"), json={"parameters": {"config": "{}"}})
    assert (wrong.status_code, "config" in wrong.json()["error"]) == (400, True)
    assert client.post(url.format("digits"), content=b"[").status_code == 400


@pytest.mark.parametrize("action", ["load", "unload"])
def test_without_the_flag_nobody_may(action):
    with listening({"digits": Doubles}) as server, http(server) as client:
        answer = client.post(f"/v2/repository/models/digits/{action}")
    assert answer.status_code == 403
    assert "--model-control explicit" in answer.json()["error"]


CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc
import tritonclient.http

found = []
for library, port in zip((tritonclient.http, tritonclient.grpc), sys.argv[1:]):
    client = library.InferenceServerClient(f"localhost:{port}")
    tensor = library.InferInput("input", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.float32([[1, 2, 3, 4]]))
    client.unload_model("twice")
    gone = not client.is_server_live() or "twice"
    try:
        client.infer("twice", [tensor])
    except library.InferenceServerException as error:
        gone = "does not exist" in str(error)
    client.load_model("twice")
    ready = [client.is_model_ready("twice", version) for version in ("", "1", "2")]
    values = [
        client.infer("twice", [tensor], model_version=version).as_numpy("output").tolist()
        for version in ("", "1", "2")
    ]
    found.append([gone, ready, values])
print(json.dumps(found))
"""

CONFIG = """
model_control = "explicit"
[defaults]
input_shape = [4]
num_data = 2
num_workers = 4
max_batch_size = 1
name = "twice"
version_policy = "all"
[[models]]
model = "own:double"
[[models]]
model = "own:from_weights"
version = 2
weights = "matrix.npy"
"""


def run(*command):
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_versions_of_a_coded_model_by_tritons_clients_and_curl(tmp_path):
    """Weights are read again when a model is loaded again."""
    import numpy as np

    require("tritonclient", "serve-test")
    matrix = tmp_path / "matrix.npy"
    np.save(matrix, 3 * np.eye(4, 3, dtype=np.float32))
    with running(tmp_path, config=CONFIG) as server:
        first, second = [[2, 4, 6]], [[3, 6, 9]]
        ports = str(server.http_port), str(server.grpc_port)
        for gone, ready, values in json.loads(run(sys.executable, "-c", CLIENT, *ports)):
            assert (gone, ready, values) == (True, [True] * 3, [second, first, second])
        assert server.count("requests_total", model="twice/2", outcome="ok") > 0
        if shutil.which("curl") is not None:
            np.save(matrix, 5 * np.eye(4, 3, dtype=np.float32))
            curl = ("curl", "-sS", "--fail-with-body", "--noproxy", "*")
            for action in ("unload", "load"):
                run(*curl, "-X", "POST", f"{server.url}/v2/repository/models/twice/{action}")
            for version, factor in (("1", 2), ("2", 5)):
                url = f"{server.url}/v2/models/twice/versions/{version}/infer"
                answer = json.loads(run(*curl, "-d", body().decode(), url))
                assert answer["outputs"][0]["data"] == [factor, 2 * factor, 3 * factor]


@pytest.mark.parametrize(
    ("policy", "keys"), [("latest", ["x/3"]), ("all", ["x", "x/2", "x/3"]), ("1, 2", ["x", "x/2"])]
)
def test_a_policy_chooses_versions(policy, keys):
    models = [ModelSettings(model="a:b", name="x", version=number) for number in (1, 2, 3)]
    defaults = ModelSettings(version_policy=policy)
    settings = ServerSettings(models=models, defaults=defaults)
    assert [each.key for each in settings.resolved()] == keys


@pytest.mark.parametrize(
    ("policies", "message"),
    [(("4", "4"), "has versions"), (("all", "latest"), "one policy"), (("none", "none"), "latest")],
)
def test_policies_that_do_not_fit(policies, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings(
            models=[
                ModelSettings(model="a:b", name="x", version=number, version_policy=policy)
                for number, policy in enumerate(policies, 1)
            ]
        ).resolved()
