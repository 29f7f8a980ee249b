"""Regression points of each group: they follow the data, or copy what is uncertain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import Lagrange, NeRCC, Scheme, coded_inference
from nercc_jax.codes._grouped import following_points

K, N = 20, 24


def test_points_follow_the_distances():
    code = NeRCC(5, 8, points="interleaved")
    places = jnp.array([0.0, 1.0, 3.0, 3.0, 10.0])[:, None]
    alpha, beta = following_points(code, places)
    first, last = float(code.alpha[0]), float(code.alpha[-1])
    steps = np.array([7.0, 1e-3 * 2.5, 2.0, 1.0])  # from the least alpha on: the last data point's
    share = np.concatenate([[0], np.cumsum(steps)]) / steps.sum()
    np.testing.assert_allclose(alpha[::-1], last + (first - last) * share, atol=1e-5)
    np.testing.assert_array_equal(beta[:5], alpha)  # to the last bit: answers stay exact
    for new, old in zip(beta[5:], code.beta[5:], strict=True):
        gap = int(np.sum(np.asarray(code.alpha) > float(old)))  # the data points before it
        ratio = (old - code.alpha[gap]) / (code.alpha[gap - 1] - code.alpha[gap])
        np.testing.assert_allclose(
            new, alpha[gap] + ratio * (alpha[gap - 1] - alpha[gap]), atol=1e-5
        )
    everywhere = following_points(NeRCC(5, 9), jnp.ones((5, 2)))  # all the same: as far apart
    np.testing.assert_allclose(np.diff(everywhere[0]), np.diff(everywhere[0])[0], rtol=1e-4)
    assert everywhere[1][0] == 1, "what lies outside stays"
    slope = jax.jacobian(lambda x: following_points(code, x)[0])(places + jnp.arange(5)[:, None])
    assert np.isfinite(slope).all()
    with pytest.raises(ValueError, match="Lagrange has no smoothing splines"):
        Scheme(Lagrange(3, 5), follow="inputs")


def test_a_sweep_of_one_parameter():
    """20 points, 4 workers more, 2 stragglers: 0.002 of the spread; fixed points have 0.03."""

    def sweep(x):
        t = 3 * x[:, :1]
        return jnp.concatenate([jnp.sin(t), jnp.exp(-t), t**2 / (1 + t)], axis=1)

    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 1, size=(12, K)), axis=1).reshape(-1, 1).astype("float32")
    masks = rng.permuted(np.tile(np.arange(N) > 1, (12, 1)), axis=1)
    code = NeRCC(K, N, lambda_dec=0.0, points="interleaved")
    own = np.asarray(sweep(jnp.asarray(x)))
    found = {}
    for name, follow in {"fixed": None, "inputs": "inputs", "given": lambda x: x}.items():
        decoded = coded_inference(sweep, Scheme(code, follow=follow))(x, masks)
        found[name] = np.sqrt(np.mean((decoded - own) ** 2) / np.mean((own - own.mean(0)) ** 2))
    assert found["inputs"] == found["given"] <= 0.002
    assert found["fixed"] > 0.02
