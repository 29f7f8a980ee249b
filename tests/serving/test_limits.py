"""What clients may send, and how long they wait: whoever goes too far gets the reason, and harms
nobody."""

# ruff: noqa: E402 (`require` comes before what needs it)

import concurrent.futures
import contextlib
import itertools
import json
import socket
import statistics
import threading

import numpy as np
import pytest
from attack import ask as ask_often
from attack import attacking, bodies
from attack import post as as_bytes
from conftest import require
from faces import FACES, ask, post
from in_process import BODY, ONE, Doubles, becomes, connect, is_cut_off, read_answer, real, serving
from nercc_server import ENDS, Server

httpx = require("httpx", "serve-test")
require("starlette", "serve")

from nercc_jax import Uncoded
from nercc_jax.serving import ModelSettings
from nercc_jax.serving.transport._state import ServerState

INFER, BODY_LIMIT = "/v2/models/digits/infer", 2_000_000


@pytest.fixture(scope="module")
def server():
    model = Doubles()
    model.settings = ModelSettings(model="digits", max_queue_size=100_000)
    with serving(model, max_body_bytes=BODY_LIMIT) as server:
        yield server


def is_fine(server):
    answer = ask("json", server, "digits", ONE)
    assert answer.outputs["output"].tolist() == [[2, 4, 6, 8]]


# Bodies.


@pytest.mark.parametrize("size", [5_000_000, 10**9])
def test_a_refused_body_may_come_to_its_end_but_no_further(server, size):
    """A client that sends first and reads then finds the answer, and none sends on for long."""
    with connect(server) as connection:
        connection.sendall(as_bytes(INFER, b"x" * 5_000_000, length=size))
        status, headers, response = read_answer(connection)
        assert (status, headers["connection"]) == (413, "close")
        assert response["error"] == f"the body has {size} bytes; at most 2000000 are taken"
        assert is_cut_off(connection, b"x")
    is_fine(server)


@pytest.mark.parametrize(
    ("path", "chunks", "words"),
    [
        (INFER, [b"x" * (BODY_LIMIT + 1)], f"at most {BODY_LIMIT} are taken"),
        (INFER, [BODY, b" " * 2**20], "at most 1048576 are taken: send tensors as binary data"),
        (INFER, [b" " * 2**19] * 3, "at most 1048576 are taken: send tensors as binary data"),
        ("/v2/repository/index", [b" " * 1_500_000], "at most 1048576 are taken"),
        ("/v2/repository/models/digits/load", [b" " * 1_500_000], "at most 1048576 are taken"),
    ],
    ids=itertools.count(),
)
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_are_refused_wherever_they_are_sent(
    server, caplog, path, chunks, words, chunked
):
    """Their rest is dropped without an error of the server. Binary data may be larger than JSON."""
    answer = post(server, path, content=iter(chunks) if chunked else b"".join(chunks))
    assert answer.status_code == 413
    assert chunked or answer.headers["connection"] == "close", "its rest may still come"
    assert words in answer.json()["error"] or (chunked and "1048576" in answer.json()["error"])
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
    with connect(server) as connection:  # what is announced is not even read
        connection.sendall(as_bytes(path, b"", length=2**20 + 1))
        assert read_answer(connection)[0] == 413
    assert ask("binary", server, "digits", {"input": np.ones((70_000, 4), "<f4")}).is_(200)


# All together.


def test_connections_have_a_limit(monkeypatch):
    """The answer is uvicorn's own, and whoever closes one makes room."""
    assert ServerState.max_connections == 10_000
    monkeypatch.setattr(ServerState, "max_connections", 2)
    with serving(Doubles()) as server:
        with connect(server), connect(server) as second:
            second.sendall(as_bytes(INFER, BODY))
            assert second.recv(1000).startswith(b"HTTP/1.1 503")
        becomes(lambda: not server._http.server_state.connections)
        is_fine(server)


def test_bytes_in_flight_have_a_limit():
    model = Doubles(at_once=False)
    limits = {"max_body_bytes": 1000, "max_bytes_in_flight": 1500}
    with serving(model, grpc_port=0, **limits) as server:
        state = server.state
        with connect(server) as stuck:
            stuck.sendall(as_bytes(INFER, b" " * 900, length=1000))
            becomes(lambda: state.bytes_held == 900)
            for face in ("json", "raw"):
                answer = ask(face, server, "digits", ONE, id="x" * 700)
                assert (answer.is_(503), "900 bytes" in answer.error) == (True, True)
            assert model.refused == ["request_overloaded"] * 2
            # What waits for its answer counts, too.
            with connect(server) as waits:
                waits.sendall(as_bytes(INFER, BODY))
                becomes(lambda: state.bytes_held == 900 + len(BODY))
                assert len(model.asked) == 1
                model.may_answer.set()
                assert read_answer(waits)[0] == 200
        becomes(lambda: state.bytes_held == 0)
        assert ask("json", server, "digits", ONE, id="x" * 700).is_(200)
        assert state.bytes_held == 0


# Deadlines.


def test_a_batcher_that_is_held_up_is_not_waited_for(monkeypatch):
    """Deadlines are kept by whoever is awake."""
    model = real("digits", lambda x: 2 * x, Uncoded(1))
    held, release = threading.Event(), threading.Event()

    def hold(now):
        held.set()
        release.wait(10.0)

    with (
        serving(model, grpc_port=0) as server,
        concurrent.futures.ThreadPoolExecutor() as clients,
        monkeypatch.context() as patched,
    ):
        patched.setattr(model._batcher, "_dispatch", hold)
        late = {"parameters": {"nercc_deadline_ms": 300}}
        asked = [clients.submit(ask, face, server, "digits", ONE, **late) for face in FACES]
        for each in asked:
            assert each.result(ENDS).is_(504)
            assert each.result().error == "not answered within 0.3 s: the batcher is busy"
        assert held.is_set()
        assert model.status()["queue"]["in_flight"] == len(FACES), "its thread is held still"
        patched.undo()
        release.set()
        is_fine(server)
        totals = model.status()["totals"]
        assert totals["errors"]["deadline"] == len(FACES)
        assert totals["queries"]["exact"] == 1, "a late request is not answered"


def test_numbers_that_take_long_to_read_cost_their_own_deadline():
    """They are read one request at a time, in JSON and in gRPC's typed contents; bytes are not."""
    model = Doubles()
    model.settings = ModelSettings(model="digits", max_queue_size=10**5)
    with serving(model, grpc_port=0) as server:
        x, parameters = {"input": np.ones((20_000, 4), "<f4")}, {"nercc_deadline_ms": 60_000}
        for face in FACES:
            assert ask(face, server, "digits", x, parameters=parameters).is_(200)
            assert (model.asked[-1][1]["deadline"] < 60) == (face in ("json", "typed"))


# -- Whoever sends what is refused, or holds connections, costs the others next to nothing ---------


SHAPE = (28, 28)
PATH = "/v2/models/own.wide/infer"
LOOKS, SECONDS = 5, 1.5  # with an attack, and as many without
CLIENTS, ATTACKERS, IDLE = 4, 60, 2100
IN_FLIGHT = 2**29  # what requests may hold (`max_bytes_in_flight`)

_TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, *SHAPE], "data": [0.5] * 28 * 28}
HONEST = as_bytes(PATH, json.dumps({"inputs": [_TENSOR]}).encode())
LARGE = bodies(SHAPE, 7_900_000)["numbers"]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """One that may open more files than it is started with, as most systems have it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2 * IDLE:
        pytest.skip(f"{limits[1]} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        folder = tmp_path_factory.mktemp("attack")
        found = Server(folder, "--model", "own:wide", "--input-shape", "28,28")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield found
    found.kill()


@contextlib.contextmanager
def idle(port):
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        yield


ATTACKS = {
    "8 MB": lambda port: attacking(port, as_bytes(PATH, LARGE), ATTACKERS),
    "8 MB in chunks": lambda port: attacking(port, as_bytes(PATH, LARGE, chunked=True), ATTACKERS),
    "idle connections": idle,
}


def memory(server):
    psutil = require("psutil", "bench")
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


@pytest.mark.parametrize("chunked", [False, True])
def test_large_json_is_refused_while_others_are_answered(attacked, chunked):
    with attacking(attacked.http_port, as_bytes(PATH, LARGE, chunked), ATTACKERS) as statuses:
        assert ask_often(attacked.http_port, HONEST, CLIENTS, 0.5)
        assert statuses.get(timeout=60) == 413


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_others_hardly_notice(attacked, attack):
    """By the median over looks in turn, which other processes that come and go change alike."""
    ask_often(attacked.http_port, HONEST, CLIENTS, SECONDS)
    found, before = {False: [], True: []}, memory(attacked)
    for _ in range(LOOKS):
        for under_attack, p99 in found.items():
            context = ATTACKS[attack] if under_attack else lambda _: contextlib.nullcontext()
            with context(attacked.http_port):
                times = ask_often(attacked.http_port, HONEST, CLIENTS, SECONDS)
                p99.append(sorted(times)[int(0.99 * len(times))])
                for probe in ("live", "ready"):
                    url = f"{attacked.url}/v2/health/{probe}"
                    assert httpx.get(url, trust_env=False, timeout=10).status_code == 200
                assert memory(attacked) < before + IN_FLIGHT
    without, under = map(statistics.median, found.values())
    print(f"{attack}: p99 {1e3 * under:.1f} ms, without {1e3 * without:.1f} ms")
    assert under < 3 * without


@pytest.mark.slow
@pytest.mark.parametrize("kind", bodies(SHAPE))
def test_all_are_answered_while_json_is_parsed_that_is_no_request(attacked, kind):
    shares, port = [], attacked.http_port
    for _ in range(3):  # which other processes that come and go change alike
        times = ask_often(port, HONEST, CLIENTS, SECONDS)
        with attacking(port, as_bytes(PATH, bodies(SHAPE)[kind]), ATTACKERS) as statuses:
            shares.append(len(ask_often(port, HONEST, CLIENTS, SECONDS)) / len(times))
            assert statuses.get(timeout=60) == 400
    assert statistics.median(shares) > 1 / 3


@pytest.mark.slow
def test_it_ends_among_attackers(attacked):
    """The last test of this server."""
    with ATTACKS["8 MB"](attacked.http_port), idle(attacked.http_port):
        attacked.signal()
        assert attacked.wait() == 0
