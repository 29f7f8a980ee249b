"""Two replicas of the Ray Serve application, of which one is killed: what clients see.

    python bench/replica.py [--output bench/results/replica.json]

A Ray of this machine, LeNet5 behind two replicas with two workers each, single images as a stream,
latency counted from the scheduled arrival. A row is a stretch of the stream: undisturbed, and from
the moment in which the process of one replica is killed (SIGKILL); and how long it took until Serve
had two replicas again that are ready, with all their workers.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
import warnings
from pathlib import Path

from _cluster_stream import latencies, stretch
from _report import environment, write_json

MODEL = "lenet5-digits"
PACKAGES = ("jax", "numpy", "ray", "nercc-jax")
TIMEOUT = 60.0  # seconds of a client: as Serve's own limit in docs/deploy/ray-serve.yaml
WORKERS = 2  # of a replica
REPLICAS = 2


def alive(class_name):
    """Return the process ids of living actors, by the name of their class."""
    from ray._private import state

    actors = [each for each in state.actors().values() if each["State"] == "ALIVE"]
    return [each["Pid"] for each in actors if each["ActorClassName"].split(":")[0] == class_name]


def running():
    """Return the number of replicas that take requests."""
    from ray import serve
    from ray.serve._private.common import ReplicaState

    (deployment,) = serve.status().applications["nercc"].deployments.values()
    return deployment.replica_states.get(ReplicaState.RUNNING, 0)


def whole(but=()):
    replicas = set(alive("ServeReplica")) - set(but)
    complete = len(replicas) == REPLICAS and len(alive("Actor")) == REPLICAS * WORKERS
    return complete and running() == REPLICAS


def cell(name, seen):
    wrong = [str(status) for _, status, _ in seen if status != 200]
    return {
        "stretch": name,
        "queries": len(seen),
        "errors": {status: wrong.count(status) for status in sorted(set(wrong))},
        **latencies(seen),
    }


def killed(url, seconds, rate):
    """Return the stretch in which a replica dies, and the seconds until there are two again."""
    took = []

    def watch(victim, begin):
        while not whole(but=[victim]):
            time.sleep(0.2)
        took.append(time.monotonic() - begin)

    victim = alive("ServeReplica")[0]
    watcher = threading.Thread(target=watch, args=(victim, time.monotonic()), daemon=True)
    os.kill(victim, signal.SIGKILL)
    watcher.start()
    row = cell("a replica is killed", asyncio.run(stretch(url, seconds, rate, TIMEOUT)))
    watcher.join(TIMEOUT)
    return row | {"whole_again_s": round(took[0], 1) if took else None}


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of a stretch")
    parser.add_argument("--rate", type=float, default=10.0, help="queries a second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    summary = parser.parse_args()
    warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
    import ray
    from ray import serve

    from nercc_jax.cli.ray_serve import app

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": TIMEOUT})
    application = app({"model": MODEL, "workers": WORKERS, "scheme": "uncoded"})
    deployment = application._bound_deployment.options(num_replicas=REPLICAS)
    arguments = application._bound_deployment.init_args
    serve.run(deployment.bind(*arguments), name="nercc", route_prefix="/")
    while not whole():
        time.sleep(0.2)
    url = f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer"
    rows = []
    for number in range(summary.rounds):
        rows.append(
            cell(
                "undisturbed", asyncio.run(stretch(url, summary.seconds / 3, summary.rate, TIMEOUT))
            )
        )
        rows.append(killed(url, summary.seconds, summary.rate))
        for row in rows[-2:]:
            print(json.dumps({"round": number, **row}), flush=True)
    serve.shutdown()
    ray.shutdown()
    if summary.output is not None:
        about = {"rate": summary.rate, "replicas": REPLICAS, "workers": WORKERS}
        write_json(summary.output, about | {"rows": rows, "environment": environment(PACKAGES)})


if __name__ == "__main__":
    main()
