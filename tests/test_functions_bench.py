"""The functions benchmark: its numbers for one function against NumPy, by hand."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require

from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.surrogates import Kernel

NUM_DATA = 20


@pytest.fixture(scope="module")
def bench():
    """bench/functions.py and its neighbours, which import each other."""
    require("matplotlib", "demo")
    parts = {name: f"_functions_{name}" for name in ("cases", "systems")}
    with bench_modules(command="functions", **parts) as found:
        yield found


def _wave(x):
    return jnp.stack([jnp.sin(x[:, 0] + x[:, 1]), x[:, 0] * x[:, 1]], axis=1)


def _case(bench):
    return bench.cases.Case("wave", "a wave", _wave, bench.cases.within((-1, 1), (-1, 1)))


def _relative(predictions, own):
    spread = np.mean((own - own.mean(axis=0)) ** 2)
    return np.sqrt(np.mean((predictions - own) ** 2) / spread)


def test_lost_copies_by_hand(bench):
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (2 * NUM_DATA, 2)).astype(np.float32)
    own = np.asarray(_wave(x))
    answered = random.random((3, 2, NUM_DATA)) < 0.8
    kernel = Kernel("squared_exponential", centre=np.zeros(2), noise=1e-4)
    found = bench.systems.lost_copies(
        jnp.asarray(x), jnp.asarray(own), jnp.asarray(answered), kernel, None
    )
    wanted = [np.empty((3, 2 * NUM_DATA, 2)) for _ in found]
    for s in range(3):
        for g in range(2):
            rows = slice(g * NUM_DATA, (g + 1) * NUM_DATA)
            points, outputs, seen = x[rows].astype(float), own[rows], answered[s, g]
            square = ((points[:, None] - points) ** 2).sum(-1)
            known = np.exp(-square[:, seen] / 2)
            covariance = known[seen] + 1e-4 * np.eye(seen.sum())
            mean = outputs[seen].mean(0)
            process = mean + known @ np.linalg.solve(covariance, outputs[seen] - mean)
            nearest = outputs[seen][square[:, seen].argmin(1)]
            for place, filled in enumerate((mean, nearest, process)):
                wanted[place][s, rows] = np.where(seen[:, None], outputs, filled)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_recall_by_hand(bench):
    others = np.random.default_rng(0).normal(size=(200, 4)).astype("float32")
    own = others[:20] + 0.01

    def nearest(points):
        return np.argsort(((points[:, None] - others) ** 2).sum(-1), axis=1)[:, :10]

    for shift in (0, 0.3):
        both = zip(nearest(own), nearest(own + shift), strict=True)
        wanted = np.mean([len(set(a) & set(b)) / 10 for a, b in both])
        found = bench.systems.recall(jnp.asarray(own + shift)[None], own, jnp.asarray(others))
        np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_one_function_by_hand(bench):
    systems, size = bench.systems, bench.systems.Size(30, groups=2, sets=2, chosen=1, judged=1)
    found = systems.Bench(_case(bench), size, print)
    (draw,) = found.draws(True)
    masks = draw.masks(systems.CELLS[1], size.sets)[..., :NUM_DATA]
    learner = found.fit(draw.past, draw.past_outputs)
    # With the noise that so smooth a function is tuned to, rounding would be most of the error.
    noisy = eqx.tree_at(lambda kernel: kernel.noise, learner.kernel, jnp.asarray(1e-4))
    learner = learner.with_kernel(noisy)
    code = systems._nercc(NUM_DATA, "interleaved")
    scheme = systems.Scheme(code, learner, redundancy="code")
    predictions, deviation = found.decode(scheme, draw, masks)
    numbers = found._numbers(predictions, draw, calibrate_learner_bars(learner)(deviation))
    responded, own = np.asarray(masks).reshape(size.sets, -1), np.asarray(draw.own)
    posterior = np.stack([_posterior(learner.kernel, draw, mask) for mask in np.asarray(masks)])
    assert numbers.uncertain == np.sum(~responded)
    exact, wanted = np.asarray(predictions)[responded], np.stack([own, own])[responded]
    np.testing.assert_allclose(exact, wanted, rtol=1e-6)
    assert numbers.rmse == pytest.approx(_relative(posterior, own), rel=0.03)


def _posterior(kernel, draw, mask):
    """Each group's posterior given past answers and its own, in float64."""
    x, own = draw.x.astype(float), np.asarray(draw.own, float)
    past, outputs = draw.past.astype(float), np.asarray(draw.past_outputs, float)
    centre, noise, predictions = outputs.mean(axis=0), float(kernel.noise), own.copy()
    for g, seen in enumerate(mask):
        rows = np.arange(g * NUM_DATA, (g + 1) * NUM_DATA)
        known = np.concatenate([past, x[rows[seen]]])
        y = np.concatenate([outputs, own[rows[seen]]]) - centre
        covariance = _covariance(kernel, known, known) + noise * np.eye(len(known))
        added = _covariance(kernel, x[rows[~seen]], known) @ np.linalg.solve(covariance, y)
        predictions[rows[~seen]] = centre + added
    return predictions


def _covariance(kernel, a, b):
    unit = (
        np.asarray(kernel.unit, float) * np.asarray(kernel.widths, float)[np.asarray(kernel.groups)]
    )
    a, b = ((each - np.asarray(kernel.centre, float)) / unit for each in (a, b))
    r = np.sqrt(((a[:, None] - b) ** 2).sum(-1))
    if kernel.shape == "squared_exponential":
        shape = np.exp(-(r**2) / 2)
    else:
        shape = (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r)
    return shape + float(kernel.linear) * a @ b.T
