"""Loading and unloading, the index, tokens and TLS: by curl and Triton's clients, too."""

# ruff: noqa: E402 (`require` comes before what needs it)

import itertools
import json
import shutil
import subprocess
import threading
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_calls
from conftest import require

grpc, httpx = require("grpc", "serve-test"), require("httpx", "serve-test")
require("starlette", "serve")

from attack import post
from faces import FACES, ask, stub_of
from in_process import BODY, ONE, Doubles, becomes, connect, http, listening, real, serving
from nercc_server import ENDS

from nercc_jax import Uncoded
from nercc_jax.serving import Health
from nercc_jax.serving.transport import open_inference_pb2 as messages


@pytest.fixture
def started():
    return []


@pytest.fixture
def server(started):
    def start():
        if len(started) > 2:
            raise ValueError("no more of it")
        started.append(Doubles())
        return started[-1]

    starts = {"digits": start, "others": start}
    with listening(starts, grpc_port=0, model_control="explicit") as server:
        becomes(lambda: server.state.models.complete)
        yield server


@pytest.fixture
def client(server):
    with http(server) as client:
        yield client


def test_what_is_unloaded_is_gone_until_it_is_loaded(client, started):
    def states():
        index = client.post("/v2/repository/index").json()
        return {each["name"]: each["state"] for each in index}

    def do(what):
        return client.post(f"/v2/repository/models/digits/{what}", json={})

    assert states() == {"digits": "READY", "others": "READY"}
    assert do("unload").status_code == 200
    assert [model.closed for model in started] == [True, False]
    assert states() == {"digits": "UNAVAILABLE", "others": "READY"}
    assert client.post("/v2/models/digits/infer", content=BODY).status_code == 404
    assert client.get("/v2/health/ready").status_code == 200  # of what is to be served, all is
    assert do("load").status_code == 200
    assert client.post("/v2/models/digits/infer", content=BODY).status_code == 200
    # It is unloaded again, and then its start fails.
    assert do("unload").status_code == 200
    answer = do("load")
    assert (answer.status_code, "no more of it" in answer.json()["error"]) == (400, True)
    assert states() == {"digits": "UNAVAILABLE", "others": "READY"}


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
        becomes(lambda: server.state.models.complete)
        assert ask("json", server, "digits", ONE).is_(200)
        assert weights[0]() is not None
        assert client.post("/v2/repository/models/digits/unload").is_success
        assert weights[0]() is None


def test_the_end_waits_for_what_is_being_unloaded():
    """Also where the client that asked for it has gone away."""
    closes, may_close = threading.Event(), threading.Event()

    class Slow(Doubles):
        def close(self, drain):
            closes.set()
            self.closed = may_close.wait(ENDS)

    model = Slow()
    with listening({"digits": lambda: model}, model_control="explicit") as server:
        becomes(lambda: server.state.models.complete)
        with connect(server) as connection:
            connection.sendall(post("/v2/repository/models/digits/unload", b""))
            assert closes.wait(ENDS)
        server.stop()
        threading.Timer(1.0, may_close.set).start()
    assert model.closed


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


def run(*command):
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# Tokens, TLS, and the index.

TOKEN = "a token"
INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of tokens, a certificate for this machine, and one file of it and its key."""
    folder = tmp_path_factory.mktemp("files")
    tokens, certificate, key, both = map(folder.joinpath, ("tokens", "crt", "key", "tls.pem"))
    tokens.write_text(f"another\n\n{TOKEN}\n")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", "/CN=localhost", "-addext", names),
        *("-keyout", str(key), "-out", str(certificate)),
    )
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return tokens, certificate, both


@pytest.fixture(scope="module")
def guarded(files):
    with (
        serving(Doubles(), grpc_port=0, token_file=str(files[0])) as server,
        http(server) as client,
    ):
        yield server, client


@pytest.mark.parametrize(
    "given", [None, "", TOKEN, "Bearer", "Bearer other", f"Basic {TOKEN}", f"Bearer {TOKEN}x"]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", INFER), ("GET", "/v2"), ("GET", "/metrics"), ("HEAD", "/status"), ("GET", "/none")],
)
def test_whoever_has_no_token_is_reported_so(guarded, method, path, given):
    headers = {} if given is None else {"Authorization": given}
    answer = guarded[1].request(method, path, headers=headers, content=BODY)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    if method != "HEAD":
        assert answer.json() == {"error": "a token is needed: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("face", FACES)
def test_inference_is_for_whoever_has_one(guarded, face):
    for given, status in (("Bearer other", 401), ("bearer another", 200), (f"Bearer {TOKEN}", 200)):
        headers = {"Authorization": given}
        answer = ask(face, guarded[0], "digits", ONE, headers=headers)
        assert answer.is_(status)
        assert status == 401 or answer.outputs["output"].tolist() == [[2, 4, 6, 8]]
    assert guarded[1].get("/metrics", headers=headers).status_code == 200


def test_probes_need_no_token_and_grpc_needs_one_too(guarded):
    for path in ("/", "/v2/health/live", "/v2/health/ready"):
        assert guarded[1].get(path).status_code == 200
    with stub_of(guarded[0]) as stub:
        asked = messages.ServerMetadataRequest()
        for given in ([], [("authorization", "Bearer other")]):
            with pytest.raises(grpc.RpcError, match="a token is needed") as error:
                stub.ServerMetadata(asked, metadata=given, timeout=ENDS)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
        given = [("authorization", f"Bearer {TOKEN}")]
        assert stub.ServerMetadata(asked, metadata=given, timeout=ENDS).name == "nercc_jax"
        assert stub.ServerReady(messages.ServerReadyRequest(), timeout=ENDS).ready


@pytest.fixture(scope="module")
def secure(files):
    """Clients speak TLS to it, with a token, and may load its model."""
    tokens, _, both = map(str, files)
    options = {"tls_certificate": both, "token_file": tokens, "model_control": "explicit"}
    with serving(Doubles(), grpc_port=0, **options) as server:
        yield server


@pytest.fixture(scope="module")
def elsewhere():
    require("tritonclient", "serve-test")
    with triton_calls.in_a_process(ENDS) as call:
        yield call


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_tritons_clients_are_served(secure, files, elsewhere, face):
    """In JSON and binary, compressed by gRPC; by HTTP a proxy would have to decompress requests."""
    trust = {"http": {"ssl_options": {"ca_certs": str(files[1])}}}
    trust["grpc"] = {"root_certificates": str(files[1])}
    there = face, f"localhost:{secure.http_port if face == 'http' else secure.grpc_port}"
    client = {"client": {"ssl": True} | trust[face]}
    given = client | {"headers": {"authorization": f"Bearer {TOKEN}"}}

    def say(method, *arguments):
        return elsewhere(triton_calls.ask, *there, method, *arguments, **given)

    def infer(x, **options):
        return elsewhere(triton_calls.infer, *there, "digits", x, **given, **options)

    for told in (("is_server_live",), ("is_server_ready",), ("is_model_ready", "digits", "1")):
        assert say(*told) is True
    assert say("get_server_metadata")["name"] == "nercc_jax"
    about = say("get_model_metadata", "digits", "1")
    shape = [int(length) for length in about["inputs"][0]["shape"]]  # strings by gRPC's JSON
    assert (about["versions"], about["inputs"][0]["name"], shape) == (["1"], "input", [-1, 4])
    index = say("get_model_repository_index")
    assert (index if face == "http" else index["models"])[0] | {"reason": ""} == ready("digits")

    way = "response_compression_algorithm" if face == "http" else "compression_algorithm"
    for binary, algorithm in itertools.product((True, False), (None, "gzip", "deflate")):
        x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
        found = infer(x, binary=binary, request_id="mine", **{way: algorithm})
        assert (found["id"], found["version"]) == ("mine", "1")
        np.testing.assert_array_equal(found["outputs"]["output"], 2 * x)
        assert found["outputs"]["output"].dtype == np.float32
        assert found["outputs"]["exact"].tolist() == [True] * 50
        assert found["outputs"]["expected_error"].tolist() == [0.0] * 50
        asked = {"exact": not binary, "output": binary}
        answers = [infer(x[:3], outputs=asked) for _ in "12"]
        assert len({answer["id"] for answer in answers}) == 2, "it needs none"
        assert list(answers[0]["outputs"]) == ["exact", "output"]
        np.testing.assert_array_equal(answers[0]["outputs"]["output"], 2 * x[:3])
        if face == "http":
            assert answers[0]["in_json"] == [name for name, binary in asked.items() if not binary]

    say("unload_model", "digits")
    assert "does not exist" in infer(x)["message"]
    say("load_model", "digits")
    assert infer(x, model_version="1")["outputs"]["output"].shape == (50, 4)
    refused = elsewhere(triton_calls.infer, *there, "digits", x, **client)
    assert "a token is needed" in refused["message"]


def test_curl_is_served_by_tls_and_nobody_without(secure, files):
    if shutil.which("curl") is not None:
        url = f"https://localhost:{secure.http_port}"
        trusted = ("curl", "-sS", "--fail-with-body", "--noproxy", "*", "--cacert", str(files[1]))
        assert json.loads(run(*trusted, f"{url}/v2/health/live")) == {"live": True}
        authorized = (*trusted, "-H", f"Authorization: Bearer {TOKEN}")
        for action in ("unload", "load"):
            run(*authorized, "-X", "POST", f"{url}/v2/repository/models/digits/{action}")
        index = run(*authorized, "-d", '{"ready": true}', f"{url}/v2/repository/index")
        assert json.loads(index) == [ready("digits")]
        answer = run(*authorized, "-d", BODY.decode(), f"{url}{INFER}")
        assert json.loads(answer)["outputs"][0]["data"] == [2, 4, 6, 8]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://localhost:{secure.http_port}/v2/health/live", trust_env=False)


def ready(name):
    return {"name": name, "version": "1", "state": "READY", "reason": ""}


def test_the_index_has_all_models_and_their_states():
    model = Doubles()
    model.is_well = Health(True, False, "it is busy")
    may_start = threading.Event()

    def start_later():
        assert may_start.wait(ENDS)
        return Doubles()

    starts, url = {"digits": lambda: model, "later": start_later}, "/v2/repository/index"
    with listening(starts) as server, http(server) as client:
        becomes(lambda: server.state.models.started)
        assert client.post(url).json() == [
            ready("digits") | {"state": "UNAVAILABLE", "reason": "it is busy"},
            ready("later") | {"version": "", "state": "LOADING", "reason": "It is being started."},
        ]
        assert client.post(url, json={"ready": True}).json() == []
        wrong = client.post(url, content=b'{"ready": 7}')
        assert (wrong.status_code, "ready is a bool, not 7" in wrong.json()["error"]) == (400, True)
        model.is_well = Health(True, True)
        assert client.post(url, json={"ready": True}).json() == [ready("digits")]
        may_start.set()
