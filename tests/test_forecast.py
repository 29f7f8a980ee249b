"""Forecasts against `evaluate` and against decoding group by group, compared in plain NumPy."""

from concurrent.futures import ThreadPoolExecutor

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import AbstractCode, Berrut, NeRCC, Parity, Replication
from nercc_jax.evaluation import record_answers

K, N = 4, 6
CODES = {
    "NeRCC": NeRCC(K, N),
    "BACC": Berrut(K, N),
    "copies": Replication(K, N),
    "ParM": Parity(K, N),
}
WEIGHTS = np.random.default_rng(5).normal(size=(3, 4)).astype("float32")
MASKS = np.array(
    [
        [True, True, True, True, True, True],
        [True, False, True, True, False, True],
        [False, True, False, True, False, False],
        [False, False, False, False, True, True],
        [False, False, False, False, False, False],
    ]
)


def model(x):
    return jnp.tanh(x @ WEIGHTS)


def parity_model(x):
    return x @ WEIGHTS


def broken_at_mixtures(x):
    """NaN on some coded data points; data points themselves are of length 1."""
    return jnp.where(jnp.sum(x**2, axis=1, keepdims=True) < 0.5, jnp.nan, model(x))


def models(name, served=model):
    return (served, parity_model) if name == "ParM" else served


def data(dtype="float32", points=22):
    x = np.random.default_rng(0).normal(size=(points, 3))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)


def worker_answers(name, group, served):
    """Each worker's answer to the group: the coded data points one at a time."""
    code = CODES[name]
    coded = np.asarray(code.encode(group))
    run = [served if kind == 0 else parity_model for kind in code.worker_models]
    return np.concatenate([f(coded[n : n + 1]) for n, f in enumerate(run)])


@eqx.filter_jit
def matrix(code, responded):
    return code.decoder_matrix(responded)


def expected(name, x, mask, served=model):
    """RMSE over recovered data points, and the share of all that is lost or has another argmax."""
    squares, wrong = [], []
    for group in x[: len(x) // K * K].reshape(-1, K, 3):
        own = np.asarray(served(group))
        answers = worker_answers(name, group, served)
        responded = mask & np.isfinite(answers).all(axis=1)
        clean = np.where(responded[:, None], answers, 0).astype(float)
        decoded = np.asarray(matrix(CODES[name], responded), float) @ clean
        for k in range(K):
            kept = bool(CODES[name].recovered(responded)[k])
            wrong.append(not kept or decoded[k].argmax() != own[k].argmax())
            if kept:
                squares.append(((decoded[k] - own[k]) ** 2).sum())
    return np.sqrt(np.mean(squares)) if squares else np.nan, np.mean(wrong)


@pytest.mark.parametrize("name", CODES)
def test_it_is_the_error_of_decoding(name, dtype):
    x = data(dtype)
    forecast = record_answers(models(name), CODES[name], x)
    assert forecast.coded.shape == (5, N, 4)
    assert forecast.own.shape == (5, K, 4)
    assert forecast.coded.dtype == dtype
    digits = {"float32": 1e-5, "float64": 1e-9 if name != "NeRCC" else 1e-6}[dtype]
    for mask in MASKS:
        error, disagreement = expected(name, x, mask)
        np.testing.assert_allclose(forecast.error(mask), error, rtol=digits, atol=digits)
        np.testing.assert_allclose(forecast.disagreement(mask), disagreement, atol=1e-6)
    assert np.isnan(forecast.error(MASKS[-1]))
    assert forecast.disagreement(MASKS[-1]) == 1


def test_a_broken_answer_makes_a_straggler_in_its_group():
    x = data()
    forecast = record_answers(broken_at_mixtures, CODES["NeRCC"], x)
    broken = ~np.isfinite(forecast.coded).all(axis=2)
    assert broken.any()
    assert not broken.all(axis=1).any()
    for mask in MASKS[:4]:
        error, disagreement = expected("NeRCC", x, mask, broken_at_mixtures)
        np.testing.assert_allclose(forecast.error(mask), error, rtol=1e-4)
        np.testing.assert_allclose(forecast.disagreement(mask), disagreement, atol=1e-6)
    assert forecast.error(MASKS[0]) > record_answers(model, CODES["NeRCC"], x).error(MASKS[0])


@pytest.fixture
def lowered():
    """What JAX makes programs of while the test runs."""
    programs = []

    def listen(event, duration, **about):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            programs.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_compilation_serves_every_mask(lowered):
    forecast = record_answers(model, Berrut(K, 7), data())
    lowered.clear()
    enough = forecast.below(max_error=1)
    assert lowered, "compiled before the first answer comes"
    lowered.clear()
    every = (np.arange(1, 2**7)[:, None] >> np.arange(7)) % 2 == 1
    verdicts = [enough(mask) for mask in every]
    assert len(set(verdicts)) == 2
    forecast.error(every[5])
    forecast.disagreement(every[6])
    assert not lowered


def test_masks_can_be_batched_and_jitted():
    forecast = record_answers(model, CODES["copies"], data())
    many = jax.jit(jax.vmap(forecast.disagreement))(MASKS)
    np.testing.assert_allclose(many, [forecast.disagreement(mask) for mask in MASKS], atol=1e-6)


@pytest.mark.parametrize("name", ["copies", "BACC"])
def test_enough_by_disagreement(name):
    """The limit itself is enough, whatever float32 makes of a share of 20 data points."""
    forecast = record_answers(model, CODES[name], data())
    shares = [round(expected(name, data(), mask)[1] * 20) / 20 for mask in MASKS]
    assert len(set(shares)) > 2
    for share in set(shares) - {1.0}:
        enough, not_yet = (
            forecast.below(max_disagreement=limit) for limit in (share, max(share - 1e-3, 0))
        )
        assert [enough(mask) for mask in MASKS] == [other <= share for other in shares]
        fewer = [other < share or share == 0 == other for other in shares]
        assert [not_yet(mask) for mask in MASKS] == fewer


def test_enough_by_error_wants_every_data_point():
    """Copies make no error, but lose data points."""
    enough = record_answers(model, CODES["copies"], data()).below(max_error=1)
    lossy = MASKS[2]
    assert not np.asarray(CODES["copies"].recovered(lossy)).all()
    assert record_answers(model, CODES["copies"], data()).error(lossy) < 1e-6
    assert enough(MASKS[0])
    assert not enough(lossy)
    assert not enough(MASKS[-1])
    forecast = record_answers(model, CODES["NeRCC"], data())
    error = float(forecast.error(MASKS[1]))
    assert forecast.below(max_error=error * 1.001)(MASKS[1])
    assert not forecast.below(max_error=error * 0.999)(MASKS[1])


class CountedCode(AbstractCode):
    """A code that counts how often a program makes its decoder."""

    made: list = eqx.field(static=True)
    num_data: int = eqx.field(static=True, default=K)
    num_workers: int = eqx.field(static=True, default=N)

    def encoder_matrix(self):
        return CODES["BACC"].encoder_matrix()

    def decoder_matrix(self, available):
        jax.debug.callback(lambda: self.made.append(1))
        return CODES["BACC"].decoder_matrix(available)

    def recovered(self, available):
        return CODES["BACC"].recovered(available)


def test_a_known_mask_is_not_decoded_again():
    code = CountedCode([])
    enough = record_answers(model, code, data()).below(max_disagreement=0.1)

    def decoded(mask):
        jax.effects_barrier()
        before = len(code.made)
        enough(mask)
        jax.effects_barrier()
        return len(code.made) > before

    assert not decoded(MASKS[0]), "all workers were decoded before"
    assert not decoded(MASKS[-1]), "nobody needs no decoding"
    assert [decoded(MASKS[1]) for _ in range(3)] == [True, False, False]


def test_enough_may_be_asked_from_threads():
    enough = record_answers(model, CODES["NeRCC"], data()).below(max_disagreement=0.2)
    masks = np.random.default_rng(1).uniform(size=(8, N)) < 0.6
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(enough, masks))
    assert verdicts == [enough(mask) for mask in masks]


def test_it_runs_on_the_device_it_is_put_on():
    device = jax.devices()[3]
    forecast = jax.device_put(record_answers(model, CODES["NeRCC"], data()), device)
    assert forecast.error(MASKS[1]).devices() == {device}
    assert forecast.below(max_error=100)(MASKS[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": data(points=3)}, "3 data points fill no group of 4"),
        ({"x": np.full((4, 3), np.nan, np.float32)}, "are not finite: take them out"),
        ({"x": np.ones((4, 3), np.uint8)}, "x is uint8: codes work on floats"),
        ({"code": CODES["ParM"]}, "run 2 models, but 1 came"),
        ({"model": (model, parity_model)}, "run 1 model, but 2 came"),
        ({"model": ()}, "run 1 model, but 0 came"),
        ({"model": lambda x: model(x) * jnp.inf}, "own outputs must be finite"),
    ],
)
def test_errors_of_making(change, message, untyped):
    given = {"model": model, "code": CODES["NeRCC"], "x": data(), **change}
    with pytest.raises(ValueError, match=message):
        record_answers(**given)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "give max_disagreement or max_error, not neither"),
        ({"max_disagreement": 0.1, "max_error": 0.1}, "not both"),
        ({"max_disagreement": 1}, r"max_disagreement must be in \[0, 1\), not 1"),
        ({"max_disagreement": -0.1}, r"max_disagreement must be in \[0, 1\), not -0.1"),
        ({"max_disagreement": float("nan")}, r"max_disagreement must be in \[0, 1\), not nan"),
        ({"max_error": 0}, "max_error must be positive, not 0"),
        ({"max_error": float("nan")}, "max_error must be positive, not nan"),
    ],
)
def test_errors_of_limits(limits, message):
    with pytest.raises(ValueError, match=message):
        record_answers(model, CODES["BACC"], data()).below(**limits)


@pytest.mark.parametrize("mask", [np.ones(5, bool), np.ones((2, N), bool), np.ones(N), np.True_])
def test_errors_of_masks(mask, untyped):
    forecast = record_answers(model, CODES["BACC"], data())
    for ask in (forecast.error, forecast.disagreement, forecast.below(max_error=1)):
        with pytest.raises(ValueError, match=r"boolean mask of shape \(6,\)"):
            ask(mask)
