"""Evidence on stragglers: bounds against their closed form, false alarms, delays, and decisions."""

import math

import numpy as np
import pytest
import scipy.stats

from nercc_jax.risk import Accuracy, Comparison, Risk, RiskMonitor
from nercc_jax.risk._accuracy import allowed_errors, conformal_quantile, risk_cap

RATE = 2e-5  # of false alarms, by default
LABELS = Accuracy(max_disagreement=0.1)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_allowed_errors_are_those_of_clopper_and_pearson(share):
    allowed = allowed_errors(share, 400)
    for number in (1, 7, 13, 14, 138, 400):
        bounds = scipy.stats.beta.ppf(0.75, np.arange(number) + 1, number - np.arange(number))
        assert allowed[number] == np.sum(bounds <= share) - 1
    assert allowed[0] == -1


def test_everything_is_allowed_where_all_may_be_wrong_and_a_small_promise_has_a_small_cap():
    np.testing.assert_array_equal(allowed_errors(1.0, 3), [0, 1, 2, 3])
    assert [risk_cap(share) for share in (0.0, 0.01, 0.1, 0.3, 1.0)] == [0, 0.05, 0.5, 0.5, 1]


@pytest.mark.parametrize(
    "days", [100, pytest.param(1000, marks=pytest.mark.slow)], ids=lambda days: f"{days} days"
)
@pytest.mark.parametrize("dependent", [False, True])
def test_the_monitor_alarms_no_more_often_than_stated(days, dependent):
    """Days of 1,000 answers as wrong as was promised: alone, or in runs whose mean is promised."""
    random, alarms = np.random.default_rng(0), 0
    for _ in range(days):
        if dependent:  # a wrong answer makes the next one right: still no more than promised
            wrong = random.random(1000) < 0.1
            wrong[1:] &= ~wrong[:-1]
        else:
            wrong = random.random(1000) < 0.1
        alarms += RiskMonitor(0.1).add(wrong.tolist())
    most = days * 1000 * RATE
    assert alarms <= most + 3 * math.sqrt(most)


@pytest.mark.parametrize(("times", "most"), [(1.5, 700), (2.0, 250), (4.0, 50)])
def test_a_broken_promise_is_found_after_a_long_good_time(times, most):
    random, delays = np.random.default_rng(1), []
    for _ in range(20):
        monitor = RiskMonitor(0.1)
        assert not monitor.add((random.random(1000) < 0.05).tolist())
        delay = 0
        while not monitor.add([bool(random.random() < 0.1 * times)]):
            delay += 1
        delays.append(delay)
    assert np.mean(delays) < most


def test_a_monitor_begins_anew():
    monitor = RiskMonitor(0.1)
    assert monitor.add([1.0] * 20)
    assert monitor.add([0.0]), "an alarm stays"
    monitor.clear()
    assert not monitor.add([0.5, True])
    assert (monitor.number, monitor.wrong) == (2, 1.5)
    for wrong in ({"promised": 1.5}, {"promised": 0.1, "false_alarms": 0.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            RiskMonitor(**wrong)


def row(probability=0.01, *, wrong=False, bound=0.0, excess=0.0):
    return Comparison(probability, bound, wrong, excess)


def test_an_answer_misses_the_target_by_its_label_or_by_its_error():
    wrong, excess = np.array([False, False, True]), np.array([1.0, 1.1, 0.5])
    assert Accuracy().missed(wrong, excess).tolist() == [False] * 3
    assert Accuracy(tolerance=0.1).missed(wrong, excess).tolist() == [False, True, False]
    assert Accuracy(max_disagreement=0.1).missed(wrong, excess).tolist() == [False, False, True]
    assert Accuracy(tolerance=0.1, max_disagreement=0.1).missed(wrong, excess).tolist() == [
        False,
        True,
        True,
    ]


def test_nothing_is_given_out_without_evidence_on_stragglers():
    risk = Risk(LABELS, needs_evidence=True)
    assert risk.needed == 14
    for _ in range(13):
        risk.add(row(), given=False)
        assert not risk.admits(0.0, 0.0)
        assert risk.waits
    risk.add(row(), given=False)
    assert risk.admits(0.01, 0.0)
    assert not risk.admits(0.51, 0.0), "the cap of a single answer"
    assert risk.share == 1


def test_a_limit_is_that_of_rows_that_straggle():
    """Those with a small probability are right, the others wrong, whatever was calibrated."""
    risk = Risk(LABELS, needs_evidence=True)
    for number in range(200):
        risk.add(row(0.02 + 0.02 * (number % 2), wrong=bool(number % 2)), given=False)
    assert risk.admits(0.02, 0.0)
    assert not risk.admits(0.04, 0.0)
    assert risk.share == 0.5
    assert risk.expected(0.02, 0.0) == (0.02, 0.0), "they were right"
    assert (risk.status()["disagreement"], risk.status()["compared"]) == (0.5, 200)


def test_right_answers_from_before_a_change_do_not_count_for_long():
    """Of nine hundred right ones and a dozen wrong ones, the latest hundred decide."""
    risk = Risk(LABELS, needs_evidence=True)
    for _ in range(900):
        risk.add(row(), given=False)
    most = int(scipy.stats.binom.ppf(0.25, 100, 0.1)) - 1  # the bound holds in three of four cases
    admitted = []
    for _ in range(12):
        risk.add(row(wrong=True), given=False)
        admitted.append(bool(risk.admits(0.01, 0.0)))
    assert admitted == [True] * most + [False] * (12 - most)
    for _ in range(100):
        risk.add(row(), given=False)
    assert risk.admits(0.01, 0.0)


def test_a_calibration_counts_less_beside_stragglers():
    """Of 112 rows in which 14 right ones have faded, as many may be wrong as a quantile says."""
    most = int(scipy.stats.binom.ppf(0.25, 112, 0.1)) - 1  # the bound holds in three of four cases
    for wrong, admitted in ((most, True), (most + 1, False)):
        risk = Risk(LABELS, needs_evidence=False)
        assert risk.admits(0.01, 0.0)
        for number in range(112):
            risk.add(row(wrong=number < wrong), given=False)
        assert risk.admits(0.01, 0.0) == admitted


def test_a_calibration_admits_nothing_as_uncertain_as_a_wrong_answer_without_evidence():
    """One wrong answer of sixteen forbids others like it until 27 were compared."""
    risk = Risk(LABELS, needs_evidence=False)
    for number in range(16):
        risk.add(row(0.02 if number == 15 else 0.01, wrong=number == 15), given=False)
    assert (risk.admits(0.01, 0.0), risk.admits(0.02, 0.0)) == (True, False)
    for _ in range(11):
        risk.add(row(0.02), given=False)
    assert risk.admits(0.02, 0.0)


def test_rows_beyond_the_tolerance_do_not_forbid_those_within():
    """Of rows that a calibration admits, too few were seen to say anything else."""
    risks = [Risk(Accuracy(tolerance=1.0), needs_evidence=n) for n in (False, True)]
    for risk in risks:
        for number in range(60):
            risk.add(row(math.nan, bound=0.5 if number < 4 else 2.0, excess=0.8), given=False)
    assert [bool(risk.admits(math.nan, 0.9)) for risk in risks] == [True, False]
    for _ in range(20):  # off by three times their bounds: these forbid
        risks[0].add(row(math.nan, bound=0.9, excess=3.0), given=False)
    assert not risks[0].admits(math.nan, 0.9)


def test_answers_that_never_come_count_as_wrong():
    risk = Risk(LABELS, needs_evidence=False)
    given, detected = 0, False
    assert risk.admits(0.01, 0.0)
    while not detected:
        risk.give()
        given += 1
        detected = risk.add(row(wrong=True), given=True, unknown=True)
        assert not risk.admits(0.01, 0.0)
    assert risk.unknown == given < 30
    assert not risk.admits(0.0, 0.0)


def test_no_more_is_given_out_than_can_be_compared():
    risk = Risk(LABELS, needs_evidence=False)
    given = 0
    while risk.admits(0.01, 0.0):
        risk.give()
        given += 1
    assert given == 32
    for _ in range(given):
        risk.add(row(), given=True)
    while risk.admits(0.01, 0.0):
        risk.give()
        given += 1
    assert given == 32 + 64, "as many more as were right"


def test_evidence_is_replaced_and_what_was_given_out_stays_tested():
    risk = Risk(LABELS, needs_evidence=True)
    for _ in range(3):
        risk.give()
        risk.add(row(wrong=True), given=True)
    assert not risk.enough
    risk.replace(row() for _ in range(20))
    assert risk.enough
    assert risk.admits(0.01, 0.0)
    assert risk.status()["given_wrong"] == 3
    assert (risk.status()["disagreement"], risk.status()["compared"]) == (0, 20)
    risk.give()
    given = 4
    while not risk.add(row(wrong=True), given=True):
        risk.give()
        given += 1
    assert given < 10, "those from before count in the test"


def test_what_nothing_is_known_of_is_not_given_out():
    risk = Risk(LABELS, needs_evidence=False)
    assert not risk.admits(math.nan, 0.0)
    for _ in range(30):
        risk.add(row(math.nan), given=False)
    assert risk.status()["compared"] == 0


def test_one_wrong_answer_does_not_undo_a_calibration_and_many_do():
    """What was calibrated counts as 14 right answers; beyond its limit only evidence counts."""
    risk = Risk(LABELS, needs_evidence=False)
    assert risk.admits(0.1, 0.0)
    assert not risk.admits(0.1, 0.0, calibrated=False)
    for number in range(12):
        risk.add(row(0.2 - number / 100, wrong=number == 0), given=False)
    assert not risk.admits(0.2, 0.0), "one of 12 and 14 is more than the bound allows"
    assert risk.admits(0.19, 0.0)
    assert not risk.admits(0.05, 0.0, calibrated=False)
    for _ in range(12):
        risk.add(row(0.05), given=False)
    assert risk.admits(0.05, 0.0, calibrated=False), "24 were compared by now"
    for _ in range(4):
        risk.add(row(0.01, wrong=True), given=False)
    assert not risk.admits(0.01, 0.0)


def test_answers_without_a_promise_are_counted_and_no_more():
    risk = Risk(Accuracy(), needs_evidence=False)
    for wrong in [True] * 40 + [False]:
        risk.give()
        assert not risk.add(row(math.nan, wrong=wrong), given=True)
    risk.add(row(math.nan, wrong=True), given=False, forced=True)
    risk.add(row(math.nan), given=False)
    assert risk.admits(math.nan, math.nan)
    assert (len(risk.shown), sum(risk.shown)) == (42, 41)


@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_a_conformal_quantile_covers_its_share_of_others(coverage):
    random, covered = np.random.default_rng(0), []
    for _ in range(2000):
        *known, other = random.normal(size=25)
        covered.append(other <= conformal_quantile(np.array(known), coverage))
    least, most = coverage, coverage + 1 / 25
    assert least - 0.03 < np.mean(covered) < most + 0.03
    assert conformal_quantile(np.ones(8), 0.9) == math.inf


def test_stragglers_that_are_harder_than_others_are_noticed_beyond_chance():
    labels = Risk(LABELS, needs_evidence=False)
    bars = Risk(Accuracy(tolerance=1.0), needs_evidence=False)
    assert labels.status()["harder"] is None
    for number in range(100):
        labels.add(row(0.1, wrong=number % 10 == 0), given=False)
        bars.add(row(math.nan, bound=0.1, excess=1.5 * (number % 10 == 0)), given=False)
    assert labels.hint is bars.hint is None, "exactly as many as were expected"
    assert labels.status()["harder"] == pytest.approx(1.0)
    for _ in range(25):
        labels.add(row(0.1, wrong=True), given=False)
        bars.add(row(math.nan, bound=0.1, excess=2.0), given=False)
    for each in (labels, bars):
        assert each.status()["harder"] == pytest.approx(35 / 12.5)
    assert "28 % of their labels would be wrong, 10 % were expected" in str(labels.hint)
    assert "28 % of their error bars are too short, 10 % were expected" in str(bars.hint)
