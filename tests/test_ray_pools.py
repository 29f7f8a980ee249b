"""What goes to workers in other processes, with a Ray and without."""

import contextlib
import functools
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from flax import nnx
from pages import blocks
from schedulers import SOON

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


def test_what_cannot_be_sent_is_reported():
    require("ray", "ray")
    lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match="by pickle: cannot pickle"):
        pack(lambda x: (lock, x))


# -- A Ray of our own, shared by two pools: models come from a script ------------------------------


PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


def script_models():
    """As a script or a notebook has them: classes that nobody can import, closures."""

    class Equinox(eqx.Module):
        w: jax.Array
        scale: float = eqx.field(static=True)

        def __call__(self, x):
            return self.scale * jnp.tanh(x @ self.w)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.linear(x))

    class Linen(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.width)(x)

    key = jax.random.key(0)
    w = jax.random.normal(key, (4, 3))
    module, linen = Nnx(nnx.Rngs(0)), Linen(3)
    variables = linen.init(key, X)
    return (
        Equinox(w, 2.0),
        module,
        functools.partial(linen.apply, variables),
        lambda x: module(x) @ w.T,
    )


@pytest.mark.slow
def test_models_of_a_script_run_and_two_pools_share_a_ray(monkeypatch):
    """Also where Ray does not start at once: its 30 s passed on a busy machine of our CI."""
    ray = require("ray", "ray")
    models, start = script_models(), ray.init
    errors = iter([RuntimeError("Timed out waiting for file /tmp/ray/gcs_server_port_1")])

    def busy(*args, **options):
        for error in errors:
            raise error
        return start(*args, **options)

    monkeypatch.setattr(ray, "init", busy)
    with warnings.catch_warnings(), contextlib.ExitStack() as second:
        warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
        with RayPool(models, 1, example=X, address="local") as pool:
            other = second.enter_context(RayPool(models[0], 1, min_workers=1))
            points = np.stack([X] * len(models))
            with pool.dispatch(points, kinds=range(len(models))) as batch:
                # Answers of one batch have one shape.
                assert batch.wait(deadline=SOON).failures
            for kind, model in enumerate(models):
                with pool.dispatch(X[None], kinds=[kind]) as batch:
                    answers = batch.wait(deadline=SOON)
                assert answers.values is not None, answers.failures
                np.testing.assert_allclose(answers.values[0], model(X), atol=1e-5)
        assert ray.is_initialized()
        with other.dispatch(X[None]) as batch:
            np.testing.assert_allclose(batch.wait(deadline=SOON).values[0], models[0](X), atol=1e-5)
    ray.shutdown()


@pytest.mark.slow
def test_the_pages_example_runs_as_a_notebook_would():
    """From a `__main__` without a file; and Ray logs where its process does.

    A server's log is JSON: a Ray that does not start would write lines of its own into it.
    """
    (example,) = blocks(PAGE, "python")
    example = example.replace("RayPool(net, 3,", 'RayPool(net, 3, address="local",')
    program = f"""
import logging
logging.basicConfig(format="FORMAT %(name)s %(message)s")
{example}
print(np.abs(predictions - net(x)).max())
logging.getLogger("ray._private.services").error("the dashboard is dead")
"""
    done = subprocess.run(
        [sys.executable, "-"], input=program, capture_output=True, text=True, timeout=2 * SOON
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout.splitlines()[-1]) < 1
    assert "FORMAT ray._private.services the dashboard is dead\n" in done.stderr
