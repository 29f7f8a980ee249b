"""A code made ready for a stream: layouts, decoding, and how far its answers are doubted."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from traffic import EXTRAS, INTERLEAVED, OWN

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded
from nercc_jax.codes import BerrutSpline
from nercc_jax.risk import Accuracy, ErrorProbability
from nercc_jax.serving import Coder, calibrate_decoding

# By name: whether a query can be decoded from others', and its error has a probability.
FLAGS = {
    "interleaved": (
        NeRCC(4, 8, points="interleaved", lambda_dec=0.0),
        "decodes doubts",
    ),
    "interleaved, few more": (
        NeRCC(5, 7, points="interleaved", lambda_dec=0.0),
        "decodes doubts",
    ),
    "repeated": (NeRCC(4, 8, points="repeated", lambda_dec=0.0), "decodes doubts"),
    "BACC": (Berrut(4, 8, points="interleaved"), "decodes"),
    "BSCC": (BerrutSpline(4, 8, points="interleaved"), "decodes"),
    "LCC": (Lagrange(3, 7), "decodes"),
    "replication": (Replication(3, 7), ""),
    "uncoded": (Uncoded(3), ""),
    "ParM": (Parity(2, 3), "decodes"),
}
LABELS = Accuracy(max_disagreement=0.1)
NOTHING = np.zeros(1, np.float32)
CODES = {name: code for name, (code, _) in FLAGS.items()}


def coder_of(name):
    code = CODES[name]
    return Coder(code, tuple(range(int(code.worker_models.max()) + 1)))


def weighing(weights):
    """A score of these weights, without a correction or a limit."""
    return ErrorProbability(np.float32(weights), *[NOTHING] * 5)


@pytest.mark.parametrize("name", CODES)
def test_layouts(name):
    coder, flags = coder_of(name), FLAGS[name][1].split()
    assert coder.can_decode == ("decodes" in flags)
    assert coder.has_deviation == ("doubts" in flags)
    x = np.random.default_rng(0).normal(size=(2, coder.num_data, 5)).astype(np.float32)
    for queries in range(1, coder.num_data + 1):
        layout = coder.layout(queries)
        everything = np.arange(coder.num_workers)
        coded = coder.encode(x[:, :queries], everything)
        assert coded.shape == (coder.num_workers, 2, 5)
        # What is sent as queries come are the queries, whatever number of them there will be.
        first = np.concatenate(coder.first[:queries])
        assert len(first) == queries
        for place in range(queries):
            for point in coder.first[place]:
                assert layout.place_of[point] == place
            for point in layout.own[place]:
                np.testing.assert_allclose(coded[point], x[:, place], atol=2e-5)
        # The rest comes once, and no more of it for each query than in a full group.
        assert len(set(first) | set(layout.extras)) == len(first) + len(layout.extras)
        share = (coder.num_workers - coder.num_data) * queries / coder.num_data
        assert len(layout.extras) == np.ceil(share)


@pytest.mark.parametrize("name", ["interleaved", "interleaved, few more"])
def test_doubts_are_of_each_rows_own_margin_and_deviation(name):
    """Against the code's own deviations: variance and roughness with the same weight are those."""
    coder = coder_of(name)
    assert coder.has_deviation
    random = np.random.default_rng(1)
    values = random.normal(size=(coder.num_workers, 3, 5)).astype(np.float32)
    mask = np.ones(coder.num_workers, bool)
    mask[coder.first[1]] = False
    values[~mask] = np.nan
    weighed = weighing([0.3, -0.7, 0.5, 0.5, 0])
    with np.errstate(invalid="ignore"):
        decoded = coder.decode(values, mask, 4)
        found, doubt = decoded.predictions, coder.score(values, decoded, weighed)
    assert decoded.recovered.all()
    for row in range(3):
        wanted, deviation = coder.code.decode(values[:, row], mask, return_uncertainty=True)
        wanted, deviation = np.asarray(wanted)[coder.order], np.asarray(deviation)[coder.order]
        np.testing.assert_allclose(found[row], wanted, atol=2e-4)
        clear = deviation > 1e-3  # others are answers themselves, to rounding
        assert clear.any()
        second, first = np.sort(wanted[clear], axis=1)[:, -2:].T
        logit = 0.3 - 0.7 * np.log(first - second) + 0.5 * np.log(deviation[clear])
        np.testing.assert_allclose(doubt[row, clear], 1 / (1 + np.exp(-logit)), rtol=1e-2)


# What is expected of decoded answers.

WEIGHTS = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)


def tanh(x):
    return jnp.tanh(3 * jnp.asarray(x) @ jnp.asarray(WEIGHTS))


def rows(number, seed, queries=None):
    shape = (number, 4) if queries is None else (number, queries, 4)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def known():
    coder = Coder(INTERLEAVED)
    return coder, calibrate_decoding(coder, tanh, rows(2000, 3), LABELS)


def answered(coder, x, model=tanh):
    """All workers' answers to groups, by worker, and the model's own."""
    everything = np.arange(coder.num_workers)
    return np.asarray(model(coder.encode(x, everything))), np.asarray(model(x))


def missing(*points):
    return ~np.isin(np.arange(8), points)


# Limits that keep their promise.


@pytest.mark.parametrize("queries", [2, 4])
def test_no_more_is_wrong_than_was_asked_for(known, queries):
    """On other data: every query whose own worker straggles, as the last answers come in."""
    coder, decoding = known
    x = rows(400, 4, queries)
    answers, own = answered(coder, x)
    own = own.argmax(-1)
    random, redundancy = np.random.default_rng(5), queries
    sent = np.array([*OWN[:queries], *EXTRAS[:queries]])
    doubt = decoding.calibrated.get(queries)
    limits = {share: doubt.limit(share) for share in (0.3, 0.1, 0.03)}
    wrong, sent_out = ({share: [] for share in limits} for _ in range(2))
    doubts, errors = [], []
    sets = list(itertools.product(range(queries), range(redundancy), range(4)))
    for place, more, _ in sets:
        others = random.permutation(np.setdiff1d(sent, OWN[place]))
        responded = len(others) - more
        open_ = {share: np.ones(len(x), bool) for share in limits}
        for number in (responded - 2, responded - 1, responded):
            mask = np.isin(np.arange(8), others[: max(number, 1)])
            given = np.where(mask[:, None, None], answers, 0)
            decoded = coder.decode(given, mask, len(x))
            seen = coder.score(given, decoded, doubt)
            differ = decoded.predictions[:, place].argmax(-1) != own[:, place]
            for share, limit in limits.items():
                now = open_[share] & (seen[:, place] <= limit)
                wrong[share] += (differ & now).astype(float).tolist()
                sent_out[share] += now.astype(float).tolist()
                open_[share] &= ~now
        doubts.append(seen[:, place].mean())
        errors.append(differ.mean())
    for share in limits:
        assert sum(wrong[share]) <= share * sum(sent_out[share])
    assert doubt.share(limits[0.3]) < 0.95, "something is answered at once"
    assert 1 >= limits[0.3] >= limits[0.1] >= limits[0.03]
    assert np.mean(doubts) == pytest.approx(np.mean(errors), rel=0.3)
    # What decides by query beats what decides by the mask alone.
    sure = seen[:, place] <= np.median(seen[:, place])
    assert differ[sure].mean() < 0.6 * differ[~sure].mean()


def test_a_code_without_deviations_goes_by_margins():
    """BACC: no bar, but a limit of the margins at which its labels are right."""
    coder = Coder(Berrut(4, 8, points="interleaved"))
    assert not coder.ranks(Accuracy(tolerance=0.1))
    accuracy = Accuracy(max_disagreement=0.3)
    decoding = calibrate_decoding(coder, tanh, rows(2000, 3), accuracy)
    assert 0 < decoding.limit(4) <= 0.5
    answers, own = answered(coder, x := rows(400, 4, 4))
    mask = missing(*coder.first[1])
    given = np.where(mask[:, None, None], answers, 0)
    decoded = coder.decode(given, mask, len(x))
    features, _ = coder.features(given, decoded)
    assert (features[..., 2:] == 0).all(), "a known roughness of one, and a variance of one"
    seen = coder.score(given, decoded, decoding.calibrated[4])
    sure = seen[:, 1] <= decoding.limit(4)
    wrong = decoded.predictions[:, 1].argmax(-1) != own[:, 1].argmax(-1)
    assert sure.sum() > 40
    assert wrong[sure].mean() <= 0.3 < wrong[~sure].mean()


def test_a_few_groups_say_nothing(known):
    coder = Coder(INTERLEAVED)
    short = calibrate_decoding(coder, tanh, rows(60, 3), LABELS)
    assert not short.calibrated
    assert (short.limit(4), short.limit(2)) == (-1, -1)
    # Nor do many where nothing may be wrong: no doubt is so small, not even none.
    nothing = dataclasses.replace(known[1], accuracy=Accuracy(max_disagreement=0.0))
    assert (nothing.limit(4), nothing.limit(2)) == (-1, -1)
