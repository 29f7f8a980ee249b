"""A server on a cluster of which a node is killed, then one frozen: what its clients see.

    python bench/cluster.py [--label after] [--output bench/results/cluster.json]

A head that does no work and three nodes are raylets of this machine, an address each. `nercc serve`
runs LeNet5 behind a code on workers of theirs, and gets single images as a stream, latency counted
from the scheduled arrival. A row is a stretch of the stream: undisturbed, from the moment in which
all processes of a node are killed (SIGKILL), after that, from the moment in which all of another
one's stop (SIGSTOP), and when they go on. The result is put beside others in the file, by label.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import httpx
import numpy as np
import psutil
from _cluster_stream import latencies, stretch
from _report import environment, write_json
from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster

PORT = 18571
URL = f"http://127.0.0.1:{PORT}"
INFER = f"{URL}/v2/models/lenet5-digits/infer"
PACKAGES = ("jax", "numpy", "ray", "nercc-jax")
TIMEOUT = 30.0  # seconds of a client
STARTS = 240.0  # seconds for the server at most
SERVE = ["serve", "--model", "lenet5-digits", "--pool", "ray", "--grpc-port", "none"]


@contextlib.contextmanager
def cluster_of(nodes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork
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
    nercc = str(Path(sys.executable).with_name("nercc"))
    command = [nercc, *SERVE, "--http-port", str(PORT), "--drain-timeout-s", "1"]
    variables = os.environ | {"RAY_ADDRESS": cluster.address}
    log = Path(f"/tmp/nercc-bench-{os.getpid()}.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, env=variables, stderr=file)
    try:
        end = time.monotonic() + STARTS
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{URL}/v2/health/ready").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"the server did not start: see {log}")
        yield process
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


def cell(name, seen, placed):
    row = {
        "stretch": name,
        "workers_by_node": placed,
        "queries": len(seen),
        "errors": sum(status != 200 for _, status, _ in seen),
        **latencies(seen),
        "exact": round(sum(exact for *_, exact in seen) / len(seen), 4),
    }
    print(json.dumps(row), flush=True)
    return row


def measure(head, nodes, seconds, rate):
    """Return a row for each stretch."""
    rows = []

    def run(name):
        placed = workers_by_node([head, *nodes])
        rows.append(cell(name, asyncio.run(stretch(INFER, seconds, rate, TIMEOUT)), placed))

    asyncio.run(stretch(INFER, 5.0, rate, TIMEOUT))  # it learns how long answers take
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


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--label", default="after")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a stretch")
    parser.add_argument("--rate", type=float, default=20.0, help="queries a second")
    parser.add_argument("--output", type=Path)
    summary = parser.parse_args()
    with cluster_of(3) as (cluster, nodes), server_on(cluster):
        rows = measure(cluster.head_node, nodes, summary.seconds, summary.rate)
    if summary.output is not None:
        found = json.loads(summary.output.read_text()) if summary.output.is_file() else {}
        about = {
            "rate": summary.rate,
            "seconds": summary.seconds,
            "environment": environment(PACKAGES),
        }
        write_json(summary.output, found | {summary.label: about | {"rows": rows}})


if __name__ == "__main__":
    main()
