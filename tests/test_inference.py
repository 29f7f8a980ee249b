"""Coded inference as one program: groups, masks, parameters, one compilation, defined failures."""

import contextlib
import itertools
import socket
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pages import blocks

import nercc_jax
from nercc_jax import (
    AbstractCode,
    NeRCC,
    Parity,
    Scheme,
    Uncoded,
    coded_inference,
)

K, N, GROUPS = 4, 10, 6


def mesh_of(devices, axes=("workers",)):
    return Mesh(np.array(jax.devices()[:devices]), axes)


def model(x, limit=np.inf):
    """Two logits, broken for coded points with a coordinate beyond the limit."""
    y = jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)
    return jnp.where(jnp.abs(x).max(axis=1, keepdims=True) > limit, jnp.nan, y)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, K, 3)).astype("float32"))


@pytest.fixture
def masks():
    return np.random.default_rng(1).uniform(size=(6, N)) < 0.7


def test_status(x, masks):
    masks = masks.copy()
    masks[2] = False
    x = x.at[4, 1, 0].set(jnp.nan)
    status = coded_inference(model, NeRCC(K, N), with_status=True)(x, masks)
    lost = np.array([False, False, True, False, True, False])
    np.testing.assert_array_equal(status.recovered, np.broadcast_to(~lost[:, None], (6, K)))
    np.testing.assert_array_equal(np.isnan(status.predictions).all(axis=(1, 2)), lost)
    np.testing.assert_array_equal(status.responded[~lost], masks[~lost])
    assert not status.responded[4].any(), "every coded point holds a part of the broken one"


@pytest.mark.parametrize("way", ["code", "mesh", "scheme"])
def test_one_compilation_serves_every_straggler_set(way, x):
    traces = []

    def counting(batch):
        traces.append(batch.shape)
        return model(batch)

    mesh = jax.make_mesh((3,), ("workers",), devices=jax.devices()[:3]) if way == "mesh" else None
    code = Scheme(NeRCC(K, N)) if way == "scheme" else NeRCC(K, N)
    infer = coded_inference(counting, code, mesh=mesh)
    for seed in range(20 if way == "code" else 5):
        masks = np.random.default_rng(seed).uniform(size=(6, N)) < 0.6
        infer(x.reshape(-1, 3) if way == "scheme" else x, masks)
    # All coded points in one batch: on a mesh, those of the four workers of a device.
    assert traces == [(6 * (4 if way == "mesh" else N), 3)]


class Alternating(AbstractCode):
    """No code at all, but every other worker runs the further model."""

    num_data: int = eqx.field(static=True, default=4)
    num_workers: int = eqx.field(static=True, default=4)

    @property
    def worker_models(self):
        return np.arange(4) % 2

    def encoder_matrix(self):
        return Uncoded(4).encoder_matrix()

    def decoder_matrix(self, available):
        return Uncoded(4).decoder_matrix(available)

    def recovered(self, available):
        return Uncoded(4).recovered(available)


def test_each_worker_runs_its_own_model_in_one_batch_a_model_in_any_order(x):
    batches = {}

    def counting(name, function):
        def run(batch, shift):
            batches.setdefault(name, []).append(batch.shape)
            return function(batch) + shift

        return run

    def further(batch):
        return jnp.cos(batch[:, :2])

    for code in (Parity(K, 6), Alternating()):
        batches.clear()
        masks = np.ones((6, code.num_workers), bool)
        masks[:, 1] = code.num_workers == K
        infer = coded_inference((counting("served", model), counting("further", further)), code)
        for _ in range(2):
            predictions = infer(x, masks, 0.5)
        number = [np.sum(code.worker_models == kind) for kind in (0, 1)]
        assert batches == {"served": [(6 * number[0], 3)], "further": [(6 * number[1], 3)]}
        for group, got in zip(x, predictions, strict=True):
            expected = np.array(model(group)) + 0.5
            if code.num_workers == K:
                expected[1::2] = further(group[1::2]) + 0.5
            else:
                expected[1] = further((group[1] + group[3])[None])[0] - model(group[3:])[0]
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_linear_model_is_its_own_parity_model_and_both_get_gradients(x):
    code = Parity(K, 6)
    weights = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2)), x.dtype)
    linear = jax.tree_util.Partial(lambda weights, batch: batch @ weights, weights)
    mask = np.array([True, False, False, True, True, True])
    masks = np.broadcast_to(mask, (6, 6))
    predictions = coded_inference((linear, linear), code)(x, masks)
    np.testing.assert_allclose(predictions, x @ weights, atol=1e-5)

    def loss(models, x):
        return jnp.sum(jnp.sin(coded_inference(models, code)(x, masks)))

    served, further = jax.grad(loss)((linear, linear), x)
    rebuilt = np.cos(x @ weights)[:, [1, 2]]
    sums = x[:, :2] + x[:, 2:]
    expected = jnp.einsum("gki,gko->io", sums[:, ::-1], rebuilt)  # groups {0, 2} and {1, 3}
    np.testing.assert_allclose(further.args[0], expected, rtol=1e-4, atol=1e-4)
    assert np.abs(served.args[0]).max() > 0
    np.testing.assert_allclose(
        jax.grad(loss, argnums=1)((linear, linear), x),
        jnp.cos(x @ weights) @ weights.T,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("way", ["eager", "jit", "mesh", "jit on its mesh"])
def test_results_say_how_far_predictions_may_be_off(way):
    """`recovered` does not: many stragglers leave predictions that are determined and wrong."""
    code, rng = NeRCC(4, 10), np.random.default_rng(0)
    x = np.sort(rng.normal(size=(6, 4, 3)), axis=1).astype(np.float32)
    masks = np.arange(10) < np.array([10, 9, 8, 6, 4, 3])[:, None]
    mesh = jax.make_mesh((4,), ("workers",)) if way.endswith("mesh") else None
    scheme, model = Scheme(code), lambda x: jnp.sin(2 * x)
    infer = coded_inference(model, scheme, with_status=True, grouped=True, mesh=mesh)
    run = jax.jit(infer) if way.startswith("jit") else infer
    with jax.set_mesh(mesh) if way == "jit on its mesh" else contextlib.nullcontext():
        found = run(x, masks)
    found = jax.tree.map(np.asarray, found)
    error = np.sqrt(np.mean((found.predictions - np.sin(2 * x)) ** 2, axis=2))
    assert found.recovered.all()
    mean = found.deviation.mean(axis=1)
    assert (np.diff(mean[2:]) > 0).all()
    assert mean[-1] > 20 * mean[0]
    # Within a small factor in the mean, from one worker lost to seven.
    ratio = error[1:].mean(axis=1) / found.deviation[1:].mean(axis=1)
    assert ((ratio > 0.1) & (ratio < 5)).all(), ratio
    if way == "eager":
        y = np.sin(2 * np.asarray(code.encode(x[2])))
        _, wanted = code.decode(y, masks[2], return_uncertainty=True)
        np.testing.assert_allclose(found.deviation[2], wanted, rtol=1e-4)
        for unit in (1e-25, 1e25):  # whose squares are no float32
            scaled = coded_inference(lambda x, unit=unit: unit * model(x), scheme, with_status=True)
            also = scaled(x[2], masks[2]).deviation
            np.testing.assert_allclose(also / np.float32(unit), wanted, rtol=1e-4)


def visits(call):
    """The library's functions that a call enters, in turn, and their rooms; no lambdas."""
    root, seen = str(Path(nercc_jax.__file__).parent), []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and code.co_name[0] != "<":
            room = Path(code.co_filename).relative_to(root).parts[0]
            seen.append((room, code.co_filename, code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    rooms = [room for (room, *_), _ in itertools.groupby(seen, key=lambda visit: visit[:1])]
    return len(set(seen)), len(rooms) - len(set(rooms))


def test_an_array_visits_few_functions_and_returns_to_few_rooms():
    """Where the matrices are known: eagerly, and while the program of a new shape is traced.

    These figures may only fall. They were 24 functions and 11 returns, 50 and 25.
    """
    infer, mask = coded_inference(jnp.tanh, NeRCC(8, 20)), np.arange(20) != 3
    x = np.ones((8, 5), np.float32)
    infer(x, mask)
    functions, returns = visits(lambda: infer(x, mask))
    assert functions <= 11
    assert returns == 0
    functions, returns = visits(lambda: infer(np.ones((2, 8, 5), np.float32), mask))
    assert functions <= 25
    assert returns == 0


# -- Over a mesh: the same predictions, wherever workers run ---------------------------------------


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
