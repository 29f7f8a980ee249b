"""A node of a cluster, or a replica of Ray Serve, is killed: what clients of the server see.

    python bench/cluster.py [--label first] [--output bench/results/cluster.json]
    python bench/cluster.py --replicas [--rounds 3] [--output bench/results/replica.json]

Single images come as a stream, latency counted from the scheduled arrival; a row is a stretch of
it. A head that does no work and three nodes are raylets of this machine, an address each, and
`nercc serve` runs LeNet5 behind a code on workers of theirs: undisturbed, from the moment in which
all processes of a node are killed (SIGKILL), after that, from the moment in which all of another
one's stop (SIGSTOP), and when they go on. The result is put beside others in the file, by label.

With `--replicas`, LeNet5 is behind two replicas of the Ray Serve application with two workers each:
undisturbed, and from the moment in which the process of one replica is killed, with the seconds
until two are ready again, with all their workers.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import httpx
import numpy as np
import psutil
import ray
from _report import environment, read_json, write_json
from ray import serve
from ray._common.utils import reset_ray_address
from ray._private import state
from ray.cluster_utils import Cluster
from ray.serve._private.common import ReplicaState

MODEL = "lenet5-digits"
PACKAGES = ("jax", "numpy", "ray", "nercc-jax")
TIMEOUT = 30.0  # seconds of a client
SERVE_TIMEOUT = 60.0  # as Serve's own limit in docs/deploy/ray-serve.yaml
STARTS = 240.0  # seconds for the server at most
SERVER = ["serve", "--model", MODEL, "--pool", "ray", "--grpc-port", "none"]
REPLICAS, WORKERS = 2, 2


async def stretch(url, seconds, rate, timeout):
    """Send a query at each tick; return (latency in s, status, whether it is exact) of each."""
    x = np.random.default_rng(0).uniform(size=1024).round(3).tolist()
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 32, 32, 1], "data": x}
    seen = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:

        async def ask(due):
            try:
                answer = await client.post(url, json={"inputs": [tensor]})
                summary = answer.json()["outputs"] if answer.status_code == 200 else []
                outputs = {each["name"]: each["data"] for each in summary}
                exact = bool(outputs.get("exact", [False])[0])
                seen.append((time.monotonic() - due, answer.status_code, exact))
            except httpx.HTTPError as error:
                seen.append((time.monotonic() - due, type(error).__name__, False))

        start, tasks = time.monotonic(), []
        for number in range(int(seconds * rate)):
            due = start + number / rate
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(ask(due)))
        await asyncio.gather(*tasks)
    return seen


def cell(name, seen, **about):
    times = np.array([1e3 * seconds for seconds, status, _ in seen if status == 200])
    row = {
        "stretch": name,
        **about,
        "queries": len(seen),
        "errors": len(seen) - len(times),
        "p50_ms": round(float(np.median(times)), 1),
        "p99_ms": round(float(np.quantile(times, 0.99)), 1),
        "max_ms": round(float(times.max()), 1),
        "exact": round(sum(exact for *_, exact in seen) / len(seen), 4),
    }
    print(json.dumps(row), flush=True)
    return row


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def cluster_of(nodes):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found = [
        cluster.add_node(num_cpus=8, node_ip_address=f"127.0.0.{number + 2}")
        for number in range(nodes)
    ]
    reset_ray_address()  # nobody else is to join it
    try:
        yield cluster, found
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def server_on(cluster):
    """Run `nercc serve` on the cluster, and yield its address."""
    nercc, port = str(Path(sys.executable).with_name("nercc")), free_port()
    command = [nercc, *SERVER, "--http-port", str(port), "--drain-timeout-s", "1"]
    variables = os.environ | {"RAY_ADDRESS": cluster.address}
    log = Path(f"/tmp/nercc-bench-{os.getpid()}.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env=variables, stderr=file)
    try:
        end = time.monotonic() + STARTS
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"the server did not start: see {log}")
        yield f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
    finally:
        process.terminate()
        process.wait()


def processes_of(node):
    """Return the raylet of a node, and all that it started."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def workers_by_node(nodes):
    """Return for each node how many of its processes are workers of a pool."""
    named = [[" ".join(each.cmdline()) for each in processes_of(node)] for node in nodes]
    return [
        sum(name.startswith(("ray::Actor", "ray::_Actor")) for name in names) for names in named
    ]


def fullest(nodes):
    """Return the node with the most workers: the worst that can happen."""
    return nodes[int(np.argmax(workers_by_node(nodes)))]


def strike(node, what):
    for process in processes_of(node):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def nodes_die(seconds, rate):
    """Return a row for each stretch in which a node is well, dead or frozen."""
    rows = []
    with cluster_of(3) as (cluster, nodes), server_on(cluster) as url:

        def run(name):
            placed = workers_by_node([cluster.head_node, *nodes])
            seen = asyncio.run(stretch(url, seconds, rate, TIMEOUT))
            rows.append(cell(name, seen, workers_by_node=placed))

        asyncio.run(stretch(url, 5.0, rate, TIMEOUT))  # it learns how long answers take
        run("undisturbed")
        first = fullest(nodes)
        strike(first, signal.SIGKILL)
        nodes.remove(first)
        run("a node is killed")
        run("after that")
        second = fullest(nodes)
        strike(second, signal.SIGSTOP)
        run("a node is frozen")
        strike(second, signal.SIGCONT)
        run("it goes on")
    return rows


def alive(class_name):
    """Return the process ids of living actors, by the name of their class."""
    actors = [each for each in state.actors().values() if each["State"] == "ALIVE"]
    return [each["Pid"] for each in actors if each["ActorClassName"].split(":")[0] == class_name]


def whole(but=()):
    """Return whether all replicas but these take requests, with all their workers."""
    (deployment,) = serve.status().applications["nercc"].deployments.values()
    complete = len(set(alive("ServeReplica")) - set(but)) == REPLICAS
    complete &= len(alive("Actor")) == REPLICAS * WORKERS
    return complete and deployment.replica_states.get(ReplicaState.RUNNING, 0) == REPLICAS


def replicas_die(seconds, rate, rounds):
    """Return two rows a round: undisturbed, and while a replica dies and comes back."""
    from nercc_jax.cli.ray_serve import app

    port, rows = free_port(), []
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    http = {"host": "127.0.0.1", "port": port, "request_timeout_s": SERVE_TIMEOUT}
    serve.start(http_options=http)
    application = app({"model": MODEL, "workers": WORKERS, "scheme": "uncoded"})
    deployment = application._bound_deployment.options(num_replicas=REPLICAS)
    arguments = application._bound_deployment.init_args
    serve.run(deployment.bind(*arguments), name="nercc", route_prefix="/")
    while not whole():
        time.sleep(0.2)
    url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
    for _ in range(rounds):
        seen = asyncio.run(stretch(url, seconds / 3, rate, SERVE_TIMEOUT))
        rows.append(cell("undisturbed", seen))
        took, victim, begin = [], alive("ServeReplica")[0], time.monotonic()

        def watch(took=took, victim=victim, begin=begin):
            while not whole(but=[victim]):
                time.sleep(0.2)
            took.append(round(time.monotonic() - begin, 1))

        watcher = threading.Thread(target=watch, daemon=True)
        os.kill(victim, signal.SIGKILL)
        watcher.start()
        seen = asyncio.run(stretch(url, seconds, rate, SERVE_TIMEOUT))
        watcher.join(SERVE_TIMEOUT)
        rows.append(cell("a replica is killed", seen, whole_again_s=took[0] if took else None))
    serve.shutdown()
    ray.shutdown()
    return rows


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--replicas", action="store_true", help="of Ray Serve, in place of nodes")
    parser.add_argument("--label", default="first")
    parser.add_argument("--seconds", type=float, help="of a stretch (15; of replicas 30)")
    parser.add_argument("--rate", type=float, help="queries a second (20; of replicas 10)")
    parser.add_argument("--rounds", type=int, default=3, help="of replicas")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seconds = options.seconds or (30.0 if options.replicas else 15.0)
    rate = options.rate or (10.0 if options.replicas else 20.0)
    warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
    if options.replicas:
        about = {"rate": rate, "replicas": REPLICAS, "workers": WORKERS}
        about |= {"rows": replicas_die(seconds, rate, options.rounds)}
        content = about | {"environment": environment(PACKAGES)}
    else:
        about = {"rate": rate, "seconds": seconds, "environment": environment(PACKAGES)}
        content = {options.label: about | {"rows": nodes_die(seconds, rate)}}
        if options.output is not None:
            content = read_json(options.output) | content
    if options.output is not None:
        write_json(options.output, content)


if __name__ == "__main__":
    main()
