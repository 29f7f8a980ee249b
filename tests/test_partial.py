"""Partial results: decoding from the devices that are done, while others are still at work."""

import contextlib
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nercc_jax import NeRCC, Replication, Uncoded, coded_inference
from nercc_jax.inference import partial_inference
from nercc_jax.inference._partial import _program
from nercc_jax.inference._spmd import place, slots

LONG = 60.0  # a deadline that no test is meant to reach


def model(x):
    return jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)


def mesh_of(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("workers",))


class Held:
    """A model that some devices hold up for as long as the test says so."""

    def __init__(self, *devices):
        self._go, self._devices = threading.Event(), devices
        self._go.set()

    @contextlib.contextmanager
    def up(self):
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def __call__(self, x):
        scalar = jax.ShapeDtypeStruct((), np.float32)
        wait = jax.pure_callback(self._wait, scalar, jax.lax.axis_index("workers"))
        return model(x) + wait

    def _wait(self, device):
        if int(device) in self._devices:
            self._go.wait(LONG)
        return np.float32(0)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(2, 4, 5)).astype("f")


def workers_of(device, devices, num_workers):
    return np.split(slots(np.zeros(num_workers, int), devices).worker, devices)[device]


# With 8 devices, 20 workers fill 24 slots: workers 0 to 3 have a second one.
@pytest.mark.parametrize(("devices", "slow", "num_workers"), [(8, 1, 20), (3, 0, 7)])
def test_a_slow_device_is_not_waited_for(x, devices, slow, num_workers):
    code = NeRCC(4, num_workers)
    held = Held(slow)
    infer = partial_inference(held, code, mesh_of(devices))
    reference = coded_inference(model, code)
    everyone = infer(x, deadline=LONG)
    assert everyone.responded.all()
    np.testing.assert_allclose(
        everyone.predictions, reference(x, np.ones(num_workers, bool)), atol=1e-5
    )
    late = np.zeros(num_workers, bool)
    late[workers_of(slow, devices, num_workers)] = True
    twice = np.delete(
        slots(np.zeros(num_workers, int), devices).worker.reshape(devices, -1), slow, 0
    )
    late[twice.ravel()] = False
    with held.up():
        partial = infer(x, number=int((~late).sum()), deadline=LONG)
        np.testing.assert_array_equal(partial.responded, np.broadcast_to(~late, (2, num_workers)))
        assert partial.recovered.all()
        np.testing.assert_allclose(partial.predictions, reference(x, ~late), atol=1e-5)


def test_the_deadline_and_what_is_left_behind(x):
    held = Held(2)
    infer = partial_inference(held, NeRCC(4, 10), mesh_of(3), max_behind=0)
    infer(x, deadline=LONG)
    with held.up():
        partial = infer(x, deadline=4.0)
        assert not partial.responded[:, workers_of(2, 3, 10)[0]].any()
        assert partial.recovered.all()
        with pytest.raises(TimeoutError, match=r"devices \[2\] still have more than 0 earlier"):
            infer(x, deadline=0.05)
    assert infer(x, deadline=LONG).responded.all(), "and then it goes on"


class Turns:
    """A model one of whose devices waits, in each of its calls, for an event of that call."""

    def __init__(self, device, calls):
        self.device = device
        self.reached, self.go = ([threading.Event() for _ in range(calls)] for _ in "ab")
        self._calls = iter(range(calls))

    def __call__(self, x):
        scalar = jax.ShapeDtypeStruct((), np.float32)
        return model(x) + jax.pure_callback(self._wait, scalar, jax.lax.axis_index("workers"))

    def _wait(self, device):
        if int(device) == self.device:
            call = next(self._calls)
            self.reached[call].set()
            self.go[call].wait(LONG)
        return np.float32(0)


def test_waiting_behind_a_busy_device_is_part_of_the_deadline(x, monkeypatch):
    """Three of four seconds go by until the device may be given more: then one is left."""
    turns = Turns(2, 3)
    first, behind, third = turns.go
    first.set()
    infer = partial_inference(turns, NeRCC(4, 10), mesh_of(3), max_behind=0)
    infer(x, deadline=LONG)
    infer(x, number=4, deadline=LONG)
    now = [0.0]

    def sleep(seconds):
        time.sleep(0.002)
        if now[0] >= 3 and not turns.reached[2].is_set():
            behind.set()  # and nothing goes on by this clock until the next call has begun
            return
        if turns.reached[2].is_set():
            time.sleep(0.3)  # for the other devices to answer
        now[0] += 0.5

    clock = types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr("nercc_jax.inference._partial.time", clock)
    partial = infer(x, deadline=4.0)
    assert now[0] == 4.0
    assert not partial.responded[:, workers_of(2, 3, 10)[0]].any()
    third.set()


def test_nothing_to_recover_from(x):
    held = Held(0, 1)
    infer = partial_inference(held, Replication(4, 8), mesh_of(2))
    infer(x, deadline=LONG)
    with held.up(), pytest.raises(TimeoutError, match=r"0 of 8 workers answered within 0\.05 s"):
        infer(x, deadline=0.05)


def test_broken_data_points_answers_and_one_group(x):
    code = NeRCC(4, 7)
    infer = partial_inference(lambda b: jnp.where(b > 1.0, jnp.inf, b), code, mesh_of(3))
    reference = coded_inference(lambda b: jnp.where(b > 1.0, jnp.inf, b), code, with_status=True)
    x = x.copy()
    x[1, 2, 0] = np.nan
    got, expected = infer(x, deadline=LONG), reference(x, np.ones(7, bool))
    assert not expected.responded[0].all()
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    alone = infer(x[0], deadline=LONG)
    np.testing.assert_allclose(alone.predictions, expected.predictions[0], atol=1e-5)
    square = np.concatenate([x, x])
    with pytest.raises(ValueError, match="may be one group of 4 or 4 groups"):
        infer(square, deadline=LONG)
    by_group = partial_inference(lambda b: b, code, mesh_of(3), grouped=True)
    assert by_group(square, deadline=LONG).predictions.shape == square.shape
    nothing = infer(x[1], deadline=LONG)
    assert not nothing.recovered.any()
    assert np.isnan(nothing.predictions).all()


def test_nothing_moves_between_devices(x):
    mesh = mesh_of(8)
    placed = place(model, NeRCC(4, 10), mesh)
    replicated = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    run = _program(placed)
    text = run.func.lower(*run.args, replicated).compile().as_text()
    for word in ("all-gather", "all-to-all", "all-reduce", "collective", "reduce-scatter"):
        assert word not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 0, "deadline": 1.0}, "number must be 1 to 7 workers, not 0"),
        ({"number": 8, "deadline": 1.0}, "number must be 1 to 7 workers, not 8"),
        ({"deadline": 0.0}, "deadline must be a positive number of seconds, not 0"),
        ({"deadline": np.nan}, "deadline must be a positive number of seconds, not nan"),
    ],
)
def test_argument_errors(x, options, message):
    with pytest.raises(ValueError, match=message):
        partial_inference(model, NeRCC(4, 7), mesh_of(2))(x, **options)


def test_errors_at_construction():
    with pytest.raises(ValueError, match="max_behind must be 0 or more, not -1"):
        partial_inference(model, NeRCC(4, 7), mesh_of(2), max_behind=-1)
    with pytest.raises(ValueError, match="none named 'workers'"):
        partial_inference(
            model, NeRCC(4, 7), Mesh(np.array(jax.devices()[:2])[:, None], ("x", "y"))
        )
    with pytest.raises(ValueError, match="run 1 model, but 2 came"):
        partial_inference((model, model), Uncoded(4), mesh_of(2))(
            np.ones((4, 5), np.float32), deadline=LONG
        )
