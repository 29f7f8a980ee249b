"""500 clients, while workers straggle and die: nobody is lost or mixed up.

Half an hour of it: NERCC_SOAK_SECONDS=1800 pytest -m slow tests/serving/test_soak.py
"""

import asyncio
import os
import random
import signal
import time

import numpy as np
import pytest
from conftest import require

pytestmark = pytest.mark.slow

CLIENTS = 500
SECONDS = float(os.environ.get("NERCC_SOAK_SECONDS", "10"))
WORKERS = 6
KILL_EVERY = 2.0
STRAGGLERS = 0.15
HANG = 60.0  # seconds after which a client takes its request to be lost


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    require("fastapi", "serve")
    require("ray", "ray")
    from nercc_server import Server

    server = Server(
        tmp_path_factory.mktemp("soak"),
        NERCC_MODELS='[{"model": "lenet5-digits"}]',
        NERCC_DEFAULTS__POOL="ray",
        NERCC_DEFAULTS__WORKERS=str(WORKERS),
        NERCC_DEFAULTS__STRAGGLER_RATE=str(STRAGGLERS),
        NERCC_DEFAULTS__STRAGGLER_DELAY_S="0.5",
        NERCC_DEFAULTS__MAX_BATCH_SIZE="32",
        NERCC_DEFAULTS__DEADLINE_S="30",
        NERCC_DRAIN_TIMEOUT_S="60",
    )
    yield server
    server.kill()


class Clients:
    """What each of them saw."""

    def __init__(self, url):
        import equinox as eqx

        from nercc_models import load_data, load_model

        network = load_model("lenet5-digits")
        self.images = np.asarray(network.preprocess(load_data(network.data, "test").images))
        self.own = np.asarray(eqx.filter_jit(network)(self.images))
        self.url = f"{url}/v2/models/lenet5-digits/infer"
        self.exact = self.approximate = self.agree = self.swapped = 0
        self.errors: dict[str, int] = {}
        self.lost = 0
        self.after_stop = 0
        self.stopped = False

    async def ask(self, session, query, name):
        import aiohttp
        import orjson

        x = self.images[query : query + 1]
        raw = x.astype("<f4").tobytes()
        tensor = {
            "name": "input",
            "shape": list(x.shape),
            "datatype": "FP32",
            "parameters": {"binary_data_size": len(raw)},
        }
        head = orjson.dumps({"id": name, "inputs": [tensor]})
        headers = {"Inference-Header-Content-Length": str(len(head))}
        stopped = self.stopped
        try:
            async with session.post(self.url, data=head + raw, headers=headers) as answer:
                body = await answer.json(content_type=None)
        except TimeoutError:
            self.lost += 1
            return
        except aiohttp.ClientError:
            # Explicit, but only to be had from a server that has been asked to end.
            self.after_stop += self.stopped
            self.lost += not self.stopped
            return
        if answer.status != 200:
            assert body["error"]
            kind = str(answer.status) + (" stopped" if stopped or self.stopped else "")
            self.errors[kind] = self.errors.get(kind, 0) + 1
            return
        assert body["id"] == name
        values = np.array(body["outputs"][0]["data"])
        if body["parameters"]["nercc_exact"]:
            self.exact += 1
            # Each image has outputs of its own: another's would be far off.
            self.swapped += bool(np.abs(values - self.own[query]).max() > 1e-3)
        else:
            self.approximate += 1
            self.agree += bool(values.argmax() == self.own[query].argmax())

    async def run(self, disturb, seconds):
        import aiohttp

        self.end = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=HANG)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

            async def client(number):
                draw = random.Random(number)
                step = 0
                while not self.stopped and time.monotonic() < self.end:
                    await self.ask(session, draw.randrange(len(self.images)), f"{number}-{step}")
                    step += 1

            disturbing = asyncio.create_task(disturb(self))
            await asyncio.gather(*(client(number) for number in range(CLIENTS)))
            await disturbing


def workers_of(server):
    """The processes of the server's Ray actors."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::Actor"):
            parents = {parent.pid for parent in process.parents()}
            if server.process.pid in parents or _raylet_of(server, process):
                found.append(process.info["pid"])
    return found


def _raylet_of(server, process):
    """Ray's own processes outlive their parent's name: they share the server's session folder."""
    raylet = next((p for p in process.parents() if "raylet" in p.name()), None)
    return raylet is not None and any(p.pid == server.process.pid for p in raylet.parents())


def memory_of(server):
    import psutil

    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def test_trouble_under_full_load(server):
    clients = Clients(server.url)
    memory = []
    kills = 0

    async def disturb(clients):
        nonlocal kills
        draw = random.Random(0)
        begin = time.monotonic()
        while time.monotonic() < begin + SECONDS:
            await asyncio.sleep(KILL_EVERY)
            workers = await asyncio.to_thread(workers_of, server)
            if len(workers) > WORKERS // 2:  # on a busy machine new ones take their time
                os.kill(draw.choice(workers), signal.SIGKILL)
                kills += 1
            memory.append(memory_of(server))
        clients.stopped = True
        server.signal()  # under full load

    asyncio.run(clients.run(disturb, SECONDS + 60))
    status = server.wait()
    print({name: what for name, what in vars(clients).items() if isinstance(what, int | dict)})
    print(f"kills {kills}, memory {[round(m) for m in memory]}")

    assert status == 0
    assert kills >= 2
    assert clients.lost == 0
    assert clients.swapped == 0
    answered = clients.exact + clients.approximate
    assert answered > 4 * CLIENTS
    assert clients.approximate > 0
    # Decoded ones are flagged, and nearly all right.
    assert clients.agree / clients.approximate > 0.85
    # Others got the reason: three workers died with the query, or nobody had time for it.
    before = {kind: n for kind, n in clients.errors.items() if "stopped" not in kind}
    assert set(before) <= {"502", "504"}
    assert sum(before.values()) < 0.2 * answered
    # The second half of the run needs no more memory than the first.
    half = len(memory) // 2
    assert max(memory[half:]) < max(memory[:half]) + 60
    log = server.log()
    assert any(line["message"] == "draining" for line in log)
    # A Ray that is slow to start on a busy machine is started again.
    lines = [line["message"] for line in log]
    lines = [line for line in lines if not line.startswith("Ray did not start")]
    assert not [line for line in lines if "failed" in line]
