"""Coded inference over a mesh: the same predictions, wherever workers run."""

import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pages import blocks

from nercc_jax import NeRCC, Parity, coded_inference

GROUPS = 6


def mesh_of(devices, axes=("workers",)):
    return Mesh(np.array(jax.devices()[:devices]), axes)


def model(x, limit=np.inf):
    """Two logits, broken for coded points with a coordinate beyond the limit."""
    y = jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)
    return jnp.where(jnp.abs(x).max(axis=1, keepdims=True) > limit, jnp.nan, y)


def assert_same(got, expected, tolerance=1e-5):
    assert got.predictions.is_fully_replicated
    np.testing.assert_array_equal(got.responded, expected.responded)
    np.testing.assert_array_equal(got.recovered, expected.recovered)
    assert got.predictions.dtype == expected.predictions.dtype
    np.testing.assert_allclose(got.predictions, expected.predictions, atol=tolerance)


# Encoding: replicated data points on 1 and 3 devices, shares of coordinates on 8. Decoding of six
# groups: by coordinate on 8 devices, by group on fewer. Of 8 some have no worker, or one of two.
@pytest.mark.parametrize(
    ("devices", "num_data", "num_workers", "precision"),
    [
        (8, 4, 10, "float64"),
        (8, 4, 7, "float32"),
        (3, 4, 7, "float32"),
        (1, 4, 7, "float32"),
    ],
)
def test_it_equals_the_unsharded(devices, num_data, num_workers, precision):
    with jax.enable_x64(precision == "float64"):
        rng = np.random.default_rng(0)
        code = NeRCC(num_data, num_workers, lambda_dec=0.0)
        x = rng.normal(size=(GROUPS, num_data, 5)).astype(precision)
        masks = rng.uniform(size=(GROUPS, num_workers)) < 0.8
        masks[0] = True
        masks[1] = False  # no worker
        masks[2] = np.arange(num_workers) < 2  # two close workers: ill-conditioned
        x[3, 1, 2] = np.nan  # a broken data point
        coded = np.abs(jax.vmap(code.encode)(x[[0, 4, 5]])).max(axis=2)
        limit = np.sort(coded.ravel())[-3:-1].mean()  # breaks two answers
        if num_workers >= 10:
            assert np.abs(code.decoder_matrix(masks[2])).sum(axis=1).max() > 32, "loses digits"

        expected = coded_inference(model, code, with_status=True)(x, masks, limit)
        assert (~expected.recovered).any(axis=1).tolist() == [
            False,
            True,
            False,
            True,
            False,
            False,
        ]
        assert np.asarray(masks & ~expected.responded)[[0, 4, 5]].any(), "an answer was broken"
        infer = coded_inference(model, code, with_status=True, mesh=mesh_of(devices))
        tolerance = 1e-5 if precision == "float32" else 1e-10
        # Beyond two close workers the line is steep: rounding there counts by its slope.
        slope = np.nanmax(np.abs(expected.predictions))
        assert_same(infer(x, masks, limit), expected, tolerance * slope)
        alone = infer(x[0], masks[0], limit)
        assert alone.predictions.shape == (num_data, 2)
        assert_same(alone, jax.tree.map(lambda leaf: leaf[0], expected), tolerance)


@pytest.mark.parametrize("devices", [3, 8])
def test_each_kind_of_worker_is_spread_by_itself(devices):
    """Images in, images out: five by three and as many groups as eight devices have, and one."""
    code = Parity(4, 6)
    models = (lambda b: jnp.sin(b) * b, lambda b: jnp.cos(b))
    x = np.random.default_rng(1).normal(size=(9, 4, 5, 3)).astype(np.float32)
    masks = np.ones((9, 6), bool)
    masks[:, 1] = False
    masks[0, 3] = False
    infer = coded_inference(models, code, with_status=True, mesh=mesh_of(devices))
    expected = coded_inference(models, code, with_status=True)(x, masks)
    assert_same(infer(x, masks), expected)
    assert_same(infer(x[0], masks[0]), jax.tree.map(lambda leaf: leaf[0], expected))


def test_models_of_every_make():
    x = np.random.default_rng(2).normal(size=(4, 3)).astype("f")
    mask = np.arange(7) != 2
    network = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)
    bound = jax.tree_util.Partial(lambda state, batch: nnx.merge(graph, state)(batch), state)
    layer = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    mesh = jax.make_mesh((2,), ("workers",), devices=jax.devices()[:2])
    for make in (network, bound, jax.jit(lambda b: network(b)), jax.vmap(layer)):
        predictions = coded_inference(make, NeRCC(4, 7), mesh=mesh)(x, mask)
        expected = coded_inference(make, NeRCC(4, 7))(x, mask)
        np.testing.assert_allclose(predictions, expected, atol=1e-5)


class Layers(eqx.Module):
    first: jax.Array
    second: jax.Array

    def __call__(self, batch, factor):
        # A scan from a constant, as models have them.
        total, _ = jax.lax.scan(lambda c, f: (c + f, None), jnp.zeros(()), factor)
        return total * (jnp.tanh(batch @ self.first) @ self.second)


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_further_axis_of_the_mesh_may_shard_the_model(kind):
    shape, axes = (4, 2), ("workers", "model")
    mesh = jax.make_mesh(shape, axes)  # explicit
    if kind == "auto":
        mesh = Mesh(mesh.devices, axes)
    rng = np.random.default_rng(3)
    plain = Layers(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 6), (6, 2))))
    columns = NamedSharding(mesh, PartitionSpec(None, "model"))
    sharded = eqx.tree_at(lambda m: m.first, plain, jax.device_put(plain.first, columns))

    x = rng.normal(size=(2, 4, 5)).astype("f")
    mask = np.arange(7) != 3
    factor = np.array([0.5, 1.0], np.float32)
    expected = coded_inference(plain, NeRCC(4, 7), with_status=True)(x, mask, factor)
    infer = coded_inference(sharded, NeRCC(4, 7), with_status=True, mesh=mesh)
    assert_same(infer(x, mask, factor), expected)
    with jax.set_mesh(jax.make_mesh((3,), ("other",), devices=jax.devices()[:3])):
        assert_same(infer(x, mask, factor), expected)
    got = jax.jit(infer)(jnp.asarray(x), jnp.asarray(mask), factor)
    np.testing.assert_allclose(got.predictions, expected.predictions, atol=1e-5)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The program of docs/devices.md, in two processes of one job."""
    root = Path(__file__).parents[1]
    (program,) = blocks((root / "docs/devices.md").read_text(), "python processes")
    (tmp_path / "processes.py").write_text(program)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "processes.py"), address, str(rank)],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"process {rank}: 8 devices, the same predictions" in output


def test_a_module_with_weights_on_an_explicit_mesh():
    """As a pytree; what `jax.vmap` closes over cannot be passed to the devices."""
    mesh = jax.make_mesh((4,), ("workers",), axis_types=(jax.sharding.AxisType.Explicit,))
    net = eqx.nn.MLP(5, 4, 8, 1, key=jax.random.key(0))
    by = {True: PartitionSpec("workers"), False: PartitionSpec()}
    sharded = jax.tree.map(
        lambda leaf: (
            jax.device_put(leaf, NamedSharding(mesh, by[leaf.shape[0] % 4 == 0]))
            if eqx.is_array(leaf)
            else leaf
        ),
        net,
    )
    code, x = NeRCC(4, 8), np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    mask = np.arange(8) != 2
    expected = coded_inference(eqx.filter_vmap(net), code)(x, mask)
    got = coded_inference(eqx.filter_vmap(sharded), code, mesh=mesh)(x, mask)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"closes over .* eqx\.filter_vmap\(module\)"):
        coded_inference(jax.vmap(sharded), code, mesh=mesh)(x, mask)
