"""One contract for every code, and what each code promises beyond it."""

import itertools
import re
import warnings

import equinox as eqx
import extending
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracle
import pytest

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded, coded_inference
from nercc_jax.codes import BerrutSpline, decode_groups, regression_points
from nercc_jax.testing import check_code

K, N = 4, 11
CODES = {
    "nercc": lambda: NeRCC(K, N),
    "nercc-interleaved": lambda: NeRCC(K, N, lambda_dec=0.0, points="interleaved"),
    "nercc-repeated": lambda: NeRCC(K, N, points="repeated"),
    "nercc-smooth": lambda: NeRCC(K, N, lambda_enc=1e-3, lambda_dec=1e-2, points="uniform"),
    "nercc-exact": lambda: NeRCC(K, N, lambda_dec=1e-3, points="interleaved", exact=True),
    "nercc-few-workers": lambda: NeRCC(12, N),
    "nercc-published": lambda: NeRCC(K, N, lambda_dec=1e-6),
    "nercc-ends": lambda: NeRCC(K, N, lambda_dec=1e-6, gap_exponent=-1.0, end_penalty=1e6),
    "berrut": lambda: Berrut(K, N),
    "berrut-repeated": lambda: Berrut(K, N, points="repeated"),
    "berrut-spline": lambda: BerrutSpline(K, N),
    "berrut-spline-smooth": lambda: BerrutSpline(K, N, lambda_dec=1e-3, ends="natural"),
    "learned": lambda: matrices.learned(K, N),
    "lagrange-quadratic": lambda: Lagrange(K, N, degree=2),
    "parity": lambda: Parity(6, 8),
    "replication": lambda: Replication(K, N),
    "uncoded": lambda: Uncoded(K),
    "one-for-one": lambda: NeRCC(1, 1),
    "moving-averages": lambda: extending.MovingAverages(K, N),
}
EPS = {"float32": 1e-5, "float64": 1e-11}
# Their programs are those of "nercc", of other sizes or numbers; their matrices are compared.
ALIKE = ("nercc-few-workers", "nercc-published", "nercc-ends")


# Other sizes and points make other programs of the same source: in float64 one of each class, and
# of the ways that NeRCC's matrices are made, tells as much.
WIDE = ("nercc", "nercc-interleaved", "berrut", "lagrange-quadratic", "parity", "replication")


def data(code, *shape, seed=0):
    values = np.random.default_rng(seed).normal(size=(code.num_data, *shape))
    return jnp.asarray(values, float)


def answers(code, *shape, seed=1):
    values = np.random.default_rng(seed).normal(size=(code.num_workers, *shape))
    return jnp.asarray(values, float)


def everyone(code):
    return np.ones(code.num_workers, bool)


def all_but_one(code):
    return np.arange(code.num_workers) > 0


# -- The contract -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CODES if name not in ALIKE]
    + [(name, "float64") for name in WIDE],
    indirect=["dtype"],
)
def test_contract(name, dtype):
    check_code(CODES[name]())


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("berrut", "parity") else pytest.param(name, marks=pytest.mark.slow)
        for name in CODES
        if name not in ("moving-averages", "one-for-one", *ALIKE)
    ],
)
def test_contract_where_a_program_promotes_no_dtypes_and_no_ranks(name):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        code = CODES[name]()
        check_code(code)
        if name == "nercc":
            x, mask = np.ones((3, K, 2), np.float32), np.arange(N) != 2
            infer = coded_inference(jnp.tanh, code)
            for predictions in (infer(x, mask), jax.jit(infer)(x, mask)):
                np.testing.assert_allclose(predictions, np.tanh(x), atol=1e-4)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("name", CODES)
def test_encode_and_decode_are_the_matrices(name, shape, dtype):
    """On the host, where code and mask are known; that programs do so, too, is in the contract.

    Answers of low precision are decoded in float32.
    """
    code = CODES[name]()
    x, y = data(code, *shape), answers(code, *shape)
    coded, encoder = code.encode(x), matrices.encoder_matrix(code)
    assert coded.shape == (code.num_workers, *shape)
    expected = np.tensordot(encoder, np.asarray(x, float), 1)
    np.testing.assert_allclose(coded, expected, atol=EPS[dtype])
    np.testing.assert_allclose(code.encoder_matrix(), encoder, atol=EPS[dtype])
    half = y.astype(jnp.bfloat16)
    for mask in (everyone(code), all_but_one(code), np.arange(code.num_workers) == 1):
        decoder = matrices.decoder_matrix(code, mask)
        kept = decoder.any(axis=1)
        decoded = code.try_decode(y, mask)
        assert coded.dtype == decoded.predictions.dtype == dtype
        np.testing.assert_array_equal(decoded.recovered, kept)
        np.testing.assert_allclose(code.decoder_matrix(mask), decoder, atol=10 * EPS[dtype])
        for given, found, atol in (
            (y, decoded.predictions, 10 * EPS[dtype]),
            (half, code.try_decode(half, mask).predictions, 1e-4),
        ):
            assert found.shape == (code.num_data, *shape)
            expected = np.tensordot(decoder, np.asarray(given, float), 1)[kept]
            np.testing.assert_allclose(found[kept], expected, atol=atol)
        assert found.dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["nercc", "replication"])
def test_a_broken_answer_is_a_warning(name, bad):
    code = CODES[name]()
    y = answers(code, 3)
    with pytest.warns(RuntimeWarning, match=r"workers \[0\] returned values that are not"):
        decoded = code.decode(y.at[0, 1].set(bad), everyone(code))
    np.testing.assert_allclose(decoded, code.decode(y, all_but_one(code)), atol=1e-3)
    with pytest.raises(ValueError, match=r"no prediction can be recovered.* 0 were available"):
        code.decode(y, np.zeros(code.num_workers, bool))
    with pytest.raises(ValueError, match="with values that are not finite; wait for more"):
        code.decode(jnp.full_like(y, bad), everyone(code))


@pytest.mark.parametrize("name", CODES)
def test_input_errors(name, untyped):
    code = CODES[name]()
    k, n = code.num_data, code.num_workers
    x, y, mask = data(code, 3), answers(code, 3), everyone(code)
    with pytest.raises(ValueError, match=rf"first axis must be the {k} data points"):
        code.encode(jnp.zeros((k + 1, 3)))
    with pytest.raises(ValueError, match="x is int32: codes work on floats"):
        code.encode(jnp.zeros((k, 3), jnp.int32))
    with pytest.raises(ValueError, match=rf"data points \[{k - 1}\] are not finite: take them out"):
        code.encode(x.at[k - 1, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=rf"first axis must be the {n} workers"):
        code.decode(jnp.zeros((n + 1, 3)), mask)
    with pytest.raises(ValueError, match=r"y is int32: .* convert it first$"):
        code.decode(jnp.zeros((n, 3), jnp.int32), mask)
    for bad in (np.ones(n + 1, bool), np.ones(n), np.ones((1, n), bool)):
        with pytest.raises(ValueError, match=rf"boolean mask of shape \({n},\)"):
            code.decode(y, bad)
        with pytest.raises(ValueError, match=rf"boolean mask of shape \({n},\)"):
            code.decoder_matrix(bad)


# -- Splines and Berrut: any answer recovers something ---------------------------------------------


@hypothesis.given(st.permutations(range(N)), st.lists(st.booleans(), min_size=N, max_size=N))
@hypothesis.settings(max_examples=20)
@pytest.mark.parametrize("name", ["nercc", "nercc-repeated", "berrut-repeated"])
def test_workers_may_come_in_any_order(name, order, mask):
    hypothesis.assume(any(mask))
    order, mask = np.array(order), np.array(mask)
    with jax.enable_x64(True):
        code, y = CODES[name](), answers(CODES[name](), 2)
        shuffled = eqx.tree_at(lambda code: code.beta, code, code.beta[order])
        one, other = code.decode(y, mask), shuffled.decode(y[order], mask[order])
        np.testing.assert_allclose(other, one, atol=1e-8 * max(1, np.abs(one).max()))
        np.testing.assert_allclose(
            shuffled.encoder_matrix(), code.encoder_matrix()[order], atol=1e-12
        )


PENALTIES = st.one_of(st.just(0.0), st.floats(-12, 1).map(lambda e: 10.0**e))


@eqx.filter_jit
def decode(code, y, mask):
    return code.decode(y, mask)


@hypothesis.given(
    st.sampled_from(["chebyshev", "uniform", "interleaved", "repeated", "mixed:0.5"]),
    st.tuples(PENALTIES, PENALTIES, st.floats(-2, 4), st.sampled_from([0.0, 30.0, 3e3, 1e6])),
    st.booleans(),
    st.lists(st.booleans(), min_size=N, max_size=N).filter(any),
)
@hypothesis.settings(max_examples=40)
def test_nercc_is_the_textbooks_whatever_its_numbers(points, numbers, exact, mask):
    """The penalty grows with the gaps of the answers, on the circle: (gap / gap of all) ^ exponent.

    An exact code's answers at data points are constraints. On the host, and in a program.
    """
    names = ("lambda_enc", "lambda_dec", "gap_exponent", "end_penalty")
    own = points in ("interleaved", "repeated", "mixed:0.5")
    with jax.enable_x64(True):
        code = NeRCC(
            K, N, points=points, exact=exact and own, **dict(zip(names, numbers, strict=True))
        )
        mask, y = np.array(mask), answers(code, 2)
        beta = np.asarray(code.beta)
        growth = oracle.mean_gap(beta[mask]) / oracle.mean_gap(beta)
        wanted = float(code.lambda_dec) * growth ** float(code.gap_exponent)
        np.testing.assert_allclose(code.decoder_penalty(mask), wanted, rtol=1e-11)
        encoder = matrices.encoder_matrix(code)
        np.testing.assert_allclose(code.encoder_matrix(), encoder, atol=1e-9)
        decoder = matrices.decoder_matrix(code, mask)
        size = max(1, np.abs(decoder).sum(axis=1).max())
        np.testing.assert_allclose(code.decoder_matrix(mask), decoder, atol=1e-8 * size)
        found = decode(code, jnp.where(mask[:, None], y, jnp.nan), mask)
        np.testing.assert_allclose(found, decoder @ y, atol=1e-7 * size)


@pytest.mark.parametrize("name", [name for name in CODES if name.startswith("nercc")])
def test_the_uncertainty_is_what_paths_of_the_process_show(name):
    """Decoding errors over many drawn paths whose second derivative is white noise."""
    with jax.enable_x64(True):
        code = CODES[name]()
        if code.num_data == 1:
            pytest.skip("one answer tells no variance")
        fewest, roughness, paths = 7, 3.0, 4000
        code = eqx.tree_at(lambda code: code.end_penalty, code, jnp.zeros(()))
        mask = np.arange(N) < fewest if name != "nercc-repeated" else np.arange(N) != 1
        alpha, beta = np.asarray(code.alpha), np.asarray(code.beta)
        places, place = np.unique(np.concatenate([alpha, beta]), return_inverse=True)
        u = np.zeros((places.size, paths))
        slope, rng = np.zeros(paths), np.random.default_rng(0)
        for i, h in enumerate(np.diff(places)):
            cov = np.array([[h**3 / 3, h**2 / 2], [h**2 / 2, h]])
            jump, turn = roughness * np.linalg.cholesky(cov) @ rng.normal(size=(2, paths))
            u[i + 1] = u[i] + h * slope + jump
            slope = slope + turn
        weights = np.where(np.isin(beta, alpha) & code.exact, 1 / np.finfo(float).eps, 1)
        mu = float(code.decoder_penalty(mask)) * mask.sum()
        noise = roughness * np.sqrt(mu / weights)[:, None] * rng.normal(size=(N, paths))
        y = u[place[len(alpha) :]] + noise
        predictions, deviation = code.decode(jnp.asarray(y), mask, return_uncertainty=True)
        errors = np.sqrt(np.mean((predictions - u[place[: len(alpha)]]) ** 2, axis=1))
        np.testing.assert_allclose(deviation, errors, rtol=0.08, atol=1e-6)
        np.testing.assert_array_equal(predictions, code.decode(jnp.asarray(y), mask))


def test_what_the_uncertainty_is_without_enough_answers(dtype):
    code = NeRCC(K, N, lambda_dec=0.0, points="interleaved")
    y, one = answers(code, 2, 3), np.arange(N) == 1
    predictions, deviation = code.decode(y, one, return_uncertainty=True)
    assert predictions.shape == (K, 2, 3)
    np.testing.assert_array_equal(deviation, np.where(np.arange(K) == 1, 0, np.inf))
    constant = code.decode(jnp.ones_like(y), np.arange(N) < 5, return_uncertainty=True)[1]
    np.testing.assert_array_equal(constant, np.zeros(K), "nothing varies")
    broken = y.at[0].set(jnp.nan)
    with pytest.warns(RuntimeWarning, match="stragglers"):
        with_broken = code.decode(broken, everyone(code), return_uncertainty=True)[1]
    without = code.decode(y, np.arange(N) > 0, return_uncertainty=True)[1]
    np.testing.assert_array_equal(with_broken, without)


@pytest.mark.parametrize("code", [Uncoded(3), Replication(3, 5)])
def test_copies_tell_all_of_a_data_point_or_nothing(code):
    mask = np.arange(code.num_workers) % 3 != 1
    decoded, deviation = code.decode(answers(code), mask, return_uncertainty=True)
    np.testing.assert_array_equal(deviation, [0, np.inf, 0])
    np.testing.assert_array_equal(decoded[::2], answers(code)[:3:2])


@pytest.mark.parametrize("name", ["berrut", "lagrange-quadratic", "parity"])
def test_what_is_no_regression_has_no_uncertainty(name, untyped):
    code = CODES[name]()
    with pytest.raises(ValueError, match="is no regression: it has no posterior variance"):
        code.decode(answers(code), everyone(code), return_uncertainty=True)
    with pytest.raises(ValueError, match="is no regression: it has no process variance"):
        code.process_variance(answers(code, 2), everyone(code))


def test_repeated_points_are_copied_as_replication_does():
    nercc, copies = NeRCC(5, 13, points="repeated"), Replication(5, 13)
    np.testing.assert_array_equal(nercc.encoder_matrix().round(5), copies.encoder_matrix())


def test_berrut_spline_smooths_as_nercc_does(dtype):
    mask = np.arange(N) % 4 > 0
    code, nercc = BerrutSpline(K, N, lambda_dec=1e-2, ends="natural"), NeRCC(K, N, lambda_dec=1e-2)
    np.testing.assert_array_equal(code.decoder_matrix(mask), nercc.decoder_matrix(mask))
    wanted, found = (
        each.decode(answers(code, 3), mask, return_uncertainty=True)[1] for each in (nercc, code)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_berrut_where_points_coincide(dtype):
    """ApproxIFER's points meet an alpha at K=10, N=12; value and derivative must not break."""
    code = Berrut(10, 12, points="approxifer")
    assert np.abs(code.alpha[:, None] - code.beta).min() < 1e-6
    x = data(code, 2)
    np.testing.assert_allclose(
        code.encode(x).sum(), code.encoder_matrix().sum(0) @ x.sum(1), rtol=1e-4
    )
    assert np.abs(code.encoder_matrix()).sum(axis=1).max() < 10

    @jax.jit
    def entry(shift):
        alpha, beta = jnp.array([-0.5, 0.25, 0.75]), jnp.array([-1.0, 0.25, 0.0, 1.0])
        return Berrut(3, 4, points=(alpha, beta.at[1].add(shift))).encoder_matrix()[1]

    step = 1e-4 if dtype == "float64" else 1e-2
    numerical = (entry(step) - entry(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jacfwd(entry)(0.0), numerical, atol=100 * step**2)


# -- NeRCC's numbers ------------------------------------------------------------------------------


def test_penalty_defaults(dtype):
    """Measured numbers without tuning; the published form with a lambda_dec of one's own."""
    untuned, own = NeRCC(8, 20), NeRCC(8, 20, lambda_dec=1e-6)
    assert float(untuned.lambda_enc) == 0
    # Of the published form, without any answer: as if one were alone on the circle.
    alone = NeRCC(8, 20, lambda_dec=1e-5, gap_exponent=2.0)
    gap = oracle.mean_gap(np.asarray(alone.beta, float))
    nobody = 1e-5 * (2 * np.pi / gap) ** 2
    np.testing.assert_allclose(alone.decoder_penalty(np.zeros(20, bool)), nobody, rtol=1e-4)
    # Chebyshev workers are pi / 19 apart, data points pi / 8.
    smoothing_length = min(np.pi / 19 / 10, np.pi / 8 / 28)
    np.testing.assert_allclose(untuned.lambda_dec, smoothing_length**4, rtol=1e-5)
    few = NeRCC(50, 60)
    np.testing.assert_allclose(few.lambda_dec, (np.pi / 50 / 28) ** 4, rtol=1e-5)
    assert (float(untuned.gap_exponent), float(untuned.end_penalty)) == (4, 3000)
    assert (float(own.gap_exponent), float(own.end_penalty)) == (0, 0)
    given = NeRCC(8, 20, gap_exponent=1.0, end_penalty=2.0)
    assert (float(given.gap_exponent), float(given.end_penalty)) == (1, 2)
    given = NeRCC(8, 20, lambda_dec=1e-6, gap_exponent=1.0, end_penalty=2.0)
    assert (float(given.gap_exponent), float(given.end_penalty)) == (1, 2)


# -- Lagrange, replication, uncoded ----------------------------------------------------------------


def test_lagrange_counts_coincident_workers_once_and_needs_its_threshold():
    assert [Lagrange(K, N, degree=degree).threshold for degree in (1, 2, 3)] == [4, 7, 10]
    code = Lagrange(3, 6, points="repeated")
    mask = np.array([True, True, False, True, True, False])
    assert not code.recovered(mask).any()


def test_lagrange_of_many_points_stays_finite():
    code = Lagrange(150, 310)
    assert np.isfinite(code.encoder_matrix()).all()
    assert np.isfinite(code.decoder_matrix(np.arange(310) % 2 == 0)).all()


SMALL = {
    **{
        f"parity-{k}-{n}": lambda k=k, n=n: Parity(k, n)
        for k, n in ((4, 6), (6, 8), (4, 5), (3, 6))
    },
    "lagrange": lambda: Lagrange(3, 6),
    "lagrange-quadratic": lambda: Lagrange(3, 6, degree=2),
    "berrut": lambda: Berrut(3, 6),
    "replication": lambda: Replication(3, 5),
    "uncoded": lambda: Uncoded(3),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_straggler_set_is_the_textbooks(name, dtype):
    """What is left to tell is told: interpolated, subtracted or copied; all else is NaN."""
    code = SMALL[name]()
    masks = np.array(list(itertools.product([False, True], repeat=code.num_workers)))
    x, y = data(code, 2), answers(code, 2)
    coded = matrices.encoder_matrix(code) @ np.asarray(x, float)
    np.testing.assert_allclose(code.encode(x), coded, atol=EPS[dtype])
    decoded = jax.jit(jax.vmap(code.try_decode, in_axes=(None, 0)))(y, masks)
    for mask, found, recovered in zip(masks, decoded.predictions, decoded.recovered, strict=True):
        decoder = matrices.decoder_matrix(code, mask)
        kept = decoder.any(axis=1)
        np.testing.assert_array_equal(recovered, kept)
        wanted = np.where(kept[:, None], decoder @ np.asarray(y, float), np.nan)
        size = max(1, np.abs(decoder).sum(axis=1).max())
        np.testing.assert_allclose(found, wanted, atol=10 * EPS[dtype] * size)


def test_large_entries_take_the_accurate_way():
    """A wide gap spanned by close workers: the product with the matrix loses digits, decode not."""
    beta = np.concatenate([np.linspace(-1, -0.9, 30), np.linspace(0.9, 1, 30)]).astype("float32")
    code = NeRCC(3, 60, lambda_dec=0.0, points=(np.array([-0.5, 0.1, 0.6]), beta))
    y = np.sin(5 * beta.astype(float)).astype("float32")
    with jax.enable_x64(True):
        wide = NeRCC(
            3, 60, lambda_dec=0.0, points=(np.asarray(code.alpha, float), beta.astype(float))
        )
        exact = wide.decode(y.astype(float), np.ones(60, bool))
    matrix = code.decoder_matrix(np.ones(60, bool))
    assert np.abs(matrix).sum(axis=1).max() > 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(code.decode(y, np.ones(60, bool)), exact, atol=1e-5)


@pytest.mark.parametrize("setting", ["disable_jit", "debug_nans", "debug_infs"])
def test_settings_that_people_debug_with(setting):
    """A straggler's NaN is no fault, and what lowering chooses runs without jit, too."""
    code, mask = NeRCC(4, 8), np.arange(8) != 2
    y = np.ones((8, 2), np.float32)
    y[2] = np.nan if setting == "debug_nans" else np.inf
    clean = np.where(mask[:, None], y, 0)
    with getattr(jax, setting)(True):
        for values in (y, clean):
            np.testing.assert_allclose(code.decode(values, mask), 1, atol=1e-6)
            np.testing.assert_allclose(jax.jit(code.decode)(values, mask), 1, atol=1e-6)
        groups = decode_groups(code, np.stack([y, clean]), np.stack([mask, mask]))
        np.testing.assert_allclose(groups.predictions, 1, atol=1e-6)
        slope = jax.grad(lambda code: jnp.sum(code.decode(clean, mask) ** 2))(code).lambda_dec
        assert np.isfinite(slope)


# -- Regression points: the papers' formulas, and the layouts' promises ----------------------------


def test_the_papers_points(dtype):
    alpha, beta = regression_points(8, 20)
    k, n = np.arange(1, 9), np.arange(1, 21)
    assert alpha.dtype == beta.dtype == dtype
    np.testing.assert_allclose(alpha, np.cos((2 * k - 1) * np.pi / 16), atol=1e-7)
    np.testing.assert_allclose(beta, np.cos((n - 1) * np.pi / 19), atol=1e-7)
    _, beta = regression_points(10, 12, "approxifer")
    np.testing.assert_allclose(beta, np.cos(np.arange(12) * np.pi / 12), atol=1e-7)
    alpha, beta = regression_points(10, 12, "sbacc")
    np.testing.assert_allclose(beta, np.cos((2 * np.arange(12) + 1) * np.pi / 24), atol=1e-7)


@pytest.mark.parametrize("name", matrices.LAYOUTS)
@pytest.mark.parametrize(
    ("num_data", "num_workers"), [(1, 1), (1, 5), (2, 3), (8, 9), (8, 20), (20, 100)]
)
def test_every_layout_is_sound(name, num_data, num_workers):
    alpha, beta = (np.asarray(p) for p in regression_points(num_data, num_workers, name))
    assert alpha.shape == (num_data,)
    assert beta.shape == (num_workers,)
    assert len(set(alpha)) == num_data
    assert np.abs(np.concatenate([alpha, beta])).max() <= 1


SIZES = [(1, 1), (1, 5), (2, 2), (3, 4), (8, 9), (20, 24), (20, 30), (20, 60)]
SHARES = [0.0, 0.2, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("num_data", "num_workers"), SIZES)
def test_mixed_points(num_data, num_workers, share):
    alpha, beta = regression_points(num_data, num_workers, f"mixed:{share}")
    alpha, beta = np.asarray(alpha), np.asarray(beta)
    np.testing.assert_array_equal(alpha, regression_points(num_data, num_workers)[0])
    further = num_workers - num_data
    repeats = further if num_data == 1 else round(share * further)
    own = beta[:, None] == alpha
    counts = own.sum(axis=0)
    assert counts.sum() == num_data + repeats
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    between = beta[~own.any(axis=1)]
    assert len(set(between)) == between.size == further - repeats
    if between.size:
        gaps = np.bincount(np.searchsorted(np.sort(alpha), between), minlength=num_data)
        assert gaps[0] == 0, "none beyond the alphas"
        assert gaps[1:].max() - gaps[1:].min() <= 1


@pytest.mark.parametrize(("num_data", "num_workers"), SIZES)
def test_mixtures_end_at_the_plain_layouts(num_data, num_workers):
    for share, name in ((0, "interleaved"), (1, "repeated")):
        _, mixed = regression_points(num_data, num_workers, f"mixed:{share}")
        np.testing.assert_array_equal(mixed, regression_points(num_data, num_workers, name)[1])


def test_few_repeats_and_few_points_between_take_turns():
    """Four further workers for 20 data points: each in a quarter of the line of its own."""
    alpha, beta = regression_points(20, 24, "mixed:0.5")
    angles = np.arccos(np.asarray(beta[20:], float)) / np.pi
    assert sorted(np.floor(4 * angles)) == [0, 1, 2, 3]
    order = np.argsort(angles)
    assert list(np.isin(beta[20:], alpha)[order]) == [True, False, True, False]


def test_given_points_keep_their_order():
    given = (jnp.array([0.5, -0.5]), jnp.array([0.0, 0.0, 1.0]))
    alpha, beta = regression_points(2, 3, given)
    np.testing.assert_array_equal(alpha, given[0])
    np.testing.assert_array_equal(beta, given[1])


def test_the_layouts_are_those_that_an_error_names():
    with pytest.raises(ValueError, match="points must be one of") as error:
        regression_points(2, 3, "chebychev")
    named = re.findall(r"[\w:]+", str(error.value).partition("one of ")[2])
    assert tuple(named[: len(matrices.LAYOUTS)]) == matrices.LAYOUTS
    assert named[len(matrices.LAYOUTS)] == "mixed:SHARE"
