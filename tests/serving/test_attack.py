"""Whoever sends what is refused, or holds connections, costs the others next to nothing."""

# ruff: noqa: E402 (`require` comes before what needs it)

import contextlib
import json
import socket
import statistics

import pytest
from conftest import require

resource = pytest.importorskip("resource")
httpx = require("httpx", "serve-test")
require("starlette", "serve")

import psutil
from attack import ask, attacking, bodies, post
from nercc_server import Server

SHAPE = (28, 28)
PATH = "/v2/models/own.wide/infer"
LOOKS, SECONDS = 5, 1.5  # with an attack, and as many without
CLIENTS, ATTACKERS, IDLE = 4, 60, 2100
IN_FLIGHT = 2**29  # what requests may hold (`max_bytes_in_flight`)

_TENSOR = {"name": "input", "datatype": "FP32", "shape": [1, *SHAPE], "data": [0.5] * 28 * 28}
HONEST = post(PATH, json.dumps({"inputs": [_TENSOR]}).encode())
LARGE = bodies(SHAPE, 7_900_000)["numbers"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that may open more files than it is started with, as most systems have it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2 * IDLE:
        pytest.skip(f"{limits[1]} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        folder = tmp_path_factory.mktemp("attack")
        server = Server(folder, "--model", "own:wide", "--input-shape", "28,28")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield server
    server.kill()


@contextlib.contextmanager
def idle(port):
    with contextlib.ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        yield


ATTACKS = {
    "8 MB": lambda port: attacking(port, post(PATH, LARGE), ATTACKERS),
    "8 MB in chunks": lambda port: attacking(port, post(PATH, LARGE, chunked=True), ATTACKERS),
    "idle connections": idle,
}


def memory(server):
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


@pytest.mark.parametrize("chunked", [False, True])
def test_large_json_is_refused_while_others_are_answered(server, chunked):
    with attacking(server.http_port, post(PATH, LARGE, chunked), ATTACKERS) as statuses:
        assert ask(server.http_port, HONEST, CLIENTS, 0.5)
        assert statuses.get(timeout=60) == 413


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_others_hardly_notice(server, attack):
    """By the median over looks in turn, which other processes that come and go change alike."""
    ask(server.http_port, HONEST, CLIENTS, SECONDS)
    found, before = {False: [], True: []}, memory(server)
    for _ in range(LOOKS):
        for attacked, p99 in found.items():
            context = ATTACKS[attack] if attacked else lambda _: contextlib.nullcontext()
            with context(server.http_port):
                times = ask(server.http_port, HONEST, CLIENTS, SECONDS)
                p99.append(sorted(times)[int(0.99 * len(times))])
                for probe in ("live", "ready"):
                    url = f"{server.url}/v2/health/{probe}"
                    assert httpx.get(url, trust_env=False, timeout=10).status_code == 200
                assert memory(server) < before + IN_FLIGHT
    without, under = map(statistics.median, found.values())
    print(f"{attack}: p99 {1e3 * under:.1f} ms, without {1e3 * without:.1f} ms")
    assert under < 3 * without


@pytest.mark.slow
@pytest.mark.parametrize("kind", bodies(SHAPE))
def test_all_are_answered_while_json_is_parsed_that_is_no_request(server, kind):
    shares = []
    for _ in range(3):  # which other processes that come and go change alike
        times = ask(server.http_port, HONEST, CLIENTS, SECONDS)
        with attacking(server.http_port, post(PATH, bodies(SHAPE)[kind]), ATTACKERS) as statuses:
            shares.append(len(ask(server.http_port, HONEST, CLIENTS, SECONDS)) / len(times))
            assert statuses.get(timeout=60) == 400
    assert statistics.median(shares) > 1 / 3


@pytest.mark.slow
def test_it_ends_among_attackers(server):
    """The last test of this server."""
    with ATTACKS["8 MB"](server.http_port), idle(server.http_port):
        server.signal()
        assert server.wait() == 0
