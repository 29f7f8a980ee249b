"""Coded inference as one program: groups, masks, parameters, one compilation, defined failures."""

import contextlib
import itertools
import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nercc_jax
from nercc_jax import (
    AbstractCode,
    NeRCC,
    Parity,
    Scheme,
    Uncoded,
    coded_inference,
)

K, N = 4, 10


def model(x):
    return jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)


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


def test_each_worker_runs_its_own_model_in_one_batch_a_model(x):
    batches = {}

    def counting(name, function):
        def run(batch, shift):
            batches.setdefault(name, []).append(batch.shape)
            return function(batch) + shift

        return run

    def further(batch):
        return jnp.cos(batch[:, :2])

    code = Parity(K, 6)
    masks = np.ones((6, 6), bool)
    masks[:, 1] = False
    models = (counting("served", model), counting("parity", further))
    infer = coded_inference(models, code)
    for _ in range(2):
        predictions = infer(x, masks, 0.5)
    assert batches == {"served": [(6 * K, 3)], "parity": [(6 * 2, 3)]}
    for group, got in zip(x, predictions, strict=True):
        expected = np.array(model(group)) + 0.5
        expected[1] = further((group[1] + group[3])[None])[0] - model(group[3:])[0]
        np.testing.assert_allclose(got, expected, atol=1e-5)


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


def test_models_may_lie_among_the_workers_in_any_order(x):
    predictions = coded_inference((jnp.sin, jnp.cos), Alternating())(x, np.ones(4, bool))
    np.testing.assert_allclose(predictions[:, ::2], jnp.sin(x[:, ::2]), atol=1e-6)
    np.testing.assert_allclose(predictions[:, 1::2], jnp.cos(x[:, 1::2]), atol=1e-6)


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


def visits(call):
    """The library's functions that a call enters, in turn, and their rooms; no lambdas."""
    root, seen = str(pathlib.Path(nercc_jax.__file__).parent), []

    def profile(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root) and code.co_name[0] != "<":
            room = pathlib.Path(code.co_filename).relative_to(root).parts[0]
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
