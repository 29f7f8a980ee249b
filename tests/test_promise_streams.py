"""Promises about stragglers' answers, kept over generated streams through the one class.

Each stream is drawn twelve times. A straggler's decoded answer has features, which say something of
its error; it is given out where `Risk` admits it, and compared later. Scores are learned from what
was compared, as on a server without a calibration.
"""

import math

import numpy as np
import pytest

from nercc_jax.risk import Accuracy, Comparison, Risk
from nercc_jax.serving.adapt._decoding import Compared, DecodingScores

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


def play(stream, seed, accuracy):
    """What was given out, and whether it missed the promise, of a stream of stragglers."""
    random, last = np.random.default_rng(seed), np.zeros(3)
    scores, risk = DecodingScores(accuracy), Risk(accuracy, needs_evidence=True)
    compared, due, missed = [], 32, []
    for place in range(LENGTH):
        last, sign = stream(random, place, last)
        margin, rough, variance = last
        features = np.array([1, *last, 0], np.float32)
        odds = -1.2 + sign * (rough + variance - 1.3 * margin)
        wrong = bool(random.random() < 1 / (1 + math.exp(-odds)))
        error = 0.3 * math.exp(sign * (rough + variance)) * abs(random.normal())
        score = scores.of(4)
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
        compared.append(Compared(features, wrong, error))
        if len(compared) >= due:
            due += max(due // 2, 32)
            scores, shown = scores.learn(compared, None)
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
