"""The one decision on approximate answers, and the sequential tests beneath it.

Bounds are compared with SciPy's beta quantiles, and delays and false alarms are counted. Promises
are kept over generated streams: each is drawn twelve times, and scores are learned from what was
compared, as on a server without a calibration.
"""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from scipy.special import expit

from nercc_jax import (
    ExactStragglers,
    NeRCC,
    Scheme,
    calibrate_error_probability,
    coded_inference,
)
from nercc_jax.risk import Accuracy, Comparison, Risk, RiskMonitor, logistic_regression
from nercc_jax.risk._monitor import WorkerMonitor
from nercc_jax.risk.error_bars import error_bars_from_ratios, fit_error_scale
from nercc_jax.risk.error_probability import fit_error_probability
from nercc_jax.risk.features import label_features
from nercc_jax.surrogates import Surrogate

LABELS, VALUES, POOL = Accuracy(max_disagreement=0.1), Accuracy(tolerance=1.0), 8


def row(probability=0.01, *, wrong=False, bound=0.0, excess=0.0):
    return Comparison(probability, bound, wrong, excess)


def bar(bound, excess):
    return row(math.nan, bound=bound, excess=excess)


WRONG = row(wrong=True)
# The bound holds in three of four cases: so many of a hundred, or of 112, may be wrong.
OF_100, OF_112 = (int(scipy.stats.binom.ppf(0.25, n, 0.1)) - 1 for n in (100, 112))
EVIDENCE, CALIBRATED = {"needs_evidence": True}, {"needs_evidence": False}
# A promise, whether evidence is needed, and stages: rows that were compared, and then whether
# answers with a probability and a bound are admitted, within a calibration's limit or beyond.
DECISIONS = {
    "nothing is given out without evidence": (LABELS, EVIDENCE, [
        (13 * [row()], {(0.0, 0.0, True): False}),
        ([row()], {(0.01, 0.0, True): True, (0.51, 0.0, True): False}),  # beyond a single one's cap
    ]),
    "rows that straggle decide": (LABELS, EVIDENCE, [
        (100 * [row(0.02), row(0.04, wrong=True)],
         {(0.02, 0.0, True): True, (0.04, 0.0, True): False}),
    ]),
    "the latest hundred decide by themselves": (LABELS, EVIDENCE, [
        (900 * [row()] + OF_100 * [WRONG], {(0.01, 0.0, True): True}),
        ([WRONG], {(0.01, 0.0, True): False}),
        (100 * [row()], {(0.01, 0.0, True): True}),
    ]),
    "14 right ones of a calibration have faded": (LABELS, CALIBRATED, [
        ([], {(0.01, 0.0, True): True}),
        (OF_112 * [WRONG] + (112 - OF_112) * [row()], {(0.01, 0.0, True): True}),
    ]),
    "one more is too many": (LABELS, CALIBRATED, [
        ((OF_112 + 1) * [WRONG] + (111 - OF_112) * [row()], {(0.01, 0.0, True): False}),
    ]),
    "one wrong of 16 forbids its like until 27": (LABELS, CALIBRATED, [
        (15 * [row()] + [row(0.02, wrong=True)],
         {(0.01, 0.0, True): True, (0.02, 0.0, True): False}),
        (11 * [row(0.02)], {(0.02, 0.0, True): True}),
    ]),
    "beyond a calibration only evidence counts": (LABELS, CALIBRATED, [
        ([], {(0.1, 0.0, True): True, (0.1, 0.0, False): False}),
        (12 * [row(0.05)], {(0.05, 0.0, False): False}),
        (12 * [row(0.05)], {(0.05, 0.0, False): True}),
        (4 * [WRONG], {(0.01, 0.0, True): False}),
    ]),
    "the unknown is not given out": (LABELS, CALIBRATED, [
        (30 * [row(math.nan)], {(math.nan, 0.0, True): False}),
    ]),
    "too few within the tolerance forbid nothing": (VALUES, CALIBRATED, [
        (4 * [bar(0.5, 0.8)] + 56 * [bar(2.0, 0.8)], {(math.nan, 0.9, True): True}),
        (20 * [bar(0.9, 3.0)], {(math.nan, 0.9, True): False}),
    ]),
    "but where evidence is needed": (VALUES, EVIDENCE, [
        (4 * [bar(0.5, 0.8)] + 56 * [bar(2.0, 0.8)], {(math.nan, 0.9, True): False}),
    ]),
    "bars are widened": (VALUES, EVIDENCE, [
        (60 * [bar(0.2, 2.0)], {(math.nan, 0.4, True): True, (math.nan, 0.6, True): False}),
    ]),
    "without a promise all is given out": (Accuracy(), CALIBRATED, [
        (40 * [row(math.nan, wrong=True)], {(math.nan, math.nan, True): True}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", DECISIONS)
def test_what_is_admitted(case):
    accuracy, options, stages = DECISIONS[case]
    risk = Risk(accuracy, **options)
    for rows, wanted in stages:
        for each in rows:
            risk.add(each, given=False)
        for (probability, bound, calibrated), admitted in wanted.items():
            assert bool(risk.admits(probability, bound, calibrated=calibrated)) == admitted


@pytest.mark.parametrize(("share", "needed"), [(0.01, 138), (0.05, 28), (0.1, 14), (0.5, 2)])
def test_as_many_stragglers_are_needed_as_a_bound_says(share, needed):
    risk = Risk(Accuracy(max_disagreement=share), needs_evidence=True)
    assert risk.needed == risk.status()["needed"] == needed
    assert (
        scipy.stats.beta.ppf(0.75, 1, needed) <= share < scipy.stats.beta.ppf(0.75, 1, needed - 1)
    )


@pytest.mark.parametrize("wrong", [2, 9, 30])
def test_the_limit_is_that_of_clopper_and_pearson(wrong):
    """By the number of right answers after which others like them are given out again."""
    risk, number = Risk(LABELS, needs_evidence=True), wrong
    for each in range(1024):
        if risk.admits(0.01, 0.0):
            break
        risk.add(WRONG if each < wrong else row(), given=False)
        number = each + 1
    recent = max(wrong - max(number - 100, 0), 0)  # of the latest hundred
    for count, among in ((wrong, number), (recent, min(number, 100))):
        assert scipy.stats.beta.ppf(0.75, count + 1, among - count) <= 0.1
    assert scipy.stats.beta.ppf(0.75, wrong + 1, number - 1 - wrong) > 0.1 or number > 100


def test_what_stragglers_show_is_expected_and_counted():
    risk = Risk(LABELS, needs_evidence=True)
    for number in range(200):
        risk.add(row(0.02 + 0.02 * (number % 2), wrong=bool(number % 2)), given=False)
    assert risk.share == 0.5
    assert risk.expected(0.02, 0.0) == (0.02, 0.0), "they were right"
    assert (risk.status()["disagreement"], risk.status()["compared"]) == (0.5, 200)
    shorter = Risk(VALUES, needs_evidence=True)
    for _ in range(60):
        shorter.add(bar(0.2, 2.0), given=False)
    assert shorter.expected(0.0, 0.2)[1] == pytest.approx(0.4, rel=0.05)
    np.testing.assert_array_equal(shorter.excesses, np.full(60, 2.0))


def test_an_answer_misses_the_target_by_its_label_or_by_its_error():
    wrong, excess = np.array([False, False, True]), np.array([1.0, 1.1, 0.5])
    for options, missed in (
        ({}, [False] * 3),
        ({"tolerance": 0.1}, [False, True, False]),
        ({"max_disagreement": 0.1}, [False, False, True]),
        ({"tolerance": 0.1, "max_disagreement": 0.1}, [False, True, True]),
    ):
        assert Accuracy(**options).missed(wrong, excess).tolist() == missed


def give(risk, each, number):
    """Give answers out, and compare them; return how many until a drift is found."""
    for count in range(number):
        risk.give()
        if risk.add(each, given=True, unknown=each.wrong):
            return count + 1
    return number


def test_answers_that_never_come_count_as_wrong_and_all_begins_again():
    risk = Risk(LABELS, needs_evidence=False)
    given = give(risk, WRONG, 100)
    assert risk.unknown == given < 30
    assert (risk.drifts, risk.epoch) == (1, 1)
    assert not risk.admits(0.0, 0.0)
    assert risk.waits
    risk.add(row(), given=False, epoch=0)
    assert risk.status()["compared"] == 0, "of before the drift"


def test_no_more_is_given_out_than_can_be_compared():
    risk = Risk(LABELS, needs_evidence=False)
    for most in (32, 64):  # later, as many more as were right
        given = 0
        while risk.admits(0.01, 0.0):
            risk.give()
            given += 1
        assert given == most
        for _ in range(32 if most == 32 else 0):
            risk.add(row(), given=True)


def test_evidence_is_replaced_and_what_was_given_out_stays_tested():
    risk = Risk(LABELS, needs_evidence=True)
    assert give(risk, WRONG, 3) == 3
    assert not risk.enough
    risk.replace(row() for _ in range(20))
    assert risk.enough
    assert risk.admits(0.01, 0.0)
    found = risk.status()
    assert (found["given_wrong"], found["disagreement"], found["compared"]) == (3, 0, 20)
    assert give(risk, WRONG, 10) < 7, "those from before count in the test"


def test_answers_without_a_promise_are_counted_and_no_more():
    risk = Risk(Accuracy(), needs_evidence=False)
    give(risk, row(math.nan, wrong=True), 40)
    give(risk, row(math.nan), 1)
    risk.add(row(math.nan), given=False)
    assert risk.drifts == 0


# Sequential tests.


@pytest.mark.parametrize(
    "days", [100, pytest.param(1000, marks=pytest.mark.slow)], ids=lambda days: f"{days} days"
)
@pytest.mark.parametrize("dependent", [False, True])
def test_the_monitor_alarms_no_more_often_than_stated(days, dependent):
    """Days of 1,000 answers as wrong as was promised: alone, or in runs whose mean is promised."""
    random, alarms = np.random.default_rng(0), 0
    for _ in range(days):
        wrong = random.random(1000) < 0.1
        if dependent:  # a wrong answer makes the next one right: still no more than promised
            wrong[1:] &= ~wrong[:-1]
        alarms += RiskMonitor(0.1).add(wrong.tolist())
    most = days * 1000 * 2e-5
    assert alarms <= most + 3 * math.sqrt(most)


@pytest.mark.parametrize(("times", "most"), [(1.5, 700), (2.0, 250), (4.0, 50)])
def test_a_broken_promise_is_found_after_a_long_good_time(times, most):
    random, delays = np.random.default_rng(1), []
    for _ in range(20):
        monitor = RiskMonitor(0.1)
        assert not monitor.add((random.random(1000) < 0.05).tolist())
        while not monitor.add([bool(random.random() < 0.1 * times)]):
            pass
        delays.append(monitor.number - 1000)
    assert np.mean(delays) < most


def test_a_monitor_begins_anew():
    monitor = RiskMonitor(0.1)
    assert monitor.add([True] * 20)
    assert monitor.add([False]), "an alarm stays"
    monitor.clear()
    assert not monitor.add([False, True])
    assert (monitor.number, monitor.wrong) == (2, 1)
    for wrong in ({"promised": 1.5}, {"promised": 0.1, "false_alarms": 0.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            RiskMonitor(**wrong)


def serve(monitor, wrong, random):
    """Have a pool's workers answer in turn; return the number of those that are accused.

    `wrong` are places in the stream at which an answer is wrong; the answers before each are shared
    out to all workers.
    """
    accused, before = set(), 0
    for place in wrong.tolist():
        right = random.multinomial(place - before, np.full(POOL, 1 / POOL))
        worker, before = int(random.integers(POOL)), place + 1
        for each, number in enumerate(right.tolist()):
            assert not monitor.add(each, right=number)
        if monitor.add(worker, wrong=1):
            accused.add(worker)
    return len(accused)


@pytest.mark.parametrize(
    ("shares", "pools", "answers", "most"),
    [
        ((1e-4,), 125, 10_000, 10),  # the rate of false accusations is one in a million answers
        ((5e-4,), 125, 10_000, 10),
        ((1e-4, 2e-3), 25, 4000, 2),  # as where a model draws random numbers, more so from then on
        ((1e-4, 1e-2), 25, 4000, 2),
    ],
)
def test_workers_that_are_wrong_as_others_are_accused_no_more_often_than_stated(
    shares, pools, answers, most
):
    random, accused = np.random.default_rng(0), 0
    for _ in range(pools):
        share = np.repeat(shares, POOL * answers // len(shares))
        accused += serve(
            WorkerMonitor(POOL), np.flatnonzero(random.random(len(share)) < share), random
        )
    assert accused <= most


@pytest.mark.parametrize(
    ("shares", "most"), [((1.0,), 3), ((0.2,), 40), ((0.05,), 160), ((0.5, 0.5), 200)]
)
def test_workers_that_are_wrong_are_found_soon(shares, most):
    """After a long time without; of two, one does not shield another."""
    random, found = np.random.default_rng(2), []
    for _ in range(50):
        monitor, accused = WorkerMonitor(POOL), set()
        for worker in range(POOL):
            monitor.add(worker, right=1000)
        for _ in range(most):
            for worker in range(POOL if len(shares) > 1 else 1):
                wrong = worker < len(shares) and random.random() < shares[worker]
                if monitor.add(worker, **{"wrong" if wrong else "right": 1}):
                    accused.add(worker)
        assert accused <= {*range(len(shares))}
        found.append(len(accused) == len(shares))
    assert np.mean(found) >= 0.9


def test_runs_of_right_answers_count_as_they_would_one_by_one():
    """And against the sum of products from all starting times, by hand."""
    share, ratios = 5e-4, np.array([4.0, 16.0, 64.0, 256.0, 1024.0])
    best = ratios * share / (1 - share + ratios * share)
    losses = [0] * 30 + [1] + [0] * 7 + [1]
    factors = np.array([np.where(loss, best / share, (1 - best) / (1 - share)) for loss in losses])
    products = sum(np.prod(factors[start:], axis=0) for start in range(len(losses)))
    for less, accused in ((1.001, False), (0.999, True)):
        monitor = WorkerMonitor(2, false_alarms=1 / (less * products.mean()))
        assert not monitor.add(0, right=30, wrong=1)
        assert monitor.add(0, right=7, wrong=1) == accused


def test_a_restart_forgets():
    monitor = WorkerMonitor(2)
    assert monitor.add(1, wrong=3)
    assert monitor.allowed(0) == 3 / 128, "of the least number of answers"
    monitor.restart(1)
    assert (monitor.number, monitor.wrong) == ([0, 0], [0, 0])
    assert monitor.allowed(0) == monitor.allowed(1) == 5e-4
    assert not monitor.add(1, wrong=2)
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        WorkerMonitor(2, usual=0.0)


# Error bars, from ratios of errors to deviations that are counted by hand: the k-th smallest of 99
# covers k hundredths of others; those that are NaN do not count.

RATIOS = np.random.default_rng(0).permutation([*range(1, 100), *[math.nan] * 7]).astype(float)


@pytest.mark.parametrize(
    ("coverage", "factor"), [(0.005, 1), (0.25, 25), (0.5, 50), (0.9, 90), (0.991, math.inf)]
)
def test_a_factor_is_the_ratio_that_covers_its_share_of_others(coverage, factor):
    bars = error_bars_from_ratios(RATIOS)
    assert float(bars.factor(coverage)) == factor
    expected = [0.0, 0.5 * factor, 2.0 * factor, np.inf]  # none for what is exact
    np.testing.assert_array_equal(bars(jnp.array([0.0, 0.5, 2.0, jnp.inf]), coverage), expected)


def test_of_many_ratios_a_thousand_quantiles_are_kept():
    ratios = np.random.default_rng(1).exponential(size=100_000)
    bars = error_bars_from_ratios(ratios)
    for coverage in (0.05, 0.5, 0.9, 0.99):
        covered = np.mean(ratios <= float(bars.factor(coverage)))
        assert coverage - 1e-5 <= covered <= coverage + 2e-3  # never shorter than asked


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, math.nan])
def test_wrong_coverages_and_ratios(coverage, untyped):
    with pytest.raises(ValueError, match="between 0 and 1"):
        error_bars_from_ratios(RATIOS).factor(coverage)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        error_bars_from_ratios(np.full(3, np.nan))


# -- Promises, kept over generated streams ---------------------------------------------------------

SEEDS, LENGTH = 12, 300


def exchangeable(random, place, last):
    return random.normal(size=3) * [1.0, 0.7, 0.7], 1.0


def drifting(random, place, last):
    """From the middle on the features tell the contrary."""
    return exchangeable(random, place, last)[0], 1.0 if place < LENGTH // 2 else -1.0


def dependent(random, place, last):
    """Only what is hard is slow, ever more of it."""
    margin, rough, variance = exchangeable(random, place, last)[0]
    return np.array([margin - place / LENGTH, rough, variance]), 1.0


def repeated(random, place, last):
    """Each answer comes four times."""
    return (last if place % 4 else exchangeable(random, place, last)[0]), 1.0


def adversarial(random, place, last):
    """A long good time, then what looks best is wrong."""
    return exchangeable(random, place, last)[0], 1.0 if place < 200 else -3.0


STREAMS = (exchangeable, drifting, dependent, repeated, adversarial)


def refitted(accuracy, features, known):
    """A score of these answers, and comparisons of those that it has not learned from."""
    bars = accuracy.tolerance is not None
    some = slice(None, None, 1 if bars else 2)
    parts = features[some, None], known[some, None], np.ones((len(known[some]), 1), bool)
    if bars:
        score = fit_error_scale(*parts, accuracy, len(known))
    else:
        fitted = {"usable": parts[2], "falling": (1,), "failure": 0.25}
        score = fit_error_probability(*parts[:2], **fitted)
    shown = []
    for found, missed in zip(
        np.asarray(score.of_features(features[1::2])), known[1::2], strict=True
    ):
        probability, bar = (math.nan, float(found)) if bars else (float(found), math.nan)
        excess = float(missed) / bar if bars else math.inf
        shown.append(Comparison(probability, bar, bool(missed) and not bars, excess))
    return score, shown


def play(stream, seed, accuracy):
    """What was given out, and whether it missed the promise, of a stream of stragglers."""
    random, last = np.random.default_rng(seed), np.zeros(3)
    score, risk = None, Risk(accuracy, needs_evidence=True)
    compared, due, missed = [], 32, []
    for place in range(LENGTH):
        last, sign = stream(random, place, last)
        margin, rough, variance = last
        features = np.array([1, *last, 0], np.float32)
        odds = -1.2 + sign * (rough + variance - 1.3 * margin)
        wrong = bool(random.random() < 1 / (1 + math.exp(-odds)))
        error = 0.3 * math.exp(sign * (rough + variance)) * abs(random.normal())
        value = math.nan if score is None else float(score.of_features(features))
        probability, bar = value, math.nan
        if accuracy.tolerance is not None:
            probability, bar = math.nan, value
        given = bool(risk.admits(probability, bar, calibrated=False))
        widened = risk.expected(probability, bar)[1] / bar if given and bar == value else 1.0
        excess = error / bar if bar == bar else math.inf
        if given:
            risk.give()
            missed.append(wrong if accuracy.tolerance is None else excess > widened)
        row = Comparison(probability, bar, wrong and accuracy.tolerance is None, excess)
        risk.add(row, given=given, widened=widened)
        compared.append((features, wrong if accuracy.tolerance is None else error))
        if len(compared) >= due:
            due += max(due // 2, 32)
            features, known = map(np.stack, zip(*compared, strict=True))
            score, shown = refitted(accuracy, features, known)
            risk.replace(shown)
    return missed


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.__name__)
@pytest.mark.parametrize(
    "accuracy",
    [Accuracy(max_disagreement=0.1), Accuracy(tolerance=0.6)],
    ids=["labels", "values"],
)
def test_no_more_is_missed_than_was_promised(stream, accuracy):
    missed = [play(stream, seed, accuracy) for seed in range(SEEDS)]
    number, wrong = sum(map(len, missed)), sum(map(sum, missed))
    allowed = accuracy.promised * number
    # A sudden change is noticed once some more were wrong: in each draw about as many.
    unnoticed = 5 * SEEDS if stream in (drifting, adversarial) else 0
    assert wrong <= allowed + unnoticed + 4 * math.sqrt(max(allowed, 1))
    if stream in (exchangeable, repeated):
        assert number > 20 * SEEDS, "an honest stream is not silenced"


# -- How likely a label is wrong: the regression, its promises, and which outputs have labels ------


K, N, OUTPUTS = 4, 7, 4
LAWS = {"three": ExactStragglers(3)}
_WEIGHTS = np.random.default_rng(0).normal(size=(5, OUTPUTS))


def model(x):
    return jnp.sin(1.5 * x @ jnp.asarray(_WEIGHTS, x.dtype))


def rough(x):
    return model(x) + 0.3 * jnp.cos(3 * x @ jnp.asarray(_WEIGHTS, x.dtype))


def points(seed, groups):
    return np.random.default_rng(seed).normal(size=(groups * K, 5)).astype("float32")


CODES = {
    "chebyshev": lambda: NeRCC(K, N),
    "repeated": lambda: NeRCC(K, N, lambda_dec=0.0, points="repeated"),
}


def seen(scheme, x):
    """Promised probabilities, sure and wrong ones of data points under all sets."""
    own = np.asarray(model(x)).argmax(-1)
    infer, found = coded_inference(model, scheme, with_status=True), []
    for mask in LAWS["three"].every_set(N, 100):
        result = infer(x, mask)
        labels = np.asarray(result.predictions).argmax(-1)
        wrong = (labels != own) | ~np.asarray(result.recovered)
        found.append((result.error_probability, result.deviation == 0, wrong))
    return [np.asarray(each) for each in zip(*found, strict=True)]


def test_features_that_tell_nothing_have_a_tenth_of_the_weight_that_was_fitted():
    """A regression on few samples is judged on samples that it has not seen."""
    rng, ratios = np.random.default_rng(3), []
    for _ in range(8):
        features = np.concatenate([np.ones((40, 1, 1)), rng.normal(size=(40, 1, 12))], axis=-1)
        wrong = rng.random((40, 1)) < 0.3
        fitted = logistic_regression(features[:, 0], wrong[:, 0], (1, 2))
        found = fit_error_probability(features, wrong).weights
        ratios.append(np.linalg.norm(found[1:]) / np.linalg.norm(fitted[1:]))
    assert np.median(ratios) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("code", "surrogate"),
    [("chebyshev", None), ("repeated", Surrogate(rough, theta=0.8, kappa=2.0))],
)
def test_it_keeps_its_promises_on_other_data(code, surrogate, key):
    code = CODES[code]()
    scheme = Scheme(code, surrogate=surrogate)
    error_probability = calibrate_error_probability(
        model, scheme, points(0, 400), LAWS, key=key, num_sets=100
    )
    scheme = Scheme(code, surrogate=surrogate, error_probability=error_probability)
    promised, sure, wrong = seen(scheme, points(1, 800))
    assert not wrong[sure].any()
    assert sure.any() == (code.alpha[0] in code.beta)
    # Bins of as many expected wrong ones each.
    order = np.argsort(promised, axis=None)
    share = np.cumsum(promised.ravel()[order]) / promised.sum()
    for part in range(5):
        chosen = order[(share > part / 5) & (share <= (part + 1) / 5)]
        ratio = wrong.ravel()[chosen].mean() / promised.ravel()[chosen].mean()
        assert 0.7 < ratio < 1.3, (part, ratio)
    # And it tells more than the mean does, if there is anything to tell: the least uncertain half.
    least = order[promised.ravel()[order] > 0]
    least = least[: least.size // 2]
    if surrogate is not None or not sure.any():
        assert wrong.ravel()[least].mean() < 0.75 * wrong[~sure].mean()
    for wanted in (0.005, 0.02):
        kept = promised <= error_probability.limit(wanted)
        assert np.sum(wrong & kept) <= wanted * np.sum(kept & ~sure)
        np.testing.assert_allclose(
            np.mean(~kept), error_probability.share(error_probability.limit(wanted)), atol=0.05
        )
    assert error_probability.limit(1.0) == error_probability.levels[-1]


@pytest.mark.parametrize("xp", [np, jnp])
def test_the_features_of_labels(xp):
    """The constant, the ratio's negative and positive parts, the margin's size, the surrogate."""
    predictions = xp.asarray([[3.0, 1.0, 0.0], [0.0, 0.5, 0.25]])
    cheap = xp.asarray([[0.0, 2.0, 1.0], [0.0, 1.0, 0.0]])
    found = np.asarray(label_features(predictions, xp.asarray([0.5, 1.0]), cheap, None))
    size = np.log([2, 0.25])
    wanted = [np.ones(2), [0, size[1]], [np.log(4), 0], size]
    np.testing.assert_allclose(found[:, :4].T, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, 4], [-1, 1])


def test_sure_ones_and_lost_ones(key, dtype):
    x, code = points(0, 40), CODES["chebyshev"]()
    error_probability = calibrate_error_probability(model, code, x, LAWS, key=key, num_sets=10)
    predictions = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, OUTPUTS)), float)
    predictions = predictions.at[0, 0, 1].set(jnp.nan)
    deviation = jnp.full((2, 3), 0.5).at[1, 2].set(0).at[1, 1].set(jnp.inf)
    value = eqx.filter_jit(error_probability)(predictions, deviation)
    assert value.shape == (2, 3)
    assert value[0, 0] == 1
    assert value[1, 2] == 0
    assert 0 < value[0, 1] < 1
    assert 0 < value[1, 1] < 1
    nearer = error_probability(predictions, deviation / 100)
    assert nearer[0, 1] < value[0, 1], "the surer, the less doubt"


def ranked(wrong, sure=None, **options):
    """An error probability of samples in the order of their feature, the surest first."""
    features = np.stack([np.ones(len(wrong)), np.linspace(3, -3, len(wrong))], axis=-1)
    found = fit_error_probability(
        features[:, None], np.asarray(wrong)[:, None], sure=sure, falling=(1,), **options
    )
    return found, np.asarray(found.of_features(features))


@pytest.mark.parametrize("failure", [None, 0.025, 0.25])
def test_the_bound_is_that_of_clopper_and_pearson(failure, dtype):
    """18 data points of which four are wrong, and two that are exact; or two standard errors."""
    wrong = np.isin(np.arange(20), [9, 14, 16, 17])
    found, value = ranked(wrong, np.arange(20) >= 18, failure=failure)
    assert found.weights[1] < 0
    assert found.levels[0] == found.bounds[0] == 0
    assert found.shares[0] == pytest.approx(0.9)
    np.testing.assert_allclose(value[:18].sum(), 4, rtol=0.1)
    for given in (9, 14, 18):
        errors = int(wrong[:given].sum())
        bound = (errors + 1) / (given + 1) + 2 * np.sqrt(errors * (given - errors) / given**3)
        if failure is not None:
            bound = scipy.stats.beta.ppf(1 - failure, errors + 1, given - errors)
        # No answer may be wrong with five times the share, nor with one half.
        caps = [max(min(5 * share, 0.5), share) for share in (bound + 1e-4, bound - 1e-4)]
        cap = min(value[given - 1] * (1 + 1e-5), caps[0])
        assert found.limit(bound + 1e-4) == pytest.approx(cap, rel=1e-4)
        assert found.limit(bound - 1e-4) < min(value[given - 1], caps[1] + 1e-9)
    assert found.limit(0.0) == 0
    assert found.share(float(value[8]) + 1e-4) == pytest.approx(9 / 20)
    assert [found.share(limit) for limit in (0.0, 1.0)] == pytest.approx([0.9, 0.0])


def test_samples_of_the_same_point_and_of_one_group_count_once():
    """Of 400 points each is seen ten times; wrong ones come alone, or a whole group at a time."""
    random, points = np.random.default_rng(0), np.repeat(np.arange(400), 10)
    alone = random.random(400) < 0.1
    together = np.repeat(random.random(20) < 0.1, 20)
    once, seen = ranked(alone), ranked(alone[points], points=400, owners=[points])
    assert float(seen[0].bounds[-1]) == pytest.approx(float(once[0].bounds[-1]), rel=0.1)
    independent, grouped = (
        ranked(together, owners=owners)[0].bounds[-1] for owners in ((), [np.arange(400) // 20])
    )
    assert grouped > 1.3 * independent


def test_owners_that_are_alike_cost_nothing():
    """Of each two equal samples one is of one straggler set, the other of the other."""
    wrong = np.repeat(np.arange(40) > 30, 2)
    features = np.stack([np.ones(80), np.repeat(np.linspace(3, -3, 40), 2)], axis=-1)[:, None]
    single, sets = np.arange(80), np.arange(80) % 2
    found = [
        fit_error_probability(features, wrong[:, None], falling=(1,), owners=owners).bounds
        for owners in ((single,), (single, sets))
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)


def test_a_sample_counts_as_wrong_from_its_first_wrong_look_on():
    """At the second look all are right, but half of them were given out before, wrongly."""
    random = np.random.default_rng(1)
    features = np.stack([np.ones((400, 2)), random.normal(size=(400, 2))], axis=-1)
    wrong = np.stack([random.random(400) < 0.5, np.zeros(400, bool)], axis=1)
    found = fit_error_probability(features, wrong, falling=(1,))
    unusable = fit_error_probability(features, wrong, usable=~wrong, falling=(1,))
    assert found.bounds[-1] > 0.4
    assert unusable.limit(0.05) > 0


def test_the_correction_is_for_what_is_no_logistic_curve(dtype):
    """A step in the probability, which no line of log-odds can follow; one set of 20,000 groups."""
    rng = np.random.default_rng(0)
    feature = rng.uniform(-1, 1, 20_000)
    true = np.where(feature > 0, 0.01, 0.4)
    wrong = (rng.uniform(size=feature.shape) < true)[:, None]
    features = np.stack([np.ones_like(feature), feature], axis=-1)[:, None]
    error_probability = fit_error_probability(features, wrong)
    given = np.asarray([[1, -0.9], [1, -0.3], [1, 0.4], [1, 0.9]])
    line = expit(given @ np.asarray(error_probability.weights))
    assert line[0] > 0.5
    assert line[1] < 0.3, "or there is nothing to correct"
    assert line[2] > 0.04
    value = np.asarray(error_probability.of_features(jnp.asarray(given, float)))
    np.testing.assert_allclose(value, [0.4, 0.4, 0.01, 0.01], rtol=0.5)
    # What it joins stays in order.
    grid = np.column_stack([np.ones(101), np.linspace(-1, 1, 101)])
    assert np.all(
        np.diff(np.asarray(error_probability.of_features(jnp.asarray(grid, float)))) <= 1e-6
    )


@pytest.mark.parametrize("slope", [0.0, 1e-4, 0.3])
def test_where_hardly_anything_is_known_rounding_decides_nothing(slope, dtype):
    """All doubts are nearly the same: in a compiled program as many are kept as in calibration."""
    rng = np.random.default_rng(1)
    shape = (24_000,)
    feature = rng.normal(size=shape)
    wrong = rng.uniform(size=shape) < expit(slope * feature)
    sure = rng.uniform(size=shape) < 0.5
    features = np.stack([np.ones(shape), -feature], axis=-1)
    error_probability = fit_error_probability(
        features[:, None], (wrong & ~sure)[:, None], sure=sure, points=1200
    )
    value = np.asarray(eqx.filter_jit(error_probability.of_features)(jnp.asarray(features, float)))
    value = np.where(sure, 0, value)
    for limit in np.asarray(error_probability.levels)[
        [0, 1, len(error_probability.levels) // 2, -1]
    ]:
        share = error_probability.share(float(limit))
        assert np.mean(value > limit) == pytest.approx(share, abs=5e-3)
        kept = ~sure & (value <= limit)
        place = np.searchsorted(np.asarray(error_probability.levels), limit)
        assert np.mean(wrong[kept]) <= error_probability.bounds[place] if kept.any() else True


@pytest.mark.parametrize("slope", [-1.5, 1.5])
def test_the_regression_is_the_most_likely_one(slope):
    """Under the constraint that the second and third features do not raise the doubt."""
    rng = np.random.default_rng(0)
    columns = [rng.normal(size=500), 3 + 0.1 * rng.normal(size=500), rng.normal(size=500)]
    features = np.column_stack([np.ones(500), *columns])
    wrong = rng.uniform(size=500) < expit(features @ [20.0, slope, -7.0, 0.5])
    weights = logistic_regression(features, wrong, falling=(1, 2))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    mean[0], scale[0] = 0, 1
    z = np.concatenate([(features - mean) / scale, np.eye(1, 4)])
    target = np.append(wrong.astype(float), 0.5)
    free = [0, 1, 2, 3] if slope < 0 else [0, 2, 3]

    def loss(w):
        logit = z[:, free] @ w
        return np.sum(np.logaddexp(0, logit) - target * logit) + np.sum(w[1:] ** 2) / 2

    best = scipy.optimize.minimize(loss, np.zeros(len(free)), tol=1e-12).x
    np.testing.assert_allclose(features @ weights, z[:-1][:, free] @ best, atol=1e-3)


@pytest.mark.parametrize("all_wrong", [False, True])
def test_the_regression_where_all_are_alike(all_wrong):
    features = np.column_stack([np.ones(50), np.linspace(-1, 1, 50)])
    weights = logistic_regression(features, np.full(50, all_wrong))
    probability = 1 / (1 + np.exp(-features @ weights))
    expected = (50.5 if all_wrong else 0.5) / 51
    np.testing.assert_allclose(probability, expected, atol=0.01)
    np.testing.assert_array_equal(logistic_regression(features[:0], np.zeros(0, bool)), [0, 0])


def test_wrong_use(key, untyped):
    error_probability = calibrate_error_probability(
        model, NeRCC(K, N), points(0, 10), LAWS, key=key, num_sets=2
    )
    predictions = jnp.ones((2, OUTPUTS))
    with pytest.raises(ValueError, match="calibrated without a surrogate's outputs"):
        error_probability(predictions, jnp.ones(2), predictions)
    with pytest.raises(ValueError, match=r"max_disagreement must be in \[0, 1\], not 1.5"):
        error_probability.limit(1.5)
    with pytest.raises(ValueError, match="must be 0 or positive, not nan"):
        error_probability.share(float("nan"))
