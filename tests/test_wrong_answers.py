"""Workers that answer wrongly on purpose, and workers that are asked for their weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require
from schedulers import SOON, next_call

from nercc_jax import DevicePool, RayPool
from nercc_jax.pools import Fault, Faults
from nercc_jax.testing import SimulatedPool

WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
CALLS = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
RIGHT = CALLS @ WEIGHTS


class Linear(eqx.Module):
    """Its answers are known by hand."""

    w: jax.Array

    def __call__(self, x):
        return x @ self.w


def fragile():
    """A model whose memory fails on a batch that begins with 77; actors need not import it."""

    class Fragile(eqx.Module):
        w: list

        def __call__(self, x):
            if np.asarray(x)[0, 0] == 77:
                self.w[0] = self.w[0].at[0, 0].multiply(1 + 1e-6)
            return np.asarray(x) @ np.asarray(self.w[0])

    return Fragile([jnp.asarray(WEIGHTS)])


MODEL = Linear(jnp.asarray(WEIGHTS))


def answers(*faults, calls=CALLS):
    """The answers to calls, one after the other."""
    found = []
    with DevicePool(MODEL, 1, example=calls[0], faults=Faults(faults)) as pool:
        for call in calls:
            with pool.dispatch(call[None]) as batch:
                found.append(batch.wait(deadline=SOON).values[0])
    return found


def close(one, other):
    return np.allclose(one, other, atol=1e-5)


def test_swapped_rows_are_all_there_and_none_is_in_its_place():
    for given, right in zip(answers(Fault("swap")), RIGHT, strict=True):
        assert not any(map(close, given, right))
        np.testing.assert_allclose(np.sort(given, axis=0), np.sort(right, axis=0), atol=1e-5)


def test_a_swapped_single_row_is_the_previous_calls():
    given = answers(Fault("swap"), calls=CALLS[:, :1])
    assert close(given[0], RIGHT[0, :1]), "there was none before"
    assert all(map(close, given[1:], RIGHT[:-1, :1]))


def test_by_workers_and_rates():
    faults = Faults.from_rates(wrong_workers={"swap": [1]}, wrong_rate=0.25, seed=1)
    assert not any(next_call(faults.at(0, 0))[1] for _ in range(100))
    worker = faults.at(1, 0)
    struck = np.mean([next_call(worker)[1] == {"swap"} for _ in range(2000)])
    assert struck == pytest.approx(0.25, abs=0.04)


def test_errors(untyped):
    with pytest.raises(ValueError, match=r"a fault is one of .*'swap'.*, not 'lie'"):
        Fault("lie")
    with pytest.raises(ValueError, match="wrong answers are a 'swap' of rows, not 'death'"):
        Faults.from_rates(wrong_workers={"death": [0]})


def check_same(*pools):
    """Each pool gives the same answers of two workers, the first of which swaps rows."""
    found = []
    for pool in pools:
        with pool, pool.dispatch(CALLS[:1].repeat(2, axis=0)) as batch:
            values = batch.wait(deadline=SOON).values
            order = sorted((worker, point) for point, worker in batch.workers.items())
            found.append([values[point] for _, point in order])
    np.testing.assert_allclose(*found, atol=1e-5)
    assert not close(found[0][0], RIGHT[0])
    assert close(found[0][1], RIGHT[0])


SWAP = Faults([Fault("swap", workers=(0,))], seed=5)


def test_simulated_workers_are_wrong_as_others_are():
    check_same(
        DevicePool(MODEL, 2, example=CALLS[0], faults=SWAP),
        SimulatedPool(MODEL, 2, seconds=lambda size: 1.0, faults=SWAP),
    )


@pytest.mark.slow
def test_workers_of_ray_are_wrong_as_threads_are():
    require("ray", "ray")
    options = {"faults": SWAP, "compiled": False}
    check_same(
        DevicePool(fragile(), 2, **options), RayPool(fragile(), 2, address="local", **options)
    )


def break_memory(pool):
    """Ask for weights, then have one worker's memory fail, and ask again."""
    assert set(pool.check_weights().values()) == {True}
    broken = CALLS[:1].copy()
    broken[0, 0, 0] = 77
    with pool.dispatch(broken) as batch:
        batch.wait(deadline=SOON)
        (struck,) = batch.workers.values()
    found = pool.check_weights()
    assert found == pool.check_weights()
    return {worker for worker, right in found.items() if not right}, struck


def test_workers_are_asked_for_their_weights():
    with DevicePool(fragile(), 3, compiled=False) as pool:
        assert break_memory(pool)[0] == {0, 1, 2}, "threads share the model"
    for options in ({}, {"worker_dtype": "bfloat16"}):
        with DevicePool(MODEL, 3, example=CALLS[0], **options) as pool:
            assert break_memory(pool)[0] == set()


@pytest.mark.slow
def test_actors_are_asked_for_their_weights():
    require("ray", "ray")
    with RayPool(fragile(), 3, compiled=False, address="local") as pool:
        changed, struck = break_memory(pool)
    assert changed == {struck}


def test_a_worker_that_does_not_answer_is_not_judged():
    faults = Faults([Fault("hang", workers=(1,))])
    with SimulatedPool(MODEL, 3, seconds=lambda size: 0.1, faults=faults) as pool:
        assert pool.check_weights(deadline=5.0) == {0: True, 2: True}
    with DevicePool(jnp.tanh, 2) as pool:
        pool.fence([0])
        assert pool.check_weights() == {0: True, 1: True}, "there are none to change"


# -- Models that lie, of the bench -----------------------------------------------------------------


@pytest.fixture(scope="module")
def lies():
    with bench_modules(lies="wrong_answers") as found:
        yield found.lies


@pytest.mark.parametrize(("bits", "allowed"), [("exponent", range(23, 31)), ("any", range(32))])
def test_one_bit_of_one_element_is_flipped(bits, allowed, lies):
    found = set()
    x = np.random.default_rng(3).normal(size=(7, 2)).astype(np.float32)
    random = np.random.default_rng(4)
    for _ in range(400):
        words = lies.flip_bit(x, bits, random).view(np.uint32) ^ x.view(np.uint32)
        (word,) = words[words > 0].tolist()
        assert word.bit_count() == 1
        found.add(word.bit_length() - 1)
    assert found == set(allowed)


def test_a_flipped_activation_is_another_in_each_call(lies):
    """Of the row's doubled numbers, their sum, or one output; in jitted functions, too."""
    x = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)

    @jax.jit
    def model(x):
        doubled = jax.jit(lambda x: 2 * x)(x)
        return doubled.sum(axis=1, keepdims=True) + jnp.zeros((3, 4))

    flipped, sizes = lies.flip_activation(model, "exponent", (4,)), set()
    for _ in range(40):
        changed = ~np.isclose(flipped(x), model(x), atol=1e-5)
        sizes.add(int(changed.sum()))
        assert changed.any(axis=1).sum() <= 1, "a bit of one row"
    assert {1, 4} <= sizes <= {0, 1, 4}


def test_parameters_that_are_not_the_models(lies):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)), jnp.float32)
    noise = np.asarray(lies.stale(Linear(w), 0.5, (1,)).w) - w
    assert np.std(noise) == pytest.approx(0.5 * np.sqrt(np.mean(np.square(w))), rel=0.1)
    changed = np.asarray(lies.flip_weight(Linear(w), (1,)).w) != w
    assert changed.sum() == 1
