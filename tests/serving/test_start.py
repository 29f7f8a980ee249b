"""How a server starts and ends: it says what it cannot do yet or any more, and loses nothing."""

# ruff: noqa: E402 (`require` comes before what needs it)

import collections
import concurrent.futures
import contextlib
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import require

grpc, httpx = require("grpc", "serve-test"), require("httpx", "serve-test")
require("starlette", "serve")

from faces import CODES, FACES, ask, message, stub_of
from in_process import ONE, Doubles, becomes, http, listening, serving
from nercc_server import ENDS, STARTS, Server, command, environment, patience

from nercc_jax.serving.transport import open_inference_pb2 as messages


class Starts:
    """A model that starts when it may."""

    def __init__(self):
        self.model, self.begun, self.may = Doubles(), threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        assert self.may.wait(ENDS)
        return self.model


def test_it_says_that_it_starts_and_answers_by_what_has_started():
    first, start = Starts(), Starts()
    first.may.set()
    with (
        listening({"first": first, "digits": start}, grpc_port=0) as server,
        http(server) as client,
        stub_of(server) as stub,
    ):
        asked = messages.ModelReadyRequest(name="digits")
        assert client.get("/v2/health/live").json() == {"live": True}
        assert stub.ServerLive(messages.ServerLiveRequest(), timeout=ENDS).live
        becomes(lambda: client.get("/v2/models/first/ready").status_code == 200)
        assert ask("json", server, "first", ONE).is_(200)
        assert not stub.ServerReady(messages.ServerReadyRequest()).ready
        assert not stub.ModelReady(asked).ready
        assert client.get("/v2/models").json() == {"models": ["first", "digits"]}
        for path in ("/v2/health/ready", "/v2/models/digits/ready", "/v2/models/digits"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"].startswith("Server is not ready.")
        for face in ("json", "raw"):
            answer = ask(face, server, "digits", ONE)
            assert (answer.is_(503), "digits is being started" in answer.error) == (True, True)
            assert ask(face, server, "nothing", ONE).is_(404)
        status = client.get("/status").json()
        assert status["server"]["state"] == "starting"
        assert len(status["models"]) == 1
        start.may.set()
        becomes(lambda: client.get("/v2/health/ready").status_code == 200)
        assert stub.ServerReady(messages.ServerReadyRequest()).ready
        assert stub.ModelReady(asked).ready
        assert ask("json", server, "digits", ONE).is_(200)
        assert client.get("/status").json()["server"]["state"] == "serving"
    assert start.model.closed


@pytest.mark.parametrize("face", ["http_port", "grpc_port"])
def test_a_port_that_is_taken_is_reported_before_anything_is_loaded(face):
    start = Starts()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with listening({"digits": start}, **{"grpc_port": 0, face: port}) as server:
            becomes(lambda: server.ended)
    assert isinstance(server.ended, OSError)
    assert str(server.ended) == f"cannot listen on 127.0.0.1:{port}: is the port taken?"
    assert not start.begun.is_set()


def test_a_start_that_fails_ends_it_with_the_reason():
    first = Starts()
    first.may.set()

    def fails():
        raise ValueError("no such model")

    with listening({"first": first, "second": fails}) as server:
        becomes(lambda: server.ended)
    assert str(server.ended) == "no such model"
    assert first.model.closed
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.http_port), ENDS)


def test_a_model_that_starts_after_the_end_is_closed():
    """The end comes at once: no load balancer has to notice."""
    start = Starts()
    with listening({"digits": start}, drain_delay_s=500.0):
        assert start.begun.wait(ENDS)
    assert not start.model.closed
    start.may.set()
    becomes(lambda: start.model.closed)


# How its gRPC ends: UNAVAILABLE, which clients send elsewhere.

CALLS = 400  # more than the server takes in a moment


@pytest.mark.parametrize("signals", [1, 2])
def test_calls_that_nobody_has_taken_yet_end_as_unavailable(signals):
    """Also those that are sent again at once, and where the server ends at once."""
    request = message("digits", ONE)
    codes, stopped = collections.Counter(), threading.Event()
    some, left = threading.Event(), threading.Semaphore(0)

    def send(stub):
        stub.ModelInfer.future(request, timeout=ENDS).add_done_callback(
            lambda call: ended(call, stub)
        )

    def ended(call, stub):
        codes[call.code()] += 1
        some.set()
        if stopped.is_set():
            left.release()
        else:
            send(stub)

    with contextlib.ExitStack() as later:  # a channel that is closed cancels its calls
        with serving(Doubles(signals == 1), grpc_port=0, drain_timeout_s=ENDS) as server:
            stub = later.enter_context(stub_of(server))
            for _ in range(CALLS):
                send(stub)
            assert signals == 2 or some.wait(ENDS)
            for _ in range(signals):
                server.stop()
        stopped.set()
        for _ in range(CALLS):
            assert left.acquire(timeout=ENDS)
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
    assert codes[grpc.StatusCode.UNAVAILABLE]


def test_a_call_by_grpc_has_as_long_as_draining_takes():
    """Longer than what the server keeps for last errors."""
    model = Doubles(at_once=False)
    with serving(model, grpc_port=0, drain_timeout_s=60.0) as server, stub_of(server) as stub:
        future = stub.ModelInfer.future(message("digits", ONE), timeout=ENDS)
        becomes(lambda: model.asked)
        server.stop()
        timer = threading.Timer(3.5, model.may_answer.set)
        timer.start()
        begin = time.monotonic()
        assert future.code() is grpc.StatusCode.OK
        assert time.monotonic() - begin >= 3
        timer.join()


# -- How it ends: what was accepted is answered, nothing new is, and nothing keeps it alive --------


CONFIG = """
drain_delay_s = {delay}
drain_timeout_s = {timeout}
[defaults]
scheme = "uncoded"
input_shape = [4]
workers = 2
max_batch_size = 1
deadline_s = 600
[[models]]
model = "own:double"
name = "slow"
faults = {{service_delay_s = {service}}}
[[models]]
model = "own:hangs"
name = "hangs"
hang_timeout_s = 600
"""
FOREVER = 500.0  # much longer than any test waits
TOGETHER = 8


@pytest.fixture
def start(tmp_path):
    """Starts servers that take this long to answer, and ends what is left of them."""
    with contextlib.ExitStack() as ends:

        def start(service=0.3, delay=0.0, timeout=60.0, **ports):
            config = CONFIG.format(service=service, delay=delay, timeout=timeout)
            server = Server(tmp_path, config=config, **ports)
            ends.callback(server.kill)
            return server

        yield start


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor(2 * TOGETHER) as threads:
        yield threads


def send(face, server, number, model="slow"):
    """The answer's status, and its first number or its error."""
    answer = ask(face, server, model, {"input": [[float(number)] * 4]})
    status = 200 if answer.is_(200) else answer.status
    return status, answer.error or answer.outputs["output"][0, 0]


def accepted(server, calls, model="slow"):
    """Waits until the server has so many requests in hand, or has answered them."""
    for _ in patience(ENDS):
        status = server.status(model)
        if status["queue"]["in_flight"] + status["totals"]["requests"] == calls:
            return
    raise AssertionError(server.status(model))


@pytest.mark.slow
def test_what_was_accepted_is_answered(start, threads):
    """And another server starts at once on the same ports: no address is in use."""
    server = start()
    numbers = [*range(TOGETHER)] * 2
    faces = [FACES[number % 4] for number in range(2 * TOGETHER)]
    calls = [
        threads.submit(send, face, server, number)
        for face, number in zip(faces, numbers, strict=True)
    ]
    accepted(server, 2 * TOGETHER)
    server.signal()
    expected = [(200, 2.0 * number) for number in numbers]
    assert [call.result(ENDS) for call in calls] == expected
    assert server.wait() == 0
    log = [line["message"] for line in server.log()]
    assert log.index("listening") < log.index("ready") < log.index("draining")
    assert log.count("model is closed") == 2
    assert {line["level"] for line in server.log()} == {"INFO"}
    with pytest.raises(httpx.ConnectError):
        send("json", server, 0)
    ports = {"NERCC_HTTP_PORT": str(server.http_port), "NERCC_GRPC_PORT": str(server.grpc_port)}
    again = start(**ports)
    assert (again.http_port, again.grpc_port) == (server.http_port, server.grpc_port)
    assert send("json", again, 1) == (200, 2.0)


@pytest.mark.slow
def test_it_says_that_it_drains_and_answers_meanwhile(start, threads):
    """Until a second signal ends it at once, whoever waits."""
    server = start(service=0.0, delay=FOREVER)
    server.signal()
    server.wait_for("draining")
    for path in ("/v2/health/ready", "/v2/models/slow/ready"):
        answer = server.http.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert server.http.get("/v2/health/live").json() == {"live": True}
    assert server.http.get("/status").json()["server"]["state"] == "draining"
    with stub_of(server) as stub:
        assert not stub.ServerReady(messages.ServerReadyRequest()).ready
        assert not stub.ModelReady(messages.ModelReadyRequest(name="slow")).ready
    assert [send(face, server, 3) for face in FACES] == [(200, 6.0)] * len(FACES)
    calls = [threads.submit(send, face, server, -1, "hangs") for face in ("json", "raw")]
    accepted(server, 2, "hangs")
    server.signal()
    assert server.wait() == 1
    assert lost(server) == {"hangs": 2}
    for call in calls:  # with a reason, or cut off
        with contextlib.suppress(httpx.TransportError):
            assert call.result(ENDS)[0] != 200


@pytest.mark.slow
def test_a_request_that_outlasts_draining_gets_an_error(start, threads):
    """Neither a model that hangs nor connections that are stuck keep the server alive."""
    server = start(service=FOREVER, timeout=0.5)
    calls = [threads.submit(send, face, server, 1) for face in ("json", "raw") for _ in range(3)]
    accepted(server, 6)
    hanging = threads.submit(send, "json", server, -1, "hangs")
    accepted(server, 1, "hangs")
    with contextlib.ExitStack() as connections:
        for sent in (b"", b"GET /v2 HTTP/1.1\r\n", b"POST /v2/models/slow/infer HTTP/1.1\r\n"):
            address = ("127.0.0.1", server.http_port)
            connection = connections.enter_context(socket.create_connection(address, ENDS))
            if sent.startswith(b"POST"):
                sent += b"Host: x\r\nContent-Length: 1000\r\n\r\n{"
            connection.sendall(sent)
        assert server.http.get("/v2").status_code == 200  # and this one stays open
        server.signal(signal.SIGINT)  # as any other
        outcomes = [call.result(ENDS) for call in calls]
        assert [status for status, _ in outcomes] == [503] * 3 + [CODES[503]] * 3
        assert {words for _, words in outcomes} == {"the server shut down before it could answer"}
        assert hanging.result(ENDS)[0] == 503
        assert server.wait() == 1
    assert lost(server) == {"slow": 6, "hangs": 1}
    log = [line["message"] for line in server.log()]
    assert log.count("model is closed") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    # One that hangs, more than there are workers, and many more; a start of Ray costs much.
    ("pool", "queries"),
    [("devices", 1), ("devices", 6), ("devices", 200), ("ray", 1), ("ray", 200)],
)
def test_it_ends_whatever_models_do(tmp_path, pool, queries):
    """Also where all of XLA's threads are in a model that hangs, and its workers were replaced."""
    workers = "4"
    if pool == "ray":
        require("ray", "ray")
        workers = "2"  # each of their replacements imports JAX
    server = Server(
        tmp_path,
        *("--model", "own:hangs", "--input-shape", "4", "--hang-timeout-s", "4"),
        *("--pool", pool, "--workers", workers, "--address", "local"),
        *("--deadline-s", "600", "--drain-delay-s", "1", "--drain-timeout-s", "2"),
    )
    try:
        with concurrent.futures.ThreadPoolExecutor(queries) as threads:
            calls = [threads.submit(send, "json", server, -1, "own.hangs") for _ in range(queries)]
            accepted(server, queries, "own.hangs")
            for _ in patience(ENDS):
                if server.http.get("/v2/health/ready").status_code == 503:
                    break
            time.sleep(4)  # until the first workers that hang were replaced, but not the third
            open_calls = server.status("own.hangs")["queue"]["in_flight"]
            server.signal()
            begin = time.monotonic()
            assert server.wait() == 1
            assert time.monotonic() - begin < 1 + 2 + 5
            statuses = [call.result(ENDS)[0] for call in calls]
        assert statuses.count(503) == open_calls
        assert lost(server) == {"own.hangs": open_calls}
    finally:
        server.kill()


def lost(server):
    """The requests that the log says were lost, by model."""
    (line,) = [line for line in server.log() if line["message"].startswith("requests are lost")]
    return line["lost"]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_start(tmp_path, which, code):
    """As shells say it; a container's first process would not end by itself."""
    late = "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(500)\n"
    (tmp_path / "late.py").write_text(late)
    started = command("--model", "late:model", "--input-shape", "4")
    ports = {"NERCC_HTTP_PORT": "0", "NERCC_GRPC_PORT": "0"}
    process = subprocess.Popen(
        started, cwd=tmp_path, env=environment(**ports), stderr=subprocess.DEVNULL
    )
    try:
        for _ in patience(STARTS):
            if (tmp_path / "begun").exists():
                break
        process.send_signal(which)
        assert process.wait(ENDS) == code
    finally:
        process.kill()
        process.wait()
