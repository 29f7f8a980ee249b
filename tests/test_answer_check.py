"""The check of an answer: how many right ones look wrong to it, and how many wrong ones do."""

import dataclasses

import numpy as np
import pytest

from nercc_jax.risk.votes import fit_answer_check

ROWS, OUTPUTS = 4000, 5


def predicted(random, rows=ROWS, error=0.4, outputs=OUTPUTS):
    """Right answers, and a surrogate's predictions of them whose deviations are known."""
    right = random.normal(size=(rows, outputs)) * np.linspace(1, 2, outputs)
    deviation = error * random.uniform(0.5, 1.5, rows)
    mean = right + deviation[:, None] * random.normal(size=right.shape)
    return tuple(each.astype(np.float32) for each in (mean, deviation, right))


def unknown(random, rows=ROWS):
    """The same without a surrogate that knows anything."""
    mean, deviation, right = predicted(random, rows)
    return np.zeros_like(mean), np.full_like(deviation, 1.5), right


def placed(random, rows=ROWS, turn=0.0):
    """On a circle, at four places: no prediction, size or correlation tells those between them."""
    angle = (random.integers(4, size=rows) + turn) * np.pi / 2
    answers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    answers += 0.05 * random.normal(size=answers.shape)
    return np.zeros((rows, 2), np.float32), np.full(rows, 0.7, np.float32), np.float32(answers)


def swapped(mean, deviation, right):
    """Answers of other queries that have another label."""
    other = np.roll(right, 1, axis=0)
    differs = other.argmax(axis=1) != right.argmax(axis=1)
    return mean[differs], deviation[differs], other[differs]


def beyond(size):
    """Answers far beyond all that the check was fitted to."""

    def change(mean, deviation, right):
        right = right.copy()
        right[np.arange(len(right)), np.arange(len(right)) % OUTPUTS] = size
        return mean, deviation, right

    return change


def as_it_is(*answers):
    return answers


# What is known, what is judged and how its answers are changed; the least and largest share found.
CASES = {
    "other queries'": (lambda r, n=ROWS: predicted(r, n, 0.2), None, swapped, 0.99, 1),
    "all off": (predicted, None, lambda m, d, y: (m, d, y + 5), 0.99, 1),
    "between those that there are": (placed, lambda r: placed(r, turn=0.5), as_it_is, 0.99, 1),
    "at those that there are": (placed, None, as_it_is, 0.005, 0.03),
    "right ones of the unknown": (unknown, None, as_it_is, 0.01, 0.03),
    "eightfold ones of the unknown": (unknown, None, lambda m, d, y: (m, d, 8 * y), 0.9, 1),
    **{f"of size {n:g}": (predicted, None, beyond(n), 1, 1) for n in (30, 1e3, 1e19, 1e38)},
    "no numbers": (predicted, None, beyond(np.nan), 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_answers_look_wrong(case):
    known, judged, change, least, most = CASES[case]
    random = np.random.default_rng(1)
    check = fit_answer_check(
        *known(random, 1000), 0.02, labels=change is swapped or case.startswith("of size")
    )
    found = np.mean(check.suspicious(*change(*(judged or known)(random))))
    assert least <= found <= most


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_as_many_right_answers_look_wrong_as_is_stated(rate, labels):
    random, found = np.random.default_rng(0), []
    for seed in range(6):
        check = fit_answer_check(*predicted(random, 600), rate, labels=labels, seed=seed)
        found.append(np.mean(check.suspicious(*predicted(random))))
    assert np.mean(found) == pytest.approx(rate, abs=0.35 * rate)


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
        assert np.mean(check.suspicious(*swapped(mean, deviation, right))) > 0.9
    assert np.mean(shares) == pytest.approx(0.01, abs=0.003)


def test_it_finds_the_same_in_other_units():
    random = np.random.default_rng(7)
    known, fresh = predicted(random, 1000), predicted(random)
    noise = random.normal(size=fresh[2].shape).astype(np.float32)
    found = []
    for unit in map(np.float32, (0.01, 1, 100)):
        check = fit_answer_check(*(unit * each for each in known), 0.02, labels=False)
        mean, deviation, right = (unit * each for each in fresh)
        found.append(np.mean(check.suspicious(mean, deviation, right + unit * noise)))
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


@pytest.mark.parametrize("outputs", [1, 2, 300])
def test_any_number_of_outputs(outputs):
    data = predicted(np.random.default_rng(4), 400, 0.01, outputs)
    check = fit_answer_check(*data, 0.02, labels=outputs > 2)
    assert np.mean(check.suspicious(*data)) <= 0.05
    assert np.mean(check.suspicious(*data[:2], np.roll(data[2], 1, axis=0))) > 0.8
    few = fit_answer_check(*(each[:60] for each in data), 0.01, labels=outputs > 2)
    assert not few.suspicious(*data).any(), "too few answers accuse nothing"
