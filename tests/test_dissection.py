"""Fits as accelerators make them, on a CPU: the suite of `test_splines`, and against the filter."""

import contextlib
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_splines as suite

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded, coded_inference

from nercc_jax.splines import _rule  # isort: skip
from nercc_jax.evaluation import nested_objective
from nercc_jax.inference import robust_decode
from nercc_jax.splines import (
    posterior_variance,
    process_variance,
    smoothing_matrix,
    smoothing_spline,
)

ROWS, ROWS_TPU = _rule.ROWS["other"], _rule.ROWS["tpu"]
KINDS = ["chebyshev", "uniform", "random", "repeated"]


@contextlib.contextmanager
def eliminated_with(rows):
    """CPUs fit as accelerators do; what was lowered otherwise must not come back."""
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_rule.ROWS, "cpu", rows)
        yield
    jax.clear_caches()


@pytest.fixture(scope="class")
def as_on_accelerators():
    with eliminated_with(ROWS):
        yield


def ask(t, lambda_, y, at, available, end_weights, ends: Any = "natural"):
    """All that can be asked of a fit, of observations some of which count more."""
    weights = jnp.linspace(0.5, 3.0, len(t), dtype=t.dtype)
    given = {"available": available, "end_weights": end_weights, "weights": weights}
    spline = smoothing_spline(t, y, lambda_, ends=ends, **given)
    matrix = smoothing_matrix(t, at, lambda_, ends=ends, **given)
    variance = posterior_variance(t, at, lambda_, **given)
    return spline.evaluate(at), matrix, variance, process_variance(t, y, lambda_, **given)


def both_ways(function, problems, rows=ROWS):
    """The function's results for each problem, by the filter and by dissection."""
    found = []
    for each in (None, rows):
        with eliminated_with(each):
            compiled = jax.jit(function)
            found.append([jax.tree.leaves(compiled(*problem)) for problem in problems])
    for one, other in zip(*found, strict=True):
        yield from zip(one, other, strict=True)


def problems(n, lambdas):
    rng = np.random.default_rng(n)
    t = suite.make_knots("repeated", n, rng).astype("float32")
    y = jnp.asarray(np.sin(5 * t.astype(float))[:, None] * [1, -2], jnp.float32)
    at = np.linspace(-1.05, 1.05, 5).astype("float32")
    for lost in (0, n // 3, n - 2, n - 1, n):
        available = rng.permutation(n) >= lost
        for lambda_ in lambdas:
            yield t, np.float32(lambda_), y, at, available, np.array([0.3, 2.0], "float32")


@pytest.mark.parametrize(("n", "rows"), [(2, ROWS), (9, ROWS), (9, ROWS_TPU)])
def test_both_ways_give_the_same(n, rows):
    """Coincident points, prices at the ends, few and no observations, all lambdas."""
    for a, b in both_ways(ask, list(problems(n, (0, 1e-6, 1e-2, np.inf))), rows):
        scale = np.max(np.abs(np.where(np.isfinite(a), a, 1)), initial=1)
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=4e-6 * scale)


@pytest.mark.slow
def test_both_ways_have_the_same_ends_and_gradients():
    rng = np.random.default_rng(6)
    t, ends = np.sort(rng.uniform(-1, 1, 6)), np.array([0.3, 2.0])
    y, at = np.sin(5 * t)[:, None], np.array([-0.9, 0.1])
    available = np.arange(6) != 2
    with jax.enable_x64(True):
        for kind in ("natural", "not-a-knot"):

            def total(t, lambda_, y, ends, kind=kind):
                found = ask(t, lambda_, y, at, available, ends, kind)
                return sum(jnp.sum(each) for each in found)

            # Forwards, the penalty's rows have right-hand sides of their own.
            slopes = [
                each(total, argnums=(0, 1, 2, 3)) for each in (jax.value_and_grad, jax.jacfwd)
            ]
            cases = [(t, np.asarray(lambda_), y, ends) for lambda_ in (1e-8, 1e-3)]
            for a, b in itertools.chain(*(both_ways(each, cases) for each in slopes)):
                np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9 * np.max(np.abs(a)))


@pytest.mark.parametrize("gradient", [False, True])
def test_the_platform_chooses(gradient):
    """A program for a TPU or a GPU has no loop over knots, one for a CPU has."""
    code = NeRCC(3, 6)

    def run(mask, lambda_):
        return smoothing_matrix(
            code.beta,
            code.alpha,
            lambda_,
            available=mask,
            ends="not-a-knot" if gradient else "natural",
        )

    def slope(mask, lambda_):
        return jax.grad(lambda lambda_: jnp.sum(run(mask, lambda_)))(lambda_)

    traced = jax.jit(slope if gradient else run).trace(jnp.ones(6, bool), 0.1)
    for platform, loops in (("cpu", True), ("tpu", False), ("cuda", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.while" in text) == loops, platform


def test_nothing_is_read_where_nothing_is_available():
    t, mask = jnp.array([-1.0, jnp.nan, 0.2, jnp.inf, 1.0]), jnp.array([1, 0, 1, 0, 1], bool)
    y = jnp.where(mask, jnp.arange(5.0), jnp.nan)[:, None]
    at = jnp.array([0.0, 0.5])
    for a, b in both_ways(ask, [(t, 1e-3, y, at, mask, jnp.zeros(2))]):
        assert np.isfinite(a).all()
        # In float32 the process's variance differs by 2e-5 between the ways.
        np.testing.assert_allclose(b, a, rtol=4e-5, atol=1e-6)


SUITE = [
    # Few knots are compared with the filter's above, and very many follow.
    *((suite.test_decoding_is_accurate, 20, kind, "float32") for kind in KINDS),
    *((suite.test_decoding_is_accurate, 20, kind, "float64") for kind in ("random", "repeated")),
    (suite.test_limits, "float32"),
    *((suite.test_few_observations, lambda_, "float32") for lambda_ in (0.0, np.inf)),
    (suite.test_large_n_stays_accurate, "float32"),
    *(
        (suite.test_a_price_on_end_slopes_is_accurate, 9, ends, "float32")
        for ends in suite.END_WEIGHTS
    ),
    *((suite.test_gradients_are_finite_in_float32, "repeated", lambda_) for lambda_ in (0.0, 1e2)),
]


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_accelerators")
class TestSuite:
    """What the filter's fits promise."""

    @pytest.mark.parametrize(
        "promise", SUITE, ids=[" ".join(map(str, (f.__name__[5:], *rest))) for f, *rest in SUITE]
    )
    def test_it_is_kept(self, promise):
        test, *arguments = promise
        with jax.enable_x64("float64" in arguments):
            test(*arguments)


# -- What accelerators would do to the numbers, read from programs that are sent to them -----------


T, AT, Y = jnp.linspace(-1, 1, 9), jnp.linspace(-1, 1, 4), jnp.ones((9, 3))
CODES = {
    "nercc": NeRCC(4, 9),
    "nercc-exact": NeRCC(4, 9, points="interleaved", exact=True),
    "berrut": Berrut(4, 9),
    "lagrange": Lagrange(4, 9, degree=2),
    "parity": Parity(4, 6),
    "replication": Replication(4, 9),
    "uncoded": Uncoded(4),
}


def decoding(code):
    y, mask = jnp.ones((code.num_workers, 3)), jnp.ones(code.num_workers, bool)
    return lambda code, y, mask: code.try_decode(y, mask), (code, y, mask)


def objective(code):
    """Its gradient has those of encoding and of decoding, in the code and in the answers."""
    x, masks = jnp.ones((2, 4, 3)), jnp.ones((3, code.num_workers), bool)

    def error(code):
        return nested_objective(jnp.sin, code, x, masks)

    return jax.grad(error, allow_int=True), (code,)


PROGRAMS = {
    "values": (lambda t, y: smoothing_spline(t, y, 1e-3).evaluate(AT), (T, Y)),
    "matrix": (lambda t: smoothing_matrix(t, AT, 1e-3), (T,)),
    "posterior variance": (lambda t: posterior_variance(t, AT, 1e-3), (T,)),
    "process variance": (lambda t, y: process_variance(t, y, 1e-3), (T, Y)),
    "variances": (
        lambda y: CODES["nercc"].decode(y, jnp.ones(9, bool), return_uncertainty=True),
        (Y,),
    ),
    "robust": (
        lambda y: robust_decode(CODES["nercc"], y, np.ones(9, bool), max_adversaries=1),
        (Y,),
    ),
    "inference": (
        lambda x: coded_inference(jnp.sin, CODES["nercc"])(x, np.ones(9, bool)),
        (jnp.ones((4, 3)),),
    ),
    "objective's gradient": objective(CODES["nercc"]),
    **{
        f"encode, {name}": (lambda x, c=c: c.encode(x), (jnp.ones((4, 3)),))
        for name, c in CODES.items()
    },
    **{f"decode, {name}": decoding(code) for name, code in CODES.items()},
}


def lowered(program, arguments, platform="tpu"):
    return jax.jit(program).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_products_are_at_full_precision(name, platform):
    program, arguments = PROGRAMS[name]
    text = lowered(program, arguments, platform)
    products = [
        line for line in text.splitlines() if re.search(r"stablehlo\.dot(_general)?\b", line)
    ]
    rounded = [line for line in products if "[HIGHEST, HIGHEST]" not in line]
    assert not rounded
    assert "convolution" not in text
    assert "f64" not in text
    assert "callback" not in text
