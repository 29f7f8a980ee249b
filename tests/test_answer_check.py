"""The check of an answer: how many right ones look wrong to it, and how many wrong ones do."""

import dataclasses

import numpy as np
import pytest

from nercc_jax.risk._answer_check import fit_answer_check

ROWS, OUTPUTS = 4000, 5


def predicted(random, rows=ROWS, error=0.4):
    """Right answers, and a surrogate's predictions of them whose deviations are known."""
    right = random.normal(size=(rows, OUTPUTS)) * np.linspace(1, 2, OUTPUTS)
    deviation = error * random.uniform(0.5, 1.5, rows)
    mean = right + deviation[:, None] * random.normal(size=right.shape)
    return tuple(each.astype(np.float32) for each in (mean, deviation, right))


def share(check, mean, deviation, answers):
    return np.mean(check.suspicious(mean, deviation, answers))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_as_many_right_answers_look_wrong_as_is_stated(rate, labels):
    random = np.random.default_rng(0)
    found = []
    for seed in range(6):
        check = fit_answer_check(*predicted(random, 600), rate, labels=labels, seed=seed)
        found.append(share(check, *predicted(random)))
    assert np.mean(found) == pytest.approx(rate, abs=0.35 * rate)


def test_answers_of_other_queries_look_wrong():
    """With this surrogate the right answer is at some two deviations, others are at ten."""
    random = np.random.default_rng(1)
    check = fit_answer_check(*predicted(random, 1000, 0.2), 0.01, labels=True)
    mean, deviation, right = predicted(random, error=0.2)
    swapped = np.roll(right, 1, axis=0)
    other = swapped.argmax(axis=1) != right.argmax(axis=1)
    assert share(check, mean[other], deviation[other], swapped[other]) > 0.99
    assert share(check, mean, deviation, right + 5) > 0.99


def test_the_largest_residuals_look_wrong_whatever_the_regression_says():
    random, shares = np.random.default_rng(4), []
    for _ in range(6):
        check = fit_answer_check(*predicted(random, 1000), 0.04, labels=False, blatant=0.25)
        check = dataclasses.replace(check, weights=np.zeros_like(check.weights))  # all is right
        mean, deviation, right = predicted(random)
        wrong = check.suspicious(mean, deviation, right)
        shares.append(np.mean(wrong))
        ratios = np.mean((right - mean) ** 2, axis=1) / deviation**2
        assert np.median(ratios[wrong]) > np.quantile(ratios, 0.97)
        assert share(check, mean, deviation, np.roll(right, 1, axis=0)) > 0.9
    assert np.mean(shares) == pytest.approx(0.01, abs=0.003)


def test_what_lies_between_the_answers_that_there_are_looks_wrong():
    """On a circle, at four places: no prediction, size or correlation tells those between them."""
    random = np.random.default_rng(8)

    def placed(rows, turn):
        angle = (random.integers(4, size=rows) + turn) * np.pi / 2
        answers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        answers += 0.05 * random.normal(size=answers.shape)
        return np.zeros((rows, 2), np.float32), np.full(rows, 0.7, np.float32), np.float32(answers)

    check = fit_answer_check(*placed(1000, 0.0), 0.02, labels=False)
    assert share(check, *placed(ROWS, 0.0)) == pytest.approx(0.02, abs=0.01)
    assert share(check, *placed(ROWS, 0.5)) > 0.99


def test_it_finds_the_same_in_other_units():
    random = np.random.default_rng(7)
    known, fresh = predicted(random, 1000), predicted(random)
    noise = random.normal(size=fresh[2].shape).astype(np.float32)
    found = []
    for unit in map(np.float32, (0.01, 1, 100)):
        check = fit_answer_check(*(unit * each for each in known), 0.02, labels=False)
        mean, deviation, right = (unit * each for each in fresh)
        found.append(share(check, mean, deviation, right + unit * noise))
    assert 0.1 < found[1] < 0.9
    np.testing.assert_allclose(found, found[1], atol=0.01)


def test_answers_that_are_near_in_units_of_the_deviation_never_look_wrong():
    random = np.random.default_rng(6)
    check = fit_answer_check(*predicted(random, 1000), 0.01, labels=False)
    check = dataclasses.replace(check, limit=-np.inf)  # all others do
    mean, deviation, right = predicted(random)
    wrong = check.suspicious(mean, deviation, right)
    ratios = np.mean((right - mean) ** 2, axis=1) / deviation**2
    assert np.sum(~wrong) > 100
    assert ratios[~wrong].max() < 1.001 * ratios[wrong].min()


@pytest.mark.parametrize("size", [30, 1e3, 1e19, 1e38])
def test_answers_of_any_size_look_wrong(size):
    """They are far beyond all that the check was fitted to."""
    random = np.random.default_rng(5)
    check = fit_answer_check(*predicted(random, 1000), 0.01, labels=True)
    mean, deviation, right = predicted(random, 500)
    right[np.arange(500), random.integers(OUTPUTS, size=500)] = size
    assert share(check, mean, deviation, right) == 1


def test_a_surrogate_that_knows_nothing_still_finds_answers_that_no_query_has():
    random = np.random.default_rng(2)
    mean, deviation, right = predicted(random, 1000)
    nothing = np.zeros_like(mean), np.full_like(deviation, 1.5)
    check = fit_answer_check(*nothing, right, 0.02, labels=False)
    zeros, ones = np.zeros((ROWS, OUTPUTS), np.float32), np.full(ROWS, 1.5, np.float32)
    _, _, fresh = predicted(random)
    assert share(check, zeros, ones, fresh) == pytest.approx(0.02, abs=0.01)
    assert share(check, zeros, ones, 8 * fresh) > 0.9


def test_what_is_no_number_looks_wrong_and_too_few_answers_accuse_nothing():
    random = np.random.default_rng(3)
    data = predicted(random, 300)
    check = fit_answer_check(*data, 0.05, labels=True)
    mean, deviation, right = (each[:4].copy() for each in data)
    right[2, 1] = np.nan
    assert check.suspicious(mean, deviation, right)[2]
    few = fit_answer_check(*(each[:60] for each in data), 0.01, labels=True)
    assert share(few, *(each[:60] for each in data)) == 0


@pytest.mark.parametrize("outputs", [1, 2, 300])
def test_any_number_of_outputs(outputs):
    random = np.random.default_rng(4)
    right = random.normal(size=(400, outputs)).astype(np.float32)
    mean = right + 0.01 * random.normal(size=right.shape).astype(np.float32)
    deviation = np.full(400, 0.01, np.float32)
    check = fit_answer_check(mean, deviation, right, 0.02, labels=outputs > 2)
    assert share(check, mean, deviation, right) <= 0.05
    assert share(check, mean, deviation, np.roll(right, 1, axis=0)) > 0.8
