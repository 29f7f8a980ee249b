"""A Ray of our own, shared by two pools: models come from a script."""

import contextlib
import functools
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

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()
X = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)


def own_models():
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


def test_models_of_a_script_run_and_two_pools_share_a_ray(monkeypatch):
    """Also where Ray does not start at once: its 30 s passed on a busy machine of our CI."""
    ray = require("ray", "ray")
    models, start = own_models(), ray.init
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
