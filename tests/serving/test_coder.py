"""Codes made ready for a stream: which coded data points are queries, groups of fewer than K."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import make_interp_spline

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded
from nercc_jax.codes import BerrutSpline
from nercc_jax.serving import Coder
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator
from nercc_jax.serving.core._error_probability import uncalibrated

CODES = {
    "interleaved": NeRCC(4, 8, points="interleaved", lambda_dec=0.0),
    "interleaved, few more": NeRCC(5, 7, points="interleaved", lambda_dec=0.0),
    "repeated": NeRCC(4, 8, points="repeated", lambda_dec=0.0),
    "chebyshev": NeRCC(6, 9),
    "BACC": Berrut(5, 8),
    "BSCC": BerrutSpline(5, 8),
    "LCC": Lagrange(3, 7),
    "replication": Replication(3, 7),
    "uncoded": Uncoded(3),
    "ParM": Parity(2, 3),
}
SYSTEMATIC = {
    "interleaved",
    "interleaved, few more",
    "repeated",
    "replication",
    "uncoded",
    "ParM",
    "LCC",
}


def coder_of(name):
    code = CODES[name]
    return Coder(code, tuple(range(int(code.worker_models.max()) + 1)))


@pytest.mark.parametrize("name", CODES)
def test_layouts(name):
    coder = coder_of(name)
    assert coder.systematic == (name in SYSTEMATIC)
    x = np.random.default_rng(0).normal(size=(2, coder.num_data, 5)).astype(np.float32)
    for queries in range(1, coder.num_data + 1):
        layout = coder.layout(queries)
        everything = np.arange(coder.num_workers)
        coded = coder.encode(x[:, :queries], everything)
        assert coded.shape == (coder.num_workers, 2, 5)
        # What is sent as queries come are the queries, whatever number of them there will be.
        first = np.concatenate(coder.first[:queries])
        assert len(first) == (queries if coder.systematic else 0)
        for place in range(queries):
            for point in coder.first[place]:
                assert layout.place_of[point] == place
            for point in layout.own[place]:
                np.testing.assert_allclose(coded[point], x[:, place], atol=2e-5)
        # The rest comes once, and no more of it for each query than in a full group.
        assert len(set(first) | set(layout.extras)) == len(first) + len(layout.extras)
        if coder.systematic:
            share = (coder.num_workers - coder.num_data) * queries / coder.num_data
            assert len(layout.extras) == np.ceil(share)
        else:
            assert len(layout.extras) == coder.num_workers


@pytest.mark.parametrize(
    ("code", "extras"),
    [
        ("interleaved", [[5], [5, 7], [5, 7, 4], [5, 7, 4, 6]]),
        # For each query two fifths of one, rounded up: as many as would do for all of them.
        ("interleaved, few more", [[5], [5], [5, 1], [5, 1], [5, 6]]),
    ],
)
def test_extras_are_those_nearest_to_the_queries(code, extras):
    """By hand, on the half circle, whose angles are even.

    (5, 7): alphas, and betas 0 to 4, at 18, 54, 90, 126 and 162 degrees, beta 5 at 72 and 6 at 144.
    Queries come to 90, 18, 162, 126, 54.
    """
    coder = coder_of(code)
    found = [coder.layout(queries).extras.tolist() for queries in range(1, coder.num_data + 1)]
    assert found == extras


@pytest.mark.parametrize("queries", [2, 3, 4])
def test_a_short_groups_encoder_is_a_spline_through_its_queries(queries):
    """Against SciPy's natural cubic spline through the same alphas, read at the workers' points."""
    code = CODES["interleaved"]
    coder = Coder(code)
    alpha = np.asarray(code.alpha, np.float64)[coder._order[:queries]]
    order = np.argsort(alpha)
    beta = np.asarray(code.beta, np.float64)
    basis = np.eye(queries)[order]
    if queries == 2:  # a straight line
        slope = (basis[1] - basis[0]) / np.diff(alpha[order])
        wanted = basis[0] + np.outer(beta - alpha[order][0], slope)
    else:
        spline = make_interp_spline(alpha[order], basis, k=3, bc_type="natural")
        wanted = spline(beta)
        for end, side in (
            (alpha[order][0], beta < alpha.min()),
            (alpha[order][-1], beta > alpha.max()),
        ):
            line = spline(end) + np.outer(beta - end, spline(end, 1))
            wanted[side] = line[side]
    np.testing.assert_allclose(coder.layout(queries).matrix, wanted, atol=1e-5)


def test_any_first_few_alphas_are_spread_out():
    """Among Chebyshev points no two of the first half are neighbours."""
    coder = Coder(NeRCC(9, 12))
    first = np.sort(coder._order[:4])
    assert np.diff(first).min() > 1
    assert sorted(coder._order) == list(range(9))


@pytest.mark.parametrize("name", ["interleaved", "chebyshev", "BACC", "repeated", "replication"])
def test_decoding_is_the_codes_own(name):
    coder = coder_of(name)
    random = np.random.default_rng(1)
    values = random.normal(size=(coder.num_workers, 3, 2)).astype(np.float32)
    for stragglers in (0, 1, 2):
        mask = np.ones(coder.num_workers, bool)
        mask[random.choice(coder.num_workers, stragglers, replace=False)] = False
        predictions, recovered, _ = coder.decode(np.where(mask[:, None, None], values, 0), mask, 4)
        assert predictions.shape == (3, coder.num_data, 2)
        wanted = coder.code.try_decode(jnp.asarray(values), jnp.asarray(mask))
        assert (recovered == np.asarray(wanted.recovered)[coder._order]).all()
        np.testing.assert_allclose(
            predictions.swapaxes(0, 1), np.asarray(wanted.predictions)[coder._order], atol=2e-4
        )


@pytest.mark.parametrize("name", ["interleaved", "chebyshev"])
def test_doubts_are_of_each_rows_own_margin_and_deviation(name):
    """Against the code's own deviations: variance and roughness with the same weight are those."""
    coder = coder_of(name)
    assert coder.has_error_probability
    random = np.random.default_rng(1)
    values = random.normal(size=(coder.num_workers, 3, 5)).astype(np.float32)
    mask = np.ones(coder.num_workers, bool)
    mask[coder.first[1] if coder.systematic else [2]] = False
    values[~mask] = np.nan
    weighed = dataclasses.replace(uncalibrated(), weights=np.float32([0.3, -0.7, 0.5, 0.5, 0]))
    with np.errstate(invalid="ignore"):
        found, recovered, doubt = coder.decode(values, mask, 4, weighed)
    assert recovered.all()
    for row in range(3):
        wanted, deviation = coder.code.decode(values[:, row], mask, return_uncertainty=True)
        wanted, deviation = np.asarray(wanted)[coder._order], np.asarray(deviation)[coder._order]
        np.testing.assert_allclose(found[row], wanted, atol=2e-4)
        clear = deviation > 1e-3  # others are answers themselves, to rounding
        assert clear.any()
        second, first = np.sort(wanted[clear], axis=1)[:, -2:].T
        logit = 0.3 - 0.7 * np.log(first - second) + 0.5 * np.log(deviation[clear])
        np.testing.assert_allclose(doubt[row, clear], 1 / (1 + np.exp(-logit)), rtol=1e-2)


def test_what_nothing_tells_is_doubted():
    """Two answers lie on a line, however the path bends; one tells nothing at all."""
    coder = coder_of("interleaved")
    values = np.random.default_rng(0).normal(size=(8, 1, 3)).astype(np.float32)

    def doubt(responded, weights):
        mask = np.isin(np.arange(8), responded)
        weighed = dataclasses.replace(uncalibrated(), weights=np.float32(weights))
        return coder.decode(values, mask, 4, weighed)[2]

    assert (doubt([4], [0.0] * 5) == 1).all()
    np.testing.assert_allclose(doubt([0, 3], [0, 0, 0, 0, 3]), 1 / (1 + np.exp(-3)), rtol=1e-6)
    np.testing.assert_allclose(doubt([0, 3, 5], [0, 0, 0, 0, 3]), 0.5)
    assert np.isnan(doubt(range(8), [np.nan] * 5)).all()


def test_codes_that_are_no_regression_have_no_doubt():
    assert not any(
        coder_of(name).has_error_probability for name in ("BACC", "LCC", "ParM", "replication")
    )
    assert not any(coder_of(name).needs_order for name in ("LCC", "ParM", "replication", "uncoded"))
    assert coder_of("BACC").needs_order


@pytest.mark.parametrize("name", ["interleaved", "chebyshev", "BACC"])
def test_places_along_the_curve(name):
    coder = coder_of(name)
    alpha = np.asarray(coder.code.alpha)[coder._order]
    for first in range(coder.num_data):
        for number in range(1, coder.num_data - first + 1):
            along = coder.path_order(first, number)
            assert sorted(along) == list(range(number))
            assert (np.diff(alpha[first + along]) > 0).all()


# What is expected of decoded answers.


def tanh(x):
    return jnp.tanh(3 * jnp.asarray(x) @ jnp.asarray(_WEIGHTS))


_WEIGHTS = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def calibrated():
    coder = Coder(CODES["interleaved"])
    estimator = ErrorEstimator(coder)
    estimator.calibrate(tanh, np.random.default_rng(3).normal(size=(2000, 4)).astype(np.float32))
    return coder, estimator


@pytest.mark.parametrize("queries", [2, 3, 4])
def test_what_is_expected_is_what_happens(calibrated, queries):
    """On other data, decoded by hand."""
    coder, estimator = calibrated
    x = np.random.default_rng(4).normal(size=(1500, queries, 4)).astype(np.float32)
    everything = np.arange(coder.num_workers)
    answers = np.asarray(tanh(coder.encode(x, everything)))  # (N, groups, outputs)
    own = np.asarray(tanh(x))
    for place in range(queries):
        mask = np.ones(coder.num_workers, bool)
        mask[coder.first[place]] = False
        predictions, *_ = coder.decode(np.where(mask[:, None, None], answers, 0), mask, len(x))
        wrong = predictions[:, place].argmax(-1) != own[:, place].argmax(-1)
        error = np.sqrt(np.mean(np.sum((predictions[:, place] - own[:, place]) ** 2, axis=-1)))
        list(estimator.update_expected(queries, mask))  # all steps
        disagreement, expected_error, fresh = estimator.expected_error(queries, mask)
        assert fresh
        assert len(disagreement) == queries
        spread = 4 * np.sqrt(max(wrong.mean(), 0.02) / (64 if queries < 4 else 256))
        assert abs(disagreement[place] - wrong.mean()) < spread
        assert expected_error[place] == pytest.approx(error, rel=0.4)


def test_nothing_wrong_among_a_few_is_not_never(calibrated):
    coder, estimator = calibrated
    disagreement, error, _ = estimator.expected_error(4, np.ones(coder.num_workers, bool))
    assert (error < 1e-3).all()
    np.testing.assert_allclose(disagreement, 0.5 / 257, rtol=1e-5)


def test_nothing_is_known_at_first_and_then_learnt():
    coder = Coder(CODES["interleaved"])
    estimator = ErrorEstimator(coder)
    mask = np.ones(coder.num_workers, bool)
    mask[coder.first[0]] = False
    assert np.isnan(estimator.expected_error(4, mask).disagreement).all()
    assert estimator.progress() == (0, 32)
    assert estimator.needs_samples(4)
    assert not estimator.needs_samples(1)
    x = np.random.default_rng(5).normal(size=(300, 4, 4)).astype(np.float32)
    answers = np.asarray(tanh(coder.encode(x, np.arange(coder.num_workers)))).swapaxes(0, 1)
    for group, own in zip(answers, np.asarray(tanh(x)), strict=True):
        list(estimator.add_group(group, own))  # all steps
    assert not estimator.needs_samples(4)
    assert estimator.needs_samples(3)
    assert not estimator.expected_error(4, mask).current, "nobody has looked it up"
    list(estimator.update_expected(4, mask))  # all steps
    taught = estimator.expected_error(4, mask)
    assert taught.current
    given = ErrorEstimator(coder)
    given.calibrate(tanh, np.random.default_rng(6).normal(size=(1200, 4)).astype(np.float32))
    usual = np.ones(coder.num_workers, bool)
    for mask in (usual, usual & (np.arange(coder.num_workers) != coder.first[2][0])):
        assert given.expected_error(4, mask).current, "calibration looks up the usual ones"
    list(estimator.update_expected(4, mask))  # all steps
    found, wanted = estimator.expected_error(4, mask), given.expected_error(4, mask)
    np.testing.assert_allclose(found.disagreement, wanted.disagreement, atol=0.15)
    nobody = estimator.expected_error(4, np.zeros(coder.num_workers, bool))
    assert np.isnan(nobody.disagreement).all()
    # New groups come, so what was found is looked up anew; it is shown until then.
    for group, own in zip(answers, np.asarray(tanh(x)), strict=True):
        list(estimator.add_group(group, own))  # all steps
    list(estimator.update_expected(4, usual))  # all steps
    assert not estimator.expected_error(4, mask).current
    np.testing.assert_array_equal(
        estimator.expected_error(4, mask).disagreement, found.disagreement
    )


def test_what_is_expected_follows_a_model_that_changes():
    """Of the same workers: at first all answers are alike, and decoded without an error."""
    coder = coder_of("BACC")
    estimator, mask = ErrorEstimator(coder), np.arange(coder.num_workers) != 2
    x = np.random.default_rng(7).normal(size=(300, coder.num_data, 4)).astype(np.float32)
    coded = coder.encode(x, np.arange(coder.num_workers)).swapaxes(0, 1)
    errors = []
    for model in (lambda x: 0 * tanh(x) + 1, tanh):
        for answers, own in zip(np.asarray(model(coded)), np.asarray(model(x)), strict=True):
            list(estimator.add_group(answers, own))  # all steps
        list(estimator.update_expected(coder.num_data, mask))  # all steps
        found = estimator.expected_error(coder.num_data, mask)
        assert found.current
        errors.append(found.error)
    assert (errors[0] < 1e-5).all()
    assert (errors[1] > 0.05).all()


def test_codes_that_cannot_guess_want_no_lessons():
    for name in ("replication", "uncoded"):
        coder = coder_of(name)
        assert not coder.can_decode
        assert not ErrorEstimator(coder).needs_samples(coder.num_data)
    assert coder_of("repeated").can_decode


def test_labels_are_compared():
    estimator = ErrorEstimator(Coder(CODES["interleaved"]))
    for decoded, right in (([0.0, 1], True), ([1.0, 0], False)):
        assert estimator.agrees(np.array(decoded), np.array([2.0, 3])) == right
