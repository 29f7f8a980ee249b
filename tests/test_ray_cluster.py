"""Pools on a cluster of several nodes: raylets on this machine, one address each."""

import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import require
from schedulers import SOON, soon

from nercc_jax import RayPool, Replication
from nercc_jax.rows import run_groups

pytestmark = pytest.mark.slow

# 20 take some minutes. Not left in the environment, where `nercc serve` looks for its settings.
WORKERS = int(os.environ.pop("NERCC_CLUSTER_WORKERS", "8"))
# Three of the nodes have room for all workers, half a CPU each.
NODES, CPUS = 4, -(-WORKERS // 6)
STARTS = 300.0  # seconds for JAX to be imported so many times, where the cores are busy


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Four nodes; this process is connected to the first, and has a folder that no node has."""
    ray = require("ray", "ray")
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("own")
    source = """
        import os
        import jax.numpy as jnp
        # By Ray to its workers, which do not read the folder itself.
        SENT = "RAY_RAYLET_PID" not in os.environ or "runtime_resources" in __file__
        def model(batch):
            return jnp.concatenate([3 * batch + 1, -batch], axis=1) + (0 if SENT else jnp.nan)
    """
    (folder / "nercc_own_model.py").write_text(textwrap.dedent(source))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
        head = {"num_cpus": CPUS, "_system_config": {"prestart_worker_first_driver": False}}
        made = started(lambda: Cluster(initialize_head=True, head_node_args=head))
        for node in range(1, NODES):
            made.add_node(num_cpus=CPUS, node_ip_address=f"127.0.0.{node + 1}")
        reset_ray_address()  # others of this machine are not to join it
        made.folder = folder
        yield made
        ray.shutdown()
        made.shutdown()


def started(make, tries=3):
    """On a busy machine a head may need longer than Ray waits for it."""
    for _ in range(tries - 1):
        with contextlib.suppress(Exception):
            return make()
    return make()


def by_node(pool):
    return sorted(collections.Counter(node for node in pool.nodes() if node).values())


def test_workers_lie_apart_and_nothing_is_lost(cluster):
    """Eight lie two on each of four nodes, with the model; one freezes, one dies, one comes."""
    import nercc_own_model

    every, fewer = ([len(part) for part in np.array_split(range(WORKERS), n)] for n in (4, 3))
    with RayPool(
        nercc_own_model.model,
        WORKERS,
        example=np.zeros((2, 1), np.float32),
        address=cluster.address,
        runtime_env={"working_dir": str(cluster.folder)},
        min_workers=WORKERS // 2,
    ) as pool:
        soon(lambda: by_node(pool) == sorted(every), STARTS)
        answers = Answers(pool)
        answers.go_on()
        # All of a node's processes stop while they have work, and go on.
        frozen, lost, *_ = cluster.worker_nodes
        strike(frozen, signal.SIGSTOP)
        answers.go_on()
        strike(frozen, signal.SIGCONT)
        # All of another's die.
        strike(lost, signal.SIGKILL)
        answers.go_on()
        soon(lambda: by_node(pool) == sorted(fewer), STARTS)
        answers.go_on()
        # A node is added, and another lost: its workers start wherever Ray puts them.
        new = cluster.add_node(num_cpus=CPUS, num_gpus=2, node_ip_address="127.0.0.9")
        answers.go_on()
        strike(frozen, signal.SIGKILL)
        answers.go_on()
        soon(lambda: not {None, frozen.node_id} & {*pool.nodes()}, STARTS)

    def memory_fraction(batch):
        return batch + np.float32(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])

    # Where there are GPUs, a worker takes one, or a part of one and of its memory.
    options = {"compiled": False, "address": cluster.address}
    with RayPool(memory_fraction, 4, actor_options={"num_cpus": 0.1}, **options) as pool:
        assert set(pool.nodes()) == {new.node_id}
        with pool.dispatch(np.zeros((4, 1, 1), np.float32)) as batch:
            np.testing.assert_allclose(batch.wait(deadline=STARTS).values, 0.45)
    options |= {"actor_options": {"num_cpus": 0.1, "num_gpus": 2}}
    wanted = "0 of 3 workers started; 3 take CPU 0.1, GPU 2 each; in the whole cluster GPU: 6 need"
    with (
        RayPool(memory_fraction, 1, **options),
        pytest.raises(RuntimeError, match=wanted),
    ):
        RayPool(memory_fraction, 3, start_timeout=3.0, **options)


def strike(node, what):
    """Sends a signal to a node's processes, the workers' too."""
    psutil = require("psutil", "bench")
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(what)


def test_a_head_that_dies_takes_nothing_with_it(cluster, tmp_path):
    """The last of this file: a run stops in words and goes on later, a server drains."""
    httpx = require("httpx", "serve-test")
    np.save(tmp_path / "points.npy", np.arange(400, dtype=np.float32)[:, None])
    # Ray ends a process so many seconds after its head.
    variables = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    nercc = str(Path(sys.executable).with_name("nercc"))
    own = ["--pool", "ray", "--address", cluster.address, "--actor-options", "num_gpus = 0"]
    code = ["--num-data", "2", "--num-workers", "4"]
    model = ["--model", "nercc_own_model:model"]
    run = [nercc, "run", *model, "--inputs", str(tmp_path / "points.npy"), *code]
    own += ["--runtime-env", f"working_dir = '{cluster.folder}'"]
    slow = ["--faults", "straggler_rate = 1, straggler_delay_s = 0.4", "--workers", "2"]
    output = ["--output", str(tmp_path / "result.npz")]
    port = free_port()
    serve = [nercc, "serve", *model, *own, *code, "--workers", "2", "--input-shape", "1"]
    serve += ["--http-port", str(port), "--grpc-port", "none", "--drain-timeout-s", "2"]
    url = f"http://127.0.0.1:{port}"
    infer = f"{url}/v2/models/nercc_own_model.model/infer"
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 1], "data": [2.0]}

    def ready():
        with contextlib.suppress(httpx.HTTPError):
            return client.get(f"{url}/v2/health/ready").status_code == 200
        return False

    parts = tmp_path / "result.npz.parts" / "manifest.json"
    with (tmp_path / "log").open("w") as log, httpx.Client(timeout=SOON, trust_env=False) as client:
        streams = {"cwd": cluster.folder, "env": variables, "stdout": log, "stderr": log}
        server = subprocess.Popen([*serve, "--max-batch-size", "1"], **streams)
        runner = None
        try:
            soon(lambda: ready() or server.poll() is not None, STARTS, every=0.2)
            # It is frozen, and goes on.
            head = cluster.head_node.all_processes["gcs_server"][0].process
            head.send_signal(signal.SIGSTOP)
            soon(lambda: not ready(), every=0.2)
            answer = httpx.post(infer, json={"inputs": [tensor]}, timeout=SOON)
            assert answer.status_code == 200, answer.text
            head.send_signal(signal.SIGCONT)
            soon(ready, every=0.2)
            assert server.poll() is None
            runner = subprocess.Popen([*run, *own, *slow, *output], **streams)
            soon(lambda: parts.exists() or runner.poll() is not None, STARTS)
            cluster.head_node.kill_gcs_server()
            begin = time.monotonic()
            soon(lambda: not ready(), every=0.2)
            assert time.monotonic() - begin < 20  # 2 to 4 s, where the cores are not busy
            answer = client.post(infer, json={"inputs": [tensor]})
            assert answer.status_code == 200, answer.text
            assert answer.json()["outputs"][0]["data"] == [7.0, -2.0]
            assert runner.wait(SOON) == 3
            assert server.wait(SOON) == 0
        finally:
            server.kill()
            if runner is not None:
                runner.kill()
    text = (tmp_path / "log").read_text()
    assert "takes connections and says nothing, as a process that is stopped" in text
    assert "Ray's head answers again" in text
    assert "does not answer: workers go on, none is replaced" in text
    assert "stopped before Ray ends this process" in text
    written = json.loads(parts.read_text())["parts"]
    rows = np.concatenate([np.load(parts.parent / part["file"])["index"] for part in written])
    done = len(rows)
    assert len(np.unique(rows)) == done
    assert 0 < done < 400
    resumed = subprocess.run(
        [*run, *output, "--resume"], cwd=cluster.folder, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"{done} rows are done already" in resumed.stdout
    with np.load(tmp_path / "result.npz") as rows:
        np.testing.assert_array_equal(rows["index"], np.arange(400))
        assert rows["recovered"].all()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Answers:
    """Batches of numbers of which no two are alike, run one after the other."""

    def __init__(self, pool):
        self._pool, self._next = pool, 0

    def go_on(self, batches=20):
        """Nothing is lost or swapped."""
        begin = self._next
        self._next += batches * 8
        x = np.arange(begin, self._next, dtype=np.float32)[:, None]
        found = run_groups(self._pool, Replication(2, WORKERS), x, enough=6, groups=4)
        expected = np.concatenate([3 * x + 1, -x], axis=-1)
        np.testing.assert_array_equal(found.arrays["predictions"], expected)
