"""Pools of workers: one contract for all of them, the scheduler's rules, and faults on purpose."""

import contextlib
import logging
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import numpy as np
import pytest
from conftest import require
from jax.sharding import AxisType
from schedulers import SOON, soon

from nercc_jax import (
    Berrut,
    DevicePool,
    NeRCC,
    Parity,
    RayPool,
    Replication,
    coded_inference,
    pool_inference,
)
from nercc_jax.evaluation import record_answers
from nercc_jax.inference.models import current_conditions
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool

K, N = 8, 20


def network(batch):
    """Numbers that are not linear in the data, and small enough for 1e-5 in float32."""
    return jax.numpy.stack([jax.numpy.sin(batch).mean(axis=1), jax.numpy.tanh(batch[:, 0])], 1)


def itself(batch):
    """Tells whose answer it is: as the data are, doubled."""
    return 2 * batch


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests of this file: a pool uses what it finds."""
    ray = require("ray", "ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def threads(*models, **options):
    return DevicePool(*models, devices=jax.local_devices(), **options)


def on_paper(model, num_workers, *, example=None, **options):
    """Workers that exist in simulated time only, and need no example of an input."""
    return SimulatedPool(model, num_workers, seconds=lambda size: 0.1 * size, **options)


KINDS = {"devices": threads, "simulated": on_paper, "ray": RayPool}


@pytest.fixture(
    scope="module", params=["devices", "simulated", pytest.param("ray", marks=pytest.mark.slow)]
)
def make(request):
    """Makes a pool of any kind."""
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return KINDS[request.param]


def settle(pool, condition):
    """Wait until it holds; simulated time goes on only while somebody waits, or is told to."""
    if isinstance(pool, SimulatedPool):
        pool.clock.run(pool.clock.now() + 10.0)
    soon(condition)


@pytest.fixture(scope="module")
def networks(make):
    """Workers for all that only ask them: an actor takes seconds to start."""
    with make(network, 2, example=np.zeros((2, 6), np.float32)) as pool:
        yield pool


def points(count, number=0, width=3):
    """Coded data points, each a batch of one, whose every number says which point of what it is."""
    return (
        np.arange(count, dtype=np.float32)[:, None, None]
        + 100 * number
        + np.zeros((1, 1, width), np.float32)
    )


# Every pool.


@pytest.mark.parametrize("code", [NeRCC(K, N), Berrut(5, 7)], ids=["NeRCC(8, 20)", "BACC(5, 7)"])
def test_all_ways_of_running_agree(code, networks):
    """Sharded, unsharded and on a pool: the same predictions for the same mask."""
    x = np.random.default_rng(0).normal(size=(2, code.num_data, 6)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("workers",))
    unsharded = coded_inference(network, code)
    sharded = coded_inference(network, code, mesh=mesh)
    infer = pool_inference(networks, code, with_status=True)
    for enough in (None, code.num_workers - 3, 2):
        result = infer(x, enough)
        mask = result.answers.available
        assert mask.sum() >= (enough or code.num_workers)
        expected = unsharded(x, mask)
        np.testing.assert_allclose(result.decoded.predictions, expected, atol=1e-5)
        np.testing.assert_allclose(sharded(x, mask), expected, atol=1e-5)


def test_float64(make):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 2))
        code = Replication(3, 6)
        with make(itself, 1, example=x[:1]) as pool:
            predictions = pool_inference(pool, code)(x)
    assert predictions.dtype == np.float64
    np.testing.assert_array_equal(predictions, 2 * x)


def test_workers_run_the_model_that_the_code_gives_them(make):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    with make((itself, itself), 1, example=x[:1]) as pool:
        code = Parity(4, 6)
        result = pool_inference(pool, code, with_status=True)(x, 4)
        recovered = np.asarray(result.decoded.recovered)
        np.testing.assert_allclose(
            result.decoded.predictions[recovered], 2 * x[recovered], rtol=1e-5
        )


REASONS = {"error": "InjectedError", "nan": "not finite", "hang": "it hangs"}
REASONS |= {"death": "gone|ended|died"}


@pytest.mark.parametrize("kind", REASONS)
def test_a_fault_costs_no_answer(kind):
    """Each in the first call of worker 0: another worker does it, and the report says so."""
    faults = Faults([Fault(kind, workers=(0,), calls=(0,))])
    with threads(itself, 3, example=points(1)[0], faults=faults, hang_timeout=2.0) as pool:
        with pool.dispatch(points(6)) as batch:
            answers = batch.wait(deadline=SOON)
        np.testing.assert_array_equal(answers.values, 2 * points(6))
        if kind in ("error", "nan"):
            assert len(answers.failures) == 1
        else:  # a new life begins with a first call, in which the same happens again
            assert answers.failures
        for failure in answers.failures:
            assert failure.worker == 0
            assert re.search(REASONS[kind], failure.reason)
        if kind in ("hang", "death"):
            settle(pool, lambda: pool.report().deaths_by_worker[0] == pool.report().deaths >= 1)
            assert pool.report().hung == (pool.report().deaths if kind == "hang" else 0)
        else:
            assert pool.report().errors == 1
            assert pool.report().deaths == 0


@pytest.mark.slow
def test_faults_of_processes_cost_no_answer(cluster):
    """All kinds at once, each a worker's: a process takes seconds to start."""
    kinds = list(REASONS)
    faults = Faults([Fault(kinds[worker], workers=(worker,), calls=(0,)) for worker in range(4)])
    with RayPool(itself, 5, example=points(1)[0], faults=faults, hang_timeout=5.0) as pool:
        with pool.dispatch(points(10)) as batch:
            answers = batch.wait(deadline=SOON)
        np.testing.assert_array_equal(answers.values, 2 * points(10))
        assert {failure.worker for failure in answers.failures} == {0, 1, 2, 3}
        for failure in answers.failures:
            assert re.search(REASONS[kinds[failure.worker]], failure.reason)
        soon(lambda: all(pool.report().deaths_by_worker[worker] >= 1 for worker in (2, 3)))
        report = pool.report()
        assert (report.errors, report.deaths_by_worker[:2]) == (2, (0, 0))
        assert report.hung == report.deaths_by_worker[2]


def test_a_delayed_answer_is_late_and_never_anothers(make):
    """Worker 0 sleeps through its first call; the next batches go by without it."""
    faults = Faults(
        [Fault("delay", workers=(0,), calls=(0,), latency=TraceLatency(jax.numpy.array([2.0])))]
    )
    with make(itself, 2, example=points(1)[0], faults=faults) as pool:
        for number in range(5):
            with pool.dispatch(points(2, number), needed=1, copies=1) as batch:
                answers = batch.wait(1, SOON)
                assert answers.available.sum() >= 1
                np.testing.assert_array_equal(
                    answers.values[answers.available], 2 * points(2, number)[answers.available]
                )
        settle(pool, lambda: pool.report().late >= 1)
        settle(pool, lambda: pool.report().idle == 2)
        assert pool.report().wasted_seconds > 0
        with pool.dispatch(points(2, 9)) as batch:
            np.testing.assert_array_equal(batch.wait(deadline=SOON).values, 2 * points(2, 9))


@pytest.fixture
def started_once(monkeypatch):
    """A pool gives up at a worker's first start that fails: `test_scheduler` has the others."""
    monkeypatch.setattr("nercc_jax.pools._runner._STARTS", 1)


def test_workers_that_do_not_start(make, started_once):
    if make is on_paper:
        pytest.skip("they are there at once, and run nothing before they are asked")

    def broken(batch):
        raise ValueError("cannot multiply")

    with pytest.raises(
        RuntimeError, match=r"does not run on a batch of shape \(1, 3\): cannot mult"
    ):
        make(broken, 1, example=points(1)[0])


@pytest.mark.slow
def test_processes_run_in_a_precision_of_their_own(cluster):
    """What `test_worker_dtype` has of threads."""
    code, x = Berrut(5, 7), np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    model = eqx.filter_vmap(eqx.nn.MLP(6, 2, 8, 1, key=jax.random.key(0)))
    with RayPool(model, 1, example=x[:1], worker_dtype="bfloat16") as pool:
        predictions = pool_inference(pool, code)(x)
        assert pool.conditions == current_conditions("bfloat16", "cpu")
    expected = coded_inference(model, code, worker_dtype="bfloat16")(x, np.ones(7, bool))
    np.testing.assert_allclose(predictions, expected, atol=2e-2)


# On threads, where a test can hold a worker back for as long as it likes.


class Gate:
    """A model that waits where the data say 13, until it is opened."""

    def __init__(self):
        self.opened = threading.Event()
        self.reached = threading.Event()

    def __call__(self, batch):
        if batch[0, 0] == 13:
            self.reached.set()
            assert self.opened.wait(SOON)
        return 2 * batch


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def gated(gate, workers, **options):
    return DevicePool(gate, workers, compiled=False, **options)


def test_a_deadline_ends_the_wait_and_late_answers_can_be_collected(gate):
    with gated(gate, 4) as pool, pool.dispatch(points(4) + np.float32(10)) as batch:  # 10 .. 13
        for enough, deadline in ((3, SOON), (None, 0.05)):
            answers = batch.wait(enough, deadline)
            assert answers.available.tolist() == [True, True, True, False]
            assert not answers.values[3].any()
        assert answers.waited >= 0.05
        gate.opened.set()
        answers = batch.wait(deadline=SOON)
        np.testing.assert_array_equal(answers.values, 2 * points(4) + 20)
        assert pool.report().late == 0


def test_waiting_until_the_forecast_is_good_enough(gate):
    """More answers are waited for where these would not do, and no more than that."""
    code = Replication(2, 4)
    calibration = np.random.default_rng(0).normal(size=(8, 1)).astype(np.float32)
    forecast = record_answers(itself, code, calibration)
    enough = lambda mask: bool(forecast.decode_sets(mask[None]).recovered.all())  # noqa: E731
    seen = []

    def seen_enough(mask):
        seen.append(mask.any())
        return enough(mask)

    x = np.array([[13.0], [1.0]], np.float32)
    with gated(gate, 4) as pool:
        infer = pool_inference(pool, code, with_status=True)
        result = infer(x, seen_enough, deadline=2.0)
        assert seen
        assert all(seen), "not asked before an answer is in"
        assert result.answers.available.tolist() == [False, True, False, True]
        assert result.answers.waited >= 2.0, "both copies of the first were missing"
        gate.opened.set()
        soon(lambda: pool.report().idle == 4)
        result = infer(x, enough, SOON)
        assert result.decoded.recovered.all()
        np.testing.assert_array_equal(result.decoded.predictions, 2 * x)


@pytest.mark.parametrize(
    ("options", "spare"),
    [({}, 2), ({"compiled": False}, np.inf), ({"faults": Faults([Fault("error", 0.0)])}, np.inf)],
)
def test_threads_share_the_hosts_cores(options, spare, monkeypatch):
    """But for what is no JAX function, and where faults let them stand for other machines."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    with DevicePool(lambda x: x, 4, **options) as pool:
        assert (pool.idle, pool.spare) == (4, spare)


def test_a_closed_pool_has_no_threads_left():
    before = set(threading.enumerate())
    with DevicePool(itself, 3, compiled=False):
        own = set(threading.enumerate()) - before
    assert len(own) >= 3
    assert not any(thread.is_alive() for thread in own)


def test_points_go_out_one_after_the_other_and_changes_are_reported():
    changes = threading.Semaphore(0)
    with DevicePool(itself, 2, compiled=False) as pool:
        with pool.open(3, on_change=lambda batch: changes.release()) as batch:
            for point in (2, 0, 1):
                pool.send(batch, [point], points(3)[[point]])
                assert changes.acquire(timeout=SOON)
                np.testing.assert_array_equal(batch.answer(point), 2 * points(3)[point])
            assert batch.count == 3
        with pytest.raises(ValueError, match="has been forgotten"):
            pool.send(batch, [0], points(1))


def test_a_callback_that_fails_costs_no_worker(caplog):
    def broken(batch):
        raise KeyError("not mine")

    with DevicePool(itself, 1, compiled=False) as pool:
        with pool.open(3, on_change=broken) as batch:
            pool.send(batch, range(3), points(3))
            assert batch.wait(np.int64(3), SOON).available.all()
        soon(lambda: pool.report().idle == 1)
        assert (pool.report().deaths, pool.report().internal_errors) == (0, 3)
    assert "on_change of a batch of 3 failed" in caplog.text


def no_layer(batch):
    raise KeyError("no such layer")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (no_layer, "no such layer"),
        (lambda b: b.sum(), r"1 data points came back as an array of shape \(\)"),
        (lambda b: b.astype(int), "codes work on floats"),
        (lambda b: np.full_like(b, np.inf), "not finite"),
    ],
)
def test_a_model_that_always_fails(model, reason):
    """Two points have two attempts each; then it is said why."""
    with DevicePool(model, 3, compiled=False, max_attempts=2) as pool:
        with pool.dispatch(points(2)) as batch:
            answers = batch.wait(deadline=SOON)
        assert answers.values is None
        assert len(answers.failures) == 4
        with pytest.raises(RuntimeError, match=f"and none will: .*{reason}"):
            pool_inference(pool, Replication(2, 2))(np.ones((2, 3), np.float32))


def test_nobody_answers_in_time(gate):
    with gated(gate, 2) as pool:
        infer = pool_inference(pool, Replication(1, 2))
        with pytest.raises(TimeoutError, match=r"within 0.1 s: 2 workers are busy"):
            infer(np.full((1, 3), 13, np.float32), deadline=0.1)
        gate.opened.set()
        np.testing.assert_array_equal(infer(np.ones((1, 3), np.float32)), np.full((1, 3), 2))


def test_too_few_answers_in_time(gate):
    with gated((gate, gate), 4) as pool:
        infer = pool_inference(pool, Parity(2, 3))
        x = np.array([[13.0], [13.0]], np.float32)  # their sum is answered
        with pytest.raises(TimeoutError, match="recovered from the 1 of 3 answers"):
            infer(x, deadline=2.0)


def test_closing_ends_every_wait(gate):
    pool = gated(gate, 1)
    batch = pool.dispatch(points(3) + np.float32(13))
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(batch.wait, None, SOON)
        assert gate.reached.wait(SOON)
        pool.close()
        answers = waiting.result(SOON)
    assert answers.values is None
    assert {failure.reason for failure in answers.failures} == {"the pool was closed"}
    assert pool.trouble == "this pool is closed"
    with pytest.raises(ValueError, match="this pool is closed"):
        pool.dispatch(points(1))
    pool.close()


def test_many_threads_at_one_pool():
    """Every caller gets its own answers."""
    faults = Faults([Fault("error", probability=0.05), Fault("death", probability=0.02)], seed=3)
    with DevicePool(itself, 6, compiled=False, faults=faults, max_attempts=20) as pool:

        def call(number):
            with pool.dispatch(points(4, number)) as batch:
                return batch.wait(deadline=SOON).values

        with ThreadPoolExecutor(8) as executor:
            for number, values in enumerate(executor.map(call, range(200))):
                np.testing.assert_array_equal(values, 2 * points(4, number))
        assert pool.report().deaths > 0
        assert pool.report().errors > 0


def test_a_wait_without_an_end(gate, monkeypatch):
    """Threads refuse to sleep for centuries, so what is that long is slept in pieces."""
    monkeypatch.setattr("nercc_jax.pools.clock.LONGEST_SLEEP", 0.01)
    with gated(gate, 1, hang_timeout=1e300, start_timeout=np.inf) as pool:
        batches = [pool.dispatch(points(1) + np.float32(13)) for _ in range(2)]
        with ThreadPoolExecutor(2) as executor:
            waits = executor.map(lambda batch, end: batch.wait(None, end), batches, (1e300, np.inf))
            assert gate.reached.wait(SOON)
            gate.opened.set()
            assert all(answers.available.all() for answers in waits)


def test_a_delay_without_an_end_is_no_error():
    """It would be an OverflowError, reported as the model's."""
    faults = Faults([Fault("delay", latency=TraceLatency(jax.numpy.array([1e30])))])
    with DevicePool(itself, 1, compiled=False, faults=faults) as pool:
        assert not pool.dispatch(points(1)).wait(deadline=0.2).failures


def test_noise_is_not_lateness():
    """Half as long again is nothing, where a call takes a millisecond."""
    assert Overdue(0.5, 1.5).after(0.001) == pytest.approx(0.011)
    assert Overdue(0.5, 1.5, floor=0.0).after(0.001) == pytest.approx(0.0015)
    assert Overdue(0.5, 1.5).after(1.0) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_callers_mesh_is_no_business_of_a_pools(kind):
    """Neither while it is opened, nor when it is set later; as it was, it is afterwards."""
    mesh = jax.make_mesh((8,), ("workers",), axis_types=(kind,))
    x = np.random.default_rng(1).normal(size=(2, 3, 2)).astype(np.float32)
    code = NeRCC(3, 6, points="interleaved", lambda_dec=0.0)  # the answers themselves, of all
    with contextlib.ExitStack() as pools:
        later = pools.enter_context(DevicePool(network, 6))
        before = pool_inference(later, code)(x)
        np.testing.assert_allclose(before[0], network(x[0]), atol=1e-4)
        with jax.set_mesh(mesh), DevicePool(network, 6, example=x[:, 0]) as pool:
            np.testing.assert_array_equal(pool_inference(later, code)(x), before)
            np.testing.assert_allclose(pool_inference(pool, code)(x), before, atol=1e-4)
            assert jax.sharding.get_mesh() == mesh
