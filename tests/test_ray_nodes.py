"""What goes to workers in other processes, without a Ray."""

import os
import pickle
import subprocess
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require

from nercc_jax import RayPool
from nercc_jax.pools._payload import pack
from nercc_jax.pools.ray_cluster import join_ray

# Which Ray.


def test_a_folder_that_is_not_there_is_refused():
    require("ray", "ray")
    with pytest.raises(ValueError, match=r"py_modules entry must be .*; got /nowhere"):
        join_ray(None, {"py_modules": ["/nowhere"]})


REFUSED = """
import ray, time
from nercc_jax.pools.ray_cluster import join_ray
try:
    join_ray(None, {"py_modules": ["/nowhere"]})
except ValueError:
    join_ray("local")
time.sleep(8)
assert ray.nodes()
"""


@pytest.mark.slow
def test_a_ray_that_was_refused_does_not_end_the_process_later():
    """The first Ray's processes had ended, and Ray ended ours after a minute, here 3 s."""
    require("ray", "ray")
    variables = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    script = [sys.executable, "-c", REFUSED]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork
        subprocess.run(script, check=True, timeout=120, env=variables)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_where_no_ray_is_that_is_reported_at_once(address):
    require("ray", "ray")
    with pytest.raises(ConnectionError, match=f"no Ray at {address}: .*Does its head run"):
        join_ray(address)


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


def test_other_code_is_refused(tmp_path, monkeypatch):
    require("ray", "ray")
    own = version(tmp_path / "own", 2, monkeypatch)
    packed = pack((own.model, np.arange(3.0)))
    assert packed.unpack()[0](1) == 2
    version(tmp_path / "other", 3, monkeypatch)
    with pytest.raises(RuntimeError, match=r"other code than the pool: nercc_version\. Install"):
        packed.unpack()


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
