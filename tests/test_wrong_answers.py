"""Workers that are healthy and wrong, on purpose: each kind of fault by what clients see of it."""

from typing import get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from schedulers import SOON, next_call

from nercc_jax import DevicePool, RayPool
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools._wrong_answers import WRONG_KINDS, ActivationFlip, WrongKind, flip_bit
from nercc_jax.testing import SimulatedPool
from nercc_models import load_data, load_model

WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
CALLS = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)


class Linear(eqx.Module):
    """Its answers are known by hand."""

    w: jax.Array

    def __call__(self, x):
        return x @ self.w


MODEL = Linear(jnp.asarray(WEIGHTS))
RIGHT = CALLS @ WEIGHTS


def answers(*faults, calls=CALLS, model=MODEL, seed=0, workers=1):
    """The answers to calls, one after the other."""
    with DevicePool(model, workers, example=calls[0], faults=Faults(faults, seed)) as pool:
        return [ask(pool, call) for call in calls]


def ask(pool, call):
    with pool.dispatch(call[None]) as batch:
        found = batch.wait(deadline=SOON)
    assert found.values is not None, found.failures
    return found.values[0]


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


def test_a_worker_that_repeats_itself_is_stuck():
    given = answers(Fault("repeat", calls=(2, 3, 4)))
    for number, stuck in enumerate((0, 1, 1, 1, 1, 5)):
        assert close(given[number], RIGHT[stuck])
    with DevicePool(MODEL, 1, example=CALLS[0], faults=Faults([Fault("repeat")])) as pool:
        ask(pool, CALLS[0, :2])
        assert close(ask(pool, CALLS[1]), RIGHT[0, [0, 1, 0, 1, 0]])


@pytest.mark.parametrize("size", [None, -0.25])
def test_a_bias_is_added(size):
    given = answers(Fault("bias", size=size))
    np.testing.assert_allclose(given - RIGHT, 1.0 if size is None else size, atol=1e-5)


def changed_bits(given, right):
    """Which bits differ, by element that differs."""
    words = np.bitwise_xor(given.view(np.uint32), right.view(np.uint32)).ravel()
    return [[bit for bit in range(32) if word >> bit & 1] for word in words.tolist() if word]


@pytest.mark.parametrize(
    ("bits", "allowed"),
    [("exponent", range(23, 31)), ("mantissa", range(23)), ("any", range(32))],
)
def test_one_bit_of_one_element_is_flipped(bits, allowed):
    found = set()
    x = np.random.default_rng(3).normal(size=(7, 2)).astype(np.float32)
    random = np.random.default_rng(4)
    for _ in range(400):
        ((bit,),) = changed_bits(flip_bit(x, bits, random), x)
        found.add(bit)
    assert found == set(allowed)


def test_answers_with_a_flipped_bit():
    """A mantissa's: an exponent's may be no number, which pools refuse anyway."""
    right = answers()
    given = answers(Fault("flip_answer", bits="mantissa"))
    again = answers(Fault("flip_answer", bits="mantissa"))
    for number, answer in enumerate(given):
        ((bit,),) = changed_bits(answer, right[number])
        assert bit < 23
        np.testing.assert_array_equal(answer, again[number])


def weights_of(given):
    """The parameters that answers were computed with."""
    return np.linalg.lstsq(CALLS.reshape(-1, 4), np.concatenate(given), rcond=None)[0]


def test_stale_weights_have_noise_of_their_size_and_are_the_same_everywhere():
    w = np.random.default_rng(0).normal(size=(4, 400)).astype(np.float32)
    fault = Fault("stale", size=0.5, workers=(0, 2))
    with (
        DevicePool(Linear(jnp.asarray(w)), 3, example=CALLS[0], faults=Faults([fault])) as pool,
        pool.dispatch(CALLS[:3].repeat(4, axis=0)[:3]) as batch,
    ):
        found = batch.wait(deadline=SOON)
        places = {worker: point for point, worker in batch.workers.items()}
    assert sorted(places) == [0, 1, 2]
    x = CALLS[0]
    one, right, other = (found.values[places[worker]] for worker in range(3))
    np.testing.assert_allclose(right, x @ w, atol=1e-4)
    np.testing.assert_array_equal(one, other)
    # The noise of an output is a sum over inputs, each with the noise's deviation.
    noise = (one - x @ w) / np.linalg.norm(x, axis=1, keepdims=True)
    rms = np.sqrt(np.mean(w.astype(float) ** 2))
    assert np.std(noise) == pytest.approx(0.5 * rms, rel=0.1)


def test_a_flipped_bit_of_a_weight_stays_for_a_workers_life():
    fault = Fault("flip_weight", bits="exponent")
    found = weights_of(answers(fault, seed=2))
    wrong = np.abs(found - WEIGHTS) > 1e-3 * np.abs(WEIGHTS)
    assert wrong.sum() == 1
    # The exponent's bits are powers of powers of two.
    ratio = np.log2(np.abs(found[wrong] / WEIGHTS[wrong]).item())
    assert np.log2(abs(ratio)) == pytest.approx(round(np.log2(abs(ratio))), abs=1e-2)


def check_asked(pool):
    """Ask for weights before the faults begin, and after; in between, and later, workers answer."""
    right = [True, True, True]
    assert [*pool.check_weights().values()] == right
    with pool.dispatch(CALLS[:3]) as batch:
        batch.wait(deadline=SOON)
    assert pool.check_weights() == {0: True, 1: False, 2: False}
    assert pool.check_weights() == {0: True, 1: False, 2: False}
    with pool.dispatch(CALLS[3:]) as batch:
        assert batch.wait(deadline=SOON).available.all()


LATER = {"calls": range(2, 100)}
CHANGES = Faults(
    [
        Fault("stale", workers=(1,), size=1e-6, **LATER),
        Fault("flip_weight", workers=(2,), bits="mantissa", **LATER),
    ]
)


@pytest.mark.parametrize("options", [{}, {"worker_dtype": "bfloat16"}, {"compiled": False}])
def test_workers_are_asked_for_their_weights(options):
    options = {"example": CALLS[0]} | options
    faults = CHANGES if options.get("worker_dtype") is None else Faults([CHANGES.faults[1]])
    with DevicePool(MODEL, 3, faults=faults, **options) as pool:
        if options.get("worker_dtype") is None:
            check_asked(pool)
        else:  # in which the noise is none
            assert pool.check_weights() == {0: True, 1: True, 2: True}
            assert all(pool.check_weights().values())
            assert pool.check_weights() == {0: True, 1: True, 2: False}


def test_a_worker_that_does_not_answer_is_not_judged():
    faults = Faults([Fault("hang", workers=(1,))])
    with SimulatedPool(MODEL, 3, seconds=lambda size: 0.1, faults=faults) as pool:
        assert pool.check_weights(deadline=5.0) == {0: True, 2: True}
    with DevicePool(jnp.tanh, 2) as pool:
        pool.fence([0])
        assert pool.check_weights() == {0: True, 1: True}, "there are none to change"


@pytest.mark.slow
def test_actors_are_asked_for_their_weights():
    require("ray", "ray")

    class Local(eqx.Module):  # which actors need not import
        w: jax.Array

        def __call__(self, x):
            return x @ self.w

    with RayPool(Local(MODEL.w), 3, example=CALLS[0], faults=CHANGES, address="local") as pool:
        check_asked(pool)


def test_a_flipped_bit_of_an_activation_is_another_in_each_call():
    """Of the row's doubled numbers, their sum, or one output; in jitted functions, too."""
    x = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    right = 2 * x.sum(axis=1, keepdims=True) + FOUR
    fault = Fault("flip_activation", bits="mantissa", workers=(0,))
    rows, sizes = set(), []
    with DevicePool(rows_of_four, 1, example=x, faults=Faults([fault], seed=4)) as pool:
        for _ in range(60):
            with pool.dispatch(x[None]) as batch:
                given = batch.wait(deadline=SOON).values[0]
            changed = np.abs(given - right) > 1e-5
            rows |= set(np.flatnonzero(changed.any(axis=1)).tolist())
            sizes.append(int(changed.sum()))
            assert changed.any(axis=1).sum() <= 1, "a bit of one row"
    assert rows == {0, 1, 2}
    assert set(sizes) == {0, 1, 4}, "rounded away, an output alone, all of a row's"
    assert sizes.count(0) < 20


FOUR = np.tile(np.arange(4, dtype=np.float32), (3, 1))


@jax.jit
def rows_of_four(x):
    doubled = jax.jit(lambda x: 2 * x)(x)
    return doubled.sum(axis=1, keepdims=True) + FOUR


def test_an_activation_is_flipped_in_a_network():
    network = load_model("lenet5-digits")
    x = np.asarray(network.preprocess(load_data(network.data, "test").images[:4]))
    fault, right = Fault("flip_activation", bits="exponent"), np.asarray(network(x))
    flipped = ActivationFlip(fault, (1,))(network)
    found = [np.asarray(flipped(x)) for _ in range(20)]
    changed = [not np.allclose(each, right, atol=1e-3, rtol=1e-3) for each in found]
    assert 3 < sum(changed) < 20, "some are no maximum, or tiny"


def test_weights_of_some_calls():
    """And nothing is compiled for them: a worker has its right parameters, too."""
    given = answers(Fault("stale", calls=(1, 2)))
    same = [close(answer, right) for answer, right in zip(given, RIGHT, strict=True)]
    assert same == [True, False, False, True, True, True]


def test_by_workers_and_rates():
    faults = Faults.from_rates(wrong_workers={"swap": [1]}, wrong_rate=0.25, seed=1)
    assert not any(next_call(faults.at(0, 0))[1] for _ in range(100))
    worker = faults.at(1, 0)
    struck = np.mean([next_call(worker)[1] == {"swap"} for _ in range(2000)])
    assert struck == pytest.approx(0.25, abs=0.04)
    for kind in WRONG_KINDS:
        assert next_call(Faults.from_rates(wrong_workers={kind: [0]}).at(0, 0)) == (0.0, {kind})


@pytest.mark.parametrize("kind", ["stale", "flip_weight"])
def test_a_model_without_parameters_cannot_have_others(kind):
    faults = Faults([Fault(kind)])
    for pool in (
        DevicePool,
        RayPool,
        lambda *each, **kept: SimulatedPool(*each, seconds=len, **kept),
    ):
        with pytest.raises(ValueError, match=f'"{kind}" changes the parameters of a model that is'):
            pool(np.tanh, 1, faults=faults)


def test_settings_have_the_same_kinds():
    """They are read before JAX is imported."""
    require("pydantic_settings", "serve")
    from nercc_jax.serving._settings import _WrongKind

    assert get_args(_WrongKind) == get_args(WrongKind)


def test_errors(untyped):
    with pytest.raises(ValueError, match=r"a fault is one of .*'stale'.*, not 'lie'"):
        Fault("lie")
    with pytest.raises(ValueError, match="only bias and stale have a size, not 'swap'"):
        Fault("swap", size=1.0)
    with pytest.raises(ValueError, match=r"wrong answers are .*, not 'death'"):
        Faults.from_rates(wrong_workers={"death": [0]})


def test_simulated_workers_are_wrong_as_others_are():
    faults = Faults([Fault("swap", workers=(0,)), Fault("stale", workers=(1,))], seed=5)
    found = []
    for pool in (
        DevicePool(MODEL, 2, example=CALLS[0], faults=faults),
        SimulatedPool(MODEL, 2, seconds=lambda size: 1.0, faults=faults),
    ):
        with pool, pool.dispatch(CALLS[:1].repeat(2, axis=0)) as batch:
            values = batch.wait(deadline=SOON).values
            found.append(
                [
                    values[point]
                    for _, point in sorted(
                        (worker, point) for point, worker in batch.workers.items()
                    )
                ]
            )
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
def test_workers_of_ray_are_wrong_as_threads_are():
    require("ray", "ray")

    class Local(eqx.Module):
        """One that actors need not import."""

        w: jax.Array

        def __call__(self, x):
            return x @ self.w

    faults = Faults([Fault("swap", workers=(0,)), Fault("stale", workers=(1,))], seed=5)
    found = []
    for pool in (
        DevicePool(MODEL, 2, example=CALLS[0], faults=faults),
        RayPool(Local(MODEL.w), 2, example=CALLS[0], faults=faults, address="local"),
    ):
        with pool, pool.dispatch(CALLS[:1].repeat(2, axis=0)) as batch:
            values = batch.wait(deadline=SOON).values
            order = sorted((worker, point) for point, worker in batch.workers.items())
            found.append([values[point] for _, point in order])
    np.testing.assert_allclose(*found, atol=1e-5)
    assert not close(found[0][0], RIGHT[0])
    assert not close(found[0][1], RIGHT[0])
