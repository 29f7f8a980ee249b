"""Tuning: free parameters and back, and the errors."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import nercc_jax as nj
from nercc_jax._parameters import parametrize
from nercc_jax._points import LAYOUTS

K, N = 3, 6

# -- Parameters ------------------------------------------------------------------------------------

# Ends, twins, an alpha that is a beta, and no order.
POINTS = (np.array([0.6, -0.8, 0.1]), np.array([0.2, 1.0, -0.5, 0.2, -1.0, 0.1]))


@pytest.mark.parametrize("layout", [*LAYOUTS, "own"])
def test_parameters_start_at_the_code(layout, dtype):
    code = nj.NeRCC(
        K,
        N,
        lambda_enc=3e-9,
        lambda_dec=2e-5,
        gap_exponent=-1.25,
        end_penalty=70.0,
        points=POINTS if layout == "own" else layout,
    )
    free, rebuild = parametrize(code, points=True)
    assert free.keys() == {
        "log_lambda_enc",
        "log_lambda_dec",
        "log_end_penalty",
        "gap_exponent",
        "alpha_shifts",
        "beta_shifts",
    }
    again = rebuild(free)
    assert jax.tree.structure(again) == jax.tree.structure(code)
    # A logarithm of 20 has an absolute rounding of 20 eps, which exp makes a relative one.
    for name in ("lambda_enc", "lambda_dec", "end_penalty"):
        rounding = 50 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(getattr(again, name), getattr(code, name), rtol=rounding)
    assert float(again.gap_exponent) == -1.25
    for name in ("alpha", "beta"):
        assert getattr(again, name).dtype == dtype
        np.testing.assert_allclose(getattr(again, name), getattr(code, name), atol=1e-6)
    fixed, rebuild = parametrize(code, points=False)
    np.testing.assert_array_equal(rebuild(fixed).beta, code.beta)
    assert fixed.keys() == {n for n in free if not n.endswith("_shifts")}


def test_no_smoothing_starts_from_hardly_any():
    code = nj.NeRCC(K, N, lambda_enc=0.0, lambda_dec=0.0, end_penalty=0.0)
    free, _ = parametrize(code, points=False)
    for name, points in (("log_lambda_enc", code.alpha), ("log_lambda_dec", code.beta)):
        least = 4 * np.log(oracle.mean_gap(np.asarray(points)) / 30)
        np.testing.assert_allclose(free[name], least, rtol=1e-5)
    assert float(free["log_end_penalty"]) == 0


SHIFTS = st.floats(-2, 2, width=32)


@hypothesis.given(
    st.lists(SHIFTS, min_size=3, max_size=3), st.lists(SHIFTS, min_size=2, max_size=2)
)
@hypothesis.settings(max_examples=25)
def test_points_keep_their_order_their_twins_and_their_ends(alpha_shifts, beta_shifts):
    with jax.enable_x64(True):
        code = nj.NeRCC(K, N, points=POINTS)
        free, rebuild = parametrize(code, points=True)
        shifts = {"alpha_shifts": np.array(alpha_shifts), "beta_shifts": np.array(beta_shifts)}
        assert {name: free[name].shape for name in shifts} == {
            "alpha_shifts": (3,),
            "beta_shifts": (2,),  # 0.2 and its twin, -0.5; not the ends, nor the one on an alpha
        }
        moved = rebuild(free | {name: jnp.asarray(s) for name, s in shifts.items()})
        alpha, beta = np.asarray(moved.alpha), np.asarray(moved.beta)
        np.testing.assert_array_equal(np.argsort(alpha), np.argsort(POINTS[0]))
        assert (np.diff(np.sort(alpha)) > 0).all()
        assert beta[1] == 1
        np.testing.assert_allclose(beta[4], -1, atol=1e-12)
        assert beta[0] == beta[3], "twins"
        assert beta[5] == alpha[2], "it follows"
        assert -1 < beta[2] < beta[0] < 1
        if any(alpha_shifts):
            assert (alpha != code.alpha).any()


@pytest.mark.parametrize("layout", ["interleaved", "repeated"])
def test_betas_follow_their_alphas(layout):
    code = nj.NeRCC(K, N, points=layout)
    free, rebuild = parametrize(code, points=True)
    number = {"interleaved": 3, "repeated": 0}[layout]
    assert free["beta_shifts"].shape == (number,)
    shifts = jnp.array([0.3, -0.2, 0.5])
    moved = rebuild(free | {"alpha_shifts": shifts, "beta_shifts": shifts[:number]})
    assert np.abs(moved.alpha - code.alpha).min() > 1e-3
    same = np.asarray(code.beta)[:, None] == np.asarray(code.alpha)
    assert same.any(axis=0).all()
    np.testing.assert_array_equal(np.asarray(moved.beta)[:, None] == np.asarray(moved.alpha), same)


def test_one_point_moves_alone_to_first_order():
    """Among even gaps g a shift s moves a point's angle by g s, and no other's."""
    with jax.enable_x64(True):
        code = nj.NeRCC(K, N)
        free, rebuild = parametrize(code, points=True)
        moves = jax.jacfwd(lambda s: rebuild(free | {"beta_shifts": s}).beta)(free["beta_shifts"])
        gap = np.pi / (N - 1)
        expected = np.zeros((N, N - 2))
        expected[1:-1] = np.diag(-gap * np.sin(gap * np.arange(1, N - 1)))
        np.testing.assert_allclose(moves, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("code", "points"),
    [
        (lambda: nj.Replication(K, N), True),
        (lambda: nj.Uncoded(K), True),
        (lambda: nj.Parity(6, 7), True),
        (lambda: nj.Replication(K, N), False),
        (lambda: nj.Berrut(K, N), False),
        (lambda: nj.Lagrange(K, N), False),
    ],
)
def test_nothing_to_tune(code, points):
    with pytest.raises(ValueError, match=f"{type(code()).__name__} has nothing to tune"):
        parametrize(code(), points=points)


@pytest.mark.parametrize("kind", [nj.Berrut, nj.Lagrange])
def test_other_codes_have_points_only(kind):
    free, rebuild = parametrize(kind(K, N), points=True)
    assert free.keys() == {"alpha_shifts", "beta_shifts"}
    assert type(rebuild(free)) is kind


# -- Errors ----------------------------------------------------------------------------------------

LAWS = {"0": nj.ExactStragglers(0), "2": nj.ExactStragglers(2)}


@pytest.mark.parametrize(
    ("laws", "order", "message"),
    [
        ({}, 1.0, "there are no laws of stragglers"),
        (LAWS, 0.5, "order must be 1 or more, not 0.5"),
        (LAWS, float("nan"), "order must be 1 or more, not nan"),
    ],
)
def test_trial_errors(laws, order, message, key):
    with pytest.raises(ValueError, match=message):
        nj.make_trial(jnp.tanh, nj.NeRCC(K, N), np.zeros((2, K, 2)), laws, key=key, order=order)


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        (np.zeros((2 * K - 1, 2)), {}, r"x has shape \(5, 2\): tuning needs two groups of 3"),
        (np.full((20, 2), np.nan), {}, "data points must be finite"),
        (np.zeros((20, 2)), {"steps": 0}, "steps must be positive, not 0"),
        (np.zeros((20, 2)), {"learning_rate": -1.0}, "learning_rate must be positive, not -1.0"),
        (np.zeros((20, 2)), {"learning_rate": np.nan}, "learning_rate must be positive"),
        (np.zeros((20, 2)), {"groups_per_step": 0}, "groups_per_step must be positive"),
        (np.zeros((20, 2)), {"sets_per_step": 0}, "sets_per_step must be positive"),
        (np.zeros((20, 2)), {"held_out_sets": 0}, "held_out_sets must be positive"),
        (np.zeros((20, 2)), {"check_every": 0}, "check_every must be positive"),
        (np.zeros((20, 2)), {"patience": 0}, "patience must be positive"),
        (np.zeros((20, 2)), {"held_out_share": 1.0}, "held_out_share must be between 0 and 1"),
    ],
)
def test_tuning_errors(x, change, message, key):
    with pytest.raises(ValueError, match=message):
        nj.tune(jnp.tanh, nj.NeRCC(K, N), x, LAWS, key=key, **change)
