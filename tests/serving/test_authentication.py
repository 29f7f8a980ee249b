"""Tokens and TLS, and the repository's index, by curl and by Triton's clients."""

# ruff: noqa: E402 (`require` comes before what needs it)

import json
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import require

httpx = require("httpx", "serve-test")
grpc = require("grpc", "serve-test")
require("fastapi", "serve")

from faces import FACES, Stub, ask
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from in_process import Doubles, becomes, body, channel, http, listening, serving
from nercc_server import ENDS

from nercc_jax.serving.core._health import Health
from nercc_jax.serving.transport import open_inference_pb2 as messages

TOKEN = "a token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
INFER = "/v2/models/digits/infer"


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=ENDS, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of tokens, and a certificate for this machine with its key."""
    folder = tmp_path_factory.mktemp("files")
    tokens, certificate, key = (folder / name for name in ("tokens", "tls.crt", "tls.key"))
    tokens.write_text(f"another\n\n{TOKEN}\n")
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-subj", "/CN=localhost", "-addext", names),
        *("-keyout", str(key), "-out", str(certificate)),
    )
    return tokens, certificate, key


@pytest.fixture(scope="module")
def guarded(files):
    with (
        serving(Doubles(), grpc_port=0, token_file=str(files[0])) as server,
        http(server) as client,
    ):
        becomes(lambda: server.grpc_port)
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
    answer = guarded[1].request(method, path, headers=headers, content=body())
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    if method != "HEAD":
        assert answer.json() == {"error": "a token is needed: Authorization: Bearer TOKEN"}


@pytest.mark.parametrize("face", FACES)
def test_inference_is_for_whoever_has_one(guarded, face):
    for given, status in (("Bearer other", 401), ("bearer another", 200), (f"Bearer {TOKEN}", 200)):
        headers = {"Authorization": given}
        answer = ask(face, guarded[0], "digits", {"input": [[1.0, 2, 3, 4]]}, headers=headers)
        assert answer.is_(status)
        assert status == 401 or answer.outputs["output"].tolist() == [[2, 4, 6, 8]]
    assert guarded[1].get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/v2/health/live", "/v2/health/ready"])
def test_probes_need_no_token(guarded, path):
    assert guarded[1].get(path).status_code == 200


def test_grpc_needs_one_too(guarded):
    with channel(guarded[0]) as there:
        stub = Stub(there)
        asked = messages.ServerMetadataRequest()
        for given in ([], [("authorization", "Bearer other")]):
            with pytest.raises(grpc.RpcError) as error:
                stub.ServerMetadata(asked, metadata=given, timeout=ENDS)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert "a token is needed" in error.value.details()
        given = [("authorization", f"Bearer {TOKEN}")]
        assert stub.ServerMetadata(asked, metadata=given, timeout=ENDS).name == "nercc_jax"
        assert stub.ServerReady(messages.ServerReadyRequest(), timeout=ENDS).ready
        health = HealthStub(there).Check(HealthCheckRequest(), timeout=ENDS)
        assert health.status == HealthCheckResponse.SERVING


# Triton's clients and kserve's have messages of the same names: a process of their own.
CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc
import tritonclient.http

http_port, grpc_port, certificate, token = sys.argv[1:]
headers = {"authorization": f"Bearer {token}"}
http = tritonclient.http.InferenceServerClient(
    f"localhost:{http_port}", ssl=True, ssl_options={"ca_certs": certificate}
)
by_grpc = tritonclient.grpc.InferenceServerClient(
    f"localhost:{grpc_port}", ssl=True, root_certificates=certificate
)
found = []
for client, library in ((http, tritonclient.http), (by_grpc, tritonclient.grpc)):
    x = np.float32([[1, 2, 3, 4]])
    tensor = library.InferInput("input", [1, 4], "FP32")
    tensor.set_data_from_numpy(x)
    answer = client.infer("digits", [tensor], headers=dict(headers))
    more = {"as_json": True} if client is by_grpc else {}
    index = client.get_model_repository_index(headers=headers, **more)
    index = index["models"] if client is by_grpc else index
    name = "output"
    try:
        client.infer("digits", [tensor])
        refused = False
    except library.InferenceServerException as error:
        refused = "a token is needed" in str(error)
    found.append([answer.as_numpy(name).tolist(), index, refused])
print(json.dumps(found))
"""


def test_tls_and_tokens_by_tritons_clients_and_curl(files):
    require("tritonclient", "serve-test")
    tokens, certificate, key = map(str, files)
    secure = {"tls_certificate": certificate, "tls_key": key, "token_file": tokens}
    with serving(Doubles(), grpc_port=0, **secure) as server:
        becomes(lambda: server.grpc_port)
        ports = str(server.http_port), str(server.grpc_port)
        found = json.loads(run(sys.executable, "-c", CLIENT, *ports, certificate, TOKEN))
        for values, index, refused in found:
            assert values == [[2, 4, 6, 8]]
            assert index[0] | {"reason": ""} == ready("digits")
            assert refused
        url = f"https://localhost:{server.http_port}"
        if shutil.which("curl") is not None:
            trusted = ("curl", "-sS", "--noproxy", "*", "--cacert", certificate)
            assert json.loads(run(*trusted, f"{url}/v2/health/live")) == {"live": True}
            authorized = (*trusted, "-H", f"Authorization: Bearer {TOKEN}")
            index = run(*authorized, "-d", '{"ready": true}', f"{url}/v2/repository/index")
            assert json.loads(index) == [ready("digits")]
            answer = run(*authorized, "-d", body().decode(), f"{url}{INFER}")
            assert json.loads(answer)["outputs"][0]["data"] == [2, 4, 6, 8]
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{server.http_port}/v2/health/live", trust_env=False)


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
        becomes(lambda: server.state.models)
        assert client.post(url).json() == [
            ready("digits") | {"state": "UNAVAILABLE", "reason": "it is busy"},
            ready("later") | {"state": "LOADING", "reason": "It is being started."},
        ]
        assert client.post(url, json={"ready": True}).json() == []
        wrong = client.post(url, content=b'{"ready": 7}')
        assert (wrong.status_code, "boolean" in wrong.json()["error"]) == (400, True)
        model.is_well = Health(True, True)
        assert client.post(url, json={"ready": True}).json() == [ready("digits")]
        may_start.set()
