"""Which node a worker is given, when it moves, whether the head is there: without a Ray."""

import contextlib
import dataclasses
import math
import pickle
import socket
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require

from nercc_jax import RayPool
from nercc_jax.pools._ray import NodeWatch
from nercc_jax.pools._ray_backend import (
    ActorBackend,
    EncodedInputs,
    Node,
    NodePlacement,
    choose_node,
    crowding,
    demand_of,
    node_to_leave,
    pack,
)
from nercc_jax.pools._ray_cluster import HeadProbe
from nercc_jax.pools._scheduler import Scheduler

FIRST, SECOND = "1" * 56, "2" * 56  # as Ray names nodes
BACKEND_FILES = ("_ray_backend",)


def nodes(*cpus, **others):
    return [
        Node(f"n{number}", f"10.0.0.{number}", {"CPU": float(each), **others})
        for number, each in enumerate(cpus)
    ]


HALF = {"CPU": 0.5}


def placed(found, demand, workers):
    """How many workers each node gets, one after the other."""
    held: dict[str, int] = {}
    for _ in range(workers):
        node = choose_node(found, demand, held)
        if node is None:
            break
        held[node.id] = held.get(node.id, 0) + 1
    return [held.get(node.id, 0) for node in found]


@pytest.mark.parametrize(
    ("cpus", "demand", "workers", "expected"),
    [
        ((4, 4, 4, 4), HALF, 20, [5, 5, 5, 5]),
        ((1, 8, 8), HALF, 12, [2, 5, 5]),  # the small one is full
        ((0, 8, 8), HALF, 12, [0, 6, 6]),  # a head that is to do no work
        ((2, 2), HALF, 10, [4, 4]),  # the others wait
        ((1, 1), {}, 5, [3, 2]),
        ((4, 4), {"CPU": 0.5, "GPU": 1.0}, 4, [0, 0]),
    ],
)
def test_workers_are_spread_as_nodes_have_room(cpus, demand, workers, expected):
    assert placed(nodes(*cpus), demand, workers) == expected


def test_gpus_count_as_well():
    found = [*nodes(8), Node("g", "10.0.0.9", {"CPU": 8.0, "GPU": 2.0})]
    assert placed(found, {"CPU": 0.5, "GPU": 0.25}, 10) == [0, 8]
    options = {"num_cpus": 0, "num_gpus": 1, "resources": {"TPU": 4}}
    assert demand_of(options) == {"GPU": 1.0, "TPU": 4.0}


def test_a_worker_moves_where_that_makes_them_even():
    found = nodes(8, 8, 8)
    assert node_to_leave(found, HALF, {"n0": 6, "n1": 5}) == "n0"
    assert node_to_leave(found, HALF, {"n0": 4, "n1": 4, "n2": 3}) is None
    # A node that is gone has none; nor is a worker moved where there is no room.
    assert node_to_leave(nodes(8), HALF, {"n0": 6}) is None
    assert node_to_leave(nodes(8, 0), HALF, {"n0": 6}) is None


def test_crowded_nodes_are_reported():
    assert crowding({"a": 5, "b": 5, "c": 5, "d": 5}, 12) is None
    message = crowding({"a": 10, "b": 10}, 8)
    assert message is not None
    assert "one of 2 node(s) holds 10 of 20 workers" in message
    assert "3 nodes with room for 8 workers" in message


def test_moves_are_one_at_a_time_and_not_while_workers_start():
    scheduler, backend = mock.Mock(spec=Scheduler), mock.Mock(spec=ActorBackend)
    scheduler.report.return_value.starting = 1
    backend.misplaced.return_value, backend.places.return_value = 3, []

    def watch(every):
        return NodeWatch(HeadProbe("127.0.0.1:1"), scheduler, backend, None, every)

    often = watch(every=0.0)
    often.look()
    assert not scheduler.restart.called
    scheduler.report.return_value.starting = 0
    often.look()
    often.look()
    assert scheduler.restart.call_args_list == [mock.call(3), mock.call(3)]
    assert backend.places.call_count == 1
    watch(every=1e3).look()
    assert scheduler.restart.call_count == 2


def test_a_worker_that_was_placed_elsewhere_than_planned_is_counted_where_it_is(monkeypatch):
    """A Ray of two nodes whose actors all come to lie on the second, whatever was asked for."""
    require("ray", "ray")
    ray = mock.MagicMock()
    ray.cluster_resources.return_value = {"CPU": 16.0}
    ray.nodes.return_value = [
        {"NodeID": name, "NodeManagerAddress": name, "Resources": {"CPU": 8.0}, "Alive": True}
        for name in (FIRST, SECOND)
    ]
    placed_actor = ray.remote.return_value.return_value.options
    actor = placed_actor.return_value.remote.return_value
    answers = {"where": NodePlacement(1, "cpu", SECOND), "load": None, "wait_for_death": ...}
    for method, answer in answers.items():
        future = getattr(actor, method).remote.return_value.future.return_value = Future()
        if answer is not ...:
            future.set_result(answer)
    for file in BACKEND_FILES:
        monkeypatch.setattr(f"nercc_jax.pools.{file}.ray_module", lambda: ray)
    backend = ActorBackend(EncodedInputs(b"", []), (False, None), {"num_cpus": 0.5}, lambda: False)
    for worker in range(4):
        ready = threading.Event()
        backend.start(worker, 0, lambda *outcome, ready=ready: ready.set())
        assert ready.wait(60)
    assert [place.node for place in backend.places()] == [SECOND] * 4
    assert backend.held() == {SECOND: 4}
    backend.close()
    # None of them lies on the first, so that is where each of them was asked to be.
    asked = [call.kwargs["scheduling_strategy"].node_id for call in placed_actor.call_args_list]
    assert asked == [FIRST] * 4


@contextlib.contextmanager
def answering(server):
    """Somebody who is awake behind a socket that listens."""

    def answer():
        with contextlib.suppress(OSError):  # it was closed
            while True:
                # Who asked may have gone.
                with server.accept()[0] as connection, contextlib.suppress(OSError):
                    assert connection.recv(100).startswith(b"PRI * HTTP/2.0")
                    connection.sendall(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_head_that_is_gone_or_frozen_is_noticed(monkeypatch, caplog):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
    with socket.create_server(("127.0.0.1", 0)) as server, answering(server):
        port = server.getsockname()[1]
        probe = HeadProbe(f"127.0.0.1:{port}", every=0.0, timeout=0.2)
        probe.look()
        assert probe.alarm is None
        assert math.isinf(probe.ends_at)
    probe.look()
    assert not probe.gone  # one may be lost
    probe.look()
    assert probe.gone
    assert f"Ray's head at 127.0.0.1:{port} does not answer" in str(probe.alarm)
    assert time.monotonic() < probe.ends_at < time.monotonic() + 30
    with socket.create_server(("127.0.0.1", port)) as server:  # whose process does not run
        probe.look()
        assert probe.gone
        assert f"head at 127.0.0.1:{port} takes connections and says nothing" in str(probe.alarm)
        assert math.isinf(probe.ends_at), "Ray does not notice"
        with answering(server):
            probe.look()
            assert probe.alarm is None
    assert "Ray's head answers again" in caplog.text


# What goes to workers.

READER = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
packed = pickle.load(open(sys.argv[1], "rb"))
models, x = packed.unpack()
pickle.dump(([jax.device_get(each(x)) for each in models],
             [len(jax.tree.leaves(each)) for each in models]), open(sys.argv[2], "wb"))
# A worker starts again wherever one dies: what it has no use for, it does not import.
assert not {"scipy", "optax", "flax"} & set(sys.modules), sorted(sys.modules)
"""


def own_models():
    """Of classes that no other process can import."""

    class Base(eqx.Module):
        scale: float = 2.0

        def __call__(self, x):
            return self.scale * x

    class Own(Base):
        w: jax.Array
        name: str = eqx.field(static=True)

        def __init__(self, w):
            self.w, self.name = w, "own"

        def __call__(self, x):
            return super().__call__(x @ self.w)

    class Plain(eqx.Module):
        w: jax.Array
        b: jax.Array = eqx.field(converter=jnp.asarray, default=0.5)

        def __call__(self, x):
            return x @ self.w + self.b

    w = jnp.arange(6.0).reshape(2, 3)
    half = w.astype(jnp.bfloat16)
    weak = jnp.asarray(3.0)
    return [Own(w), Plain(w), lambda x: x @ half.astype(jnp.float32) * weak]


def test_own_classes_are_pytrees_at_workers_too(tmp_path):
    require("ray", "ray")
    models, x = own_models(), np.ones((2, 2), np.float32)
    packed = pack((models, x))
    # Beside the rest, and each once, whoever holds it.
    assert sorted(each.nbytes for each in packed.arrays) == [2 * 6, 4 * 4, 4 * 6]
    (tmp_path / "packed").write_bytes(pickle.dumps(packed))
    script = [sys.executable, "-c", READER, str(tmp_path / "packed"), str(tmp_path / "read")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork
        subprocess.run(script, check=True, timeout=120)
    answers, leaves = pickle.loads((tmp_path / "read").read_bytes())
    for answer, model in zip(answers, models, strict=True):
        np.testing.assert_allclose(answer, model(x), rtol=1e-6)
    assert leaves == [len(jax.tree.leaves(each)) for each in models]


VERSION = """
def model(x):
    return {factor} * x
"""


def version(folder, factor, monkeypatch):
    """A folder with a module of this version, which is imported from there."""
    folder.mkdir()
    (folder / "nercc_version.py").write_text(VERSION.format(factor=factor))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "nercc_version", raising=False)
    return __import__("nercc_version")


def test_other_code_and_other_weights_are_refused(tmp_path, monkeypatch):
    require("ray", "ray")
    own = version(tmp_path / "own", 2, monkeypatch)
    packed = pack((own.model, np.arange(3.0)))
    assert packed.unpack()[0](1) == 2
    version(tmp_path / "other", 3, monkeypatch)
    with pytest.raises(RuntimeError, match=r"other code than the pool: nercc_version\. Install"):
        packed.unpack()
    other = dataclasses.replace(packed, code={}, arrays=[each + 1 for each in packed.arrays])
    with pytest.raises(RuntimeError, match="other weights than were sent"):
        other.unpack()


@pytest.mark.slow
def test_a_worker_with_other_code_does_not_start(tmp_path, monkeypatch):
    require("ray", "ray")
    version(tmp_path / "there", 3, monkeypatch)
    own = version(tmp_path / "here", 2, monkeypatch)
    there = {"env_vars": {"PYTHONPATH": str(tmp_path / "there")}}
    with pytest.raises(RuntimeError, match="other code than the pool: nercc_version"):
        RayPool(own.model, 1, address="local", actor_options={"runtime_env": there})


def test_what_cannot_be_sent_is_reported():
    require("ray", "ray")
    lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="by pickle: cannot pickle"):
        pack(lambda x: (lock, x))


# What goes along.


def test_a_model_that_is_not_installed_has_its_folder_sent_along(tmp_path, monkeypatch):
    from nercc_jax.cli._ray_job import RayJob, own_folders

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "nercc_alone.py").touch()
    (tmp_path / "b" / "nercc_package").mkdir(parents=True)
    (tmp_path / "b" / "nercc_package" / "__init__.py").touch()
    for folder in ("a", "b"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    sent = own_folders(["nercc_alone:model", "lenet5-digits", "jax.numpy:sin", "nercc_jax:x"])
    assert sent["working_dir"] == str(tmp_path / "a")
    assert "py_modules" not in sent
    both = own_folders(["nercc_alone:model", "nercc_package.inner:model"])
    assert both["py_modules"] == [str(tmp_path / "b" / "nercc_package")]
    assert own_folders(["lenet5-digits"]) == {}

    (tmp_path / "env.yaml").write_text("env_vars: {A: b}\nworking_dir: elsewhere")
    job = RayJob(working_dir=tmp_path / "a", runtime_env=tmp_path / "env.yaml")
    assert job.environment() == {"env_vars": {"A": "b"}, "working_dir": str(tmp_path / "a")}
    with pytest.raises(ValueError, match="--py-modules /nowhere: there is no such"):
        RayJob(py_modules=[tmp_path.__class__("/nowhere")])


def test_the_folder_is_sent_to_a_ray_that_is_joined_unless_something_else_is(tmp_path, monkeypatch):
    from nercc_jax.cli._ray_job import RayJob

    (tmp_path / "nercc_alone.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    joined = []
    monkeypatch.setattr("nercc_jax.pools.join_ray", lambda *arguments: joined.append(arguments))
    RayJob("HEAD:1").connect(["nercc_alone:model"])
    RayJob("HEAD:1", working_dir=tmp_path.parent).connect(["nercc_alone:model"])
    (address, here, there), (_, _, chosen) = joined
    assert (address, here) == ("HEAD:1", {}), "a Ray that is started here needs no copy"
    assert there["working_dir"] == str(tmp_path)
    assert chosen == {"working_dir": str(tmp_path.parent)}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_where_no_ray_is_that_is_reported_at_once(address):
    ray = require("ray", "ray")
    from nercc_jax.pools import join_ray

    if ray.is_initialized():
        pytest.skip("this process is part of a Ray")
    with pytest.raises(ConnectionError, match=f"no Ray at {address}: .*Does its head run"):
        join_ray(address)
