"""Decoding with adversaries, against refits without a point and decoding without the liars."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nercc_jax import NeRCC
from nercc_jax.inference import robust_decode
from nercc_jax.inference._robust import find_adversaries

LAYOUTS = ("chebyshev", "interleaved", "repeated")


def honest(code, dtype, outputs=4):
    """Answers of a smooth model: they fit each other."""
    t = np.asarray(code.beta, np.float64)[:, None]
    y = np.sin(2 * t + np.arange(outputs)) + 0.3 * np.cos(3 * t * (1 + np.arange(outputs) % 2))
    return y.astype(dtype)


def lies(y, who, seed=0, size=20.0):
    noise = np.random.default_rng(seed).normal(size=(len(who), *y.shape[1:]))
    y = y.copy()
    y[who] += size * np.sign(noise) * (0.5 + np.abs(noise))
    return y


def mask(number, gone=()):
    available = np.ones(number, bool)
    available[list(gone)] = False
    return jnp.asarray(available)


def refitted(t, y, mu, place, others):
    """How far observation `place` is from the oracle's spline through the others, standardised.

    The variance of y_i - u(t_i) given the others is sigma^2 (1 + v), with v the weight that mu puts
    on the reproducing kernel: found by refitting, as the fit's answer to a unit step in y_i.
    """
    ours = [i for i in others if i != place]

    def at_place(values, points):
        keep = np.asarray(points)
        lambda_ = mu / len(keep)
        return float(oracle.smoothing_spline(t[keep], values[keep], lambda_, t[[place]])[0])

    far = [y[place, c] - at_place(y[:, c], ours) for c in range(y.shape[1])]
    step = np.zeros(len(t))
    step[place] = 1
    leverage = at_place(step, [*ours, place])
    return np.linalg.norm(far) * np.sqrt(1 - leverage)


@pytest.mark.parametrize(("lambda_", "most"), [(1e-6, 1), (1e-3, 1), (1e-4, 4)])
def test_the_one_left_out_is_the_worst_of_all_refits(lambda_, most, dtype):
    """The leave-one-out formula against splines that never saw the point, a lie hidden or not; and
    the next is judged without the first."""
    code = NeRCC(6, 14)
    t = np.asarray(code.beta, np.float64)
    available = mask(14, (3, 8))
    seen = np.flatnonzero(available)
    for seed in range(3):
        y = honest(code, "float64", 2) + np.random.default_rng(seed).normal(size=(14, 2))
        left = set(seen)
        for _ in range(most):
            left -= {max(left, key=lambda i: refitted(t, y, lambda_ * len(seen), i, left))}
        # A threshold that nobody passes on the way back.
        found = find_adversaries(
            code.beta, jnp.asarray(y, dtype), available, lambda_, max_adversaries=most,
            threshold=0.0,
        )  # fmt: skip
        assert set(np.flatnonzero(found)) == set(seen) - left


@pytest.mark.parametrize(("number", "left_out"), [(4, 0), (5, 1), (6, 2), (7, 3), (8, 3), (9, 4)])
def test_less_than_half_are_left_out_and_four_are_kept(number, left_out):
    code = NeRCC(3, number)
    y = lies(honest(code, "float32"), np.arange(number))
    found = find_adversaries(
        code.beta, jnp.asarray(y), mask(number), 1e-4, max_adversaries=number, threshold=0.0
    )
    assert np.sum(found) == left_out


def test_who_comes_back_is_within_the_threshold_of_a_refit():
    """Exactly those: the oracle's misfits of all that were left out, without any of them."""
    with jax.enable_x64(True):
        code = NeRCC(6, 14)
        t, lambda_ = np.asarray(code.beta, np.float64), 1e-4
        y = honest(code, "float64", 2) + 0.1 * np.random.default_rng(1).normal(size=(14, 2))
        y[5] += 30
        out = find_adversaries(
            code.beta, jnp.asarray(y), mask(14), lambda_, max_adversaries=3, threshold=0.0
        )
        out, kept = np.flatnonzero(out), [i for i in range(14) if not out[i]]
        assert 5 in out
        usual = np.median([refitted(t, y, lambda_ * 14, i, kept) for i in kept])
        ratio = {i: refitted(t, y, lambda_ * 14, i, kept) / usual for i in out}
        ordered = sorted(ratio, key=ratio.__getitem__)
        assert ratio[ordered[0]] < ratio[5] == ratio[ordered[-1]]
        for threshold, expected in (
            (0.99 * ratio[ordered[0]], set(out)),
            (2 * ratio[5], set()),
        ):
            got = find_adversaries(
                code.beta,
                jnp.asarray(y),
                mask(14),
                lambda_,
                max_adversaries=3,
                threshold=threshold,
            )
            assert set(np.flatnonzero(got)) == expected


LIARS, APART, COPIED = [2, 9, 17, 28], [0, 3, 14, 23], np.arange(32) % 8
# Where copies repeat the path may jump from point to point: only copies tell.
ROUGH = np.random.default_rng(0).normal(size=(8, 4))[COPIED]


def broken(y):
    y[3], y[11, 1], y[20] = np.nan, np.inf, 1e30
    return y


def with_a_huge_one(y):
    y = lies(y, [6, 25])
    y[15] = [3e38, -3e38, 3e38, 1.0]
    return y


# Points, what the honest answers become, the liars, who is absent, who else does not count, and how
# many may be left out.
CASES = {
    **{
        f"gross lies, {layout}, {gone}": (layout, lambda y: lies(y, LIARS), LIARS, gone, (), 4)
        for layout in LAYOUTS
        for gone in ((), (0, 11, 23))
    },
    **{
        f"nobody lies, {layout}": (layout, lambda y: y, [], (4, 5), (), 10) for layout in LAYOUTS
    },
    "equal but for rounding": (
        "repeated", lambda y: 3 + np.finfo(y.dtype).eps * (COPIED[:, None] % 3), [], (), (), 15,
    ),
    "rough copies": ("repeated", lambda y: ROUGH, [], (), (), 15),
    "liars among rough copies": (
        "repeated", lambda y: np.where(np.isin(np.arange(32), APART)[:, None], 5.0, ROUGH),
        APART, (), (), 15,
    ),
    "broken and absent": ("chebyshev", broken, [], (20,), (3, 11), 3),
    "a huge lie hides nobody": ("chebyshev", with_a_huge_one, [6, 15, 25], (), (), 3),
    "nobody answered": ("chebyshev", lambda y: y, [], range(32), (), 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_what_decoding_without_the_liars_gives(case, dtype):
    layout, change, liars, absent, others, most = CASES[case]
    code = NeRCC(8, 32, points=layout)
    y = np.resize(change(honest(code, dtype)), (32, 4)).astype(dtype)
    got, suspected = robust_decode(code, y, mask(32, absent), max_adversaries=most)
    left = mask(32, [*absent, *liars, *others])
    expected = code.try_decode(np.where(left[:, None], y, 0), left)
    assert np.flatnonzero(suspected).tolist() == liars
    assert np.array_equal(got.responded, left)
    assert np.array_equal(got.recovered, expected.recovered)
    assert got.predictions.dtype == dtype
    np.testing.assert_allclose(got.predictions, expected.predictions, atol=1e-6)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 15),
    most=st.sampled_from([0, 1, 5]),
    gone=st.integers(0, 30),
)
def test_no_more_are_left_out_than_asked_and_nobody_absent(seed, count, most, gone):
    random = np.random.default_rng(seed)
    code = NeRCC(8, 32)
    y = lies(honest(code, "float32"), random.permutation(32)[:count], seed)
    available = mask(32, random.permutation(32)[:gone])
    got, suspected = robust_decode(code, y, available, max_adversaries=most)
    assert np.sum(suspected) <= min(most, max(available.sum() - 4, 0))
    assert np.array_equal(got.responded | suspected, available)
    assert not np.any(got.responded & suspected)
    assert np.all(np.isfinite(got.predictions))


def test_jit_vmap_and_one_compilation_for_every_mask():
    code = NeRCC(8, 32)
    y = np.stack([lies(honest(code, "float32"), [s, 12]) for s in range(3)])
    masks = np.stack([mask(32, (s + 5, 17)) for s in range(3)])
    traces = []

    @eqx.filter_jit
    def decode(code, y, available):
        traces.append(1)
        return robust_decode(code, y, available, max_adversaries=2)

    together, together_suspected = jax.vmap(lambda y, m: decode(code, y, m))(y, masks)
    for group in range(3):
        alone, alone_suspected = decode(code, y[group], masks[group])
        assert np.array_equal(alone_suspected, together_suspected[group])
        np.testing.assert_allclose(alone.predictions, together.predictions[group], rtol=1e-4)
    assert len(traces) == 1
    assert np.array_equal(np.sum(together_suspected, axis=1), [2, 2, 2])


def test_many_groups_judge_workers_together():
    """Lies too small to tell in one group stand out in thirty."""
    code = NeRCC(8, 32)
    random = np.random.default_rng(0)
    y = np.stack([honest(code, "float32") for _ in range(30)], axis=1)
    y += random.normal(size=y.shape) * 0.1
    y[[4, 19]] += 0.5 * np.sign(random.normal(size=y[[4, 19]].shape))
    got, suspected = robust_decode(
        code, y.astype("float32"), mask(32), max_adversaries=4, threshold=3.0
    )
    assert np.flatnonzero(suspected).tolist() == [4, 19]
    assert got.predictions.shape == (8, 30, 4)


def test_predictions_are_differentiable_in_answers():
    with jax.enable_x64(True):
        code = NeRCC(8, 32)
        y = jnp.asarray(lies(honest(code, "float64"), [7]))

        def total(y):
            return jnp.sum(robust_decode(code, y, mask(32), max_adversaries=2)[0].predictions[:, 0])

        grad = jax.grad(total)(y)
        expected = np.sum(code.decoder_matrix(mask(32, (7,))), axis=0)
        np.testing.assert_allclose(grad[:, 0], expected, atol=1e-12)
        assert np.all(grad[7] == 0)


@pytest.mark.parametrize("lie", [10.0, 1e30])
def test_liars_who_agree_are_found_wherever_they_are(lie):
    """Neighbours with one lie look like a bend: their honest neighbours were left out instead."""
    rng = np.random.default_rng(6)
    code, weights = NeRCC(8, 40), rng.normal(size=(2, 6))
    x = np.stack([np.cos(np.linspace(0, 2, 8)), np.linspace(-1, 1, 8)], 1).astype(np.float32)
    honest_answers = np.tanh(np.asarray(code.encode(x)) @ weights).astype(np.float32)
    who = [[30, 31, 32, 38], [9, 26, 27, 31], [3, 11, 23, 24], [14, 15, 16, 17], [0, 1, 2, 3]]
    decode = jax.jit(lambda y: robust_decode(code, y, np.ones(40, bool), max_adversaries=4))
    for liars in who:
        y = honest_answers.copy()
        y[liars] = lie
        found, suspected = decode(y)
        assert set(liars) <= set(np.flatnonzero(suspected)), liars
        assert np.abs(found.predictions - np.tanh(x @ weights)).max() < 0.2
