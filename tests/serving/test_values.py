"""Outputs that are values: no label says anything about them, so only a tolerance lets any out."""

import numpy as np
import pytest
from batching import INTERLEAVED
from traffic import OUT, SHAPE, Traffic, model

from nercc_jax import Berrut, NeRCC, Uncoded
from nercc_jax.risk._straggler_risk import AccuracyTarget
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator
from nercc_jax.testing import SimulatedPool

HIDDEN, LAST = (np.random.default_rng(0).normal(size=shape) for shape in ((4, 3), (3, 2)))


def predict(x):  # smooth, two outputs, neither of which is a score
    return (np.tanh(np.asarray(x) @ HIDDEN / 2) @ LAST).astype(np.float32)


def revenue(x):
    return predict(x)[:, 0]


FUNCTIONS = {"revenue": (revenue, ()), "predict": (predict, (2,))}


def approximate(replies):
    """Errors and bars of the answers that are not the model's own, and whether any is predicted."""
    found = [(reply, own) for _, reply, own in replies if not reply.exact[0]]
    errors = [np.sqrt(np.mean((reply.values[0] - own[0]) ** 2)) for reply, own in found]
    bars = [reply.expected_error[0] for reply, _ in found]
    assert all(np.isnan(reply.expected_disagreement[0]) for reply, _ in found)
    return np.array(errors), np.array(bars), any(reply.predicted[0] for reply, _ in found)


def traffic_of(name, policy, predictor=None, **options):
    function, out = FUNCTIONS[name]
    options = {"rate": 600, "num_workers": 128} | options  # groups are full
    made = Traffic(predictor, policy, INTERLEAVED, out=out, stated=False, share=0.15, **options)
    made.model = function
    return made


@pytest.mark.parametrize("name", ["revenue", "predict"])
def test_without_a_tolerance_all_answers_to_values_are_exact(name):
    traffic = traffic_of(name, BatchingPolicy(straggler_threshold=1.4))
    replies = traffic.send(400)
    assert all(reply.exact.all() for _, reply, _ in replies)
    assert sum(reply.reexecuted.sum() for _, reply, _ in replies) > 20
    (hint,) = traffic.batcher.hints()
    assert "values" in hint
    assert "all answers are exact" in hint
    assert traffic.batcher.status()["outputs"]["read_as"] == "values"
    # Redundancy of a code that may decode nothing is not sent either.
    calls = traffic.calls()
    traffic.share = 0.0
    traffic.send(100)
    assert traffic.calls() - calls == 100


@pytest.mark.parametrize(("name", "predicts"), [("revenue", False), ("predict", True)])
def test_bars_hold_and_none_is_beyond_the_tolerance(name, predicts):
    """Of a coverage of 0.95, so that nine of ten hold of some hundred, too."""
    tolerance = 0.1 if predicts else 0.7
    policy = BatchingPolicy(straggler_threshold=1.4, tolerance=tolerance, coverage=0.95)
    traffic = traffic_of(name, policy, Predictor() if predicts else None)
    assert traffic.batcher.status()["outputs"] == {"read_as": "values", "why": "as set"}
    errors, bars, predicted = approximate(traffic.send(2000))
    assert len(errors) > 40
    assert predicted == predicts
    assert bars.max() <= tolerance
    assert np.mean(errors <= bars) >= 0.9
    status = traffic.batcher.status()["decoding"]
    assert status["drifts"] == 0


def test_scores_are_read_from_the_models_own_answers_before_anything_approximate():
    """A classifier's: its logits have one winner in each row."""

    def classify(x):
        largest = x[:, :3] == x[:, :3].max(axis=1, keepdims=True)
        return (np.where(largest, 4, -4) + x[:, :3]).astype(np.float32)

    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.3)
    busy = {"rate": 600, "num_workers": 128}  # groups are full
    traffic = Traffic(None, policy, INTERLEAVED, stated=False, share=0.15, **busy)
    traffic.model = classify
    first = traffic.send(200)
    assert all(reply.exact.all() for _, reply, _ in first)
    assert "were looked at" in traffic.batcher.hints()[0]
    assert traffic.batcher.status()["outputs"]["read_as"] is None
    later = traffic.send(2000)
    assert traffic.batcher.status()["outputs"]["read_as"] == "scores"
    assert not all(reply.exact.all() for _, reply, _ in later)


@pytest.mark.parametrize(
    ("policy", "out", "code", "why"),
    [
        ({"outputs": "logits"}, (), INTERLEAVED, "one number a row"),
        ({"max_disagreement": 0.1}, (), INTERLEAVED, "these are values"),
        ({"max_reexecution": 0.1}, (), INTERLEAVED, "these are values"),
        ({"max_disagreement": 0.1, "outputs": "values"}, OUT, INTERLEAVED, "these are values"),
        ({"tolerance": 0.1, "max_disagreement": 0.1}, OUT, INTERLEAVED, "these are values"),
        ({"tolerance": 0.1, "outputs": "logits"}, OUT, INTERLEAVED, "a tolerance is for"),
        ({"coverage": 1.0, "tolerance": 0.1}, OUT, INTERLEAVED, "coverage must be in"),
        ({"tolerance": 0.1}, OUT, Uncoded(1), "a tolerance needs error bars"),
        ({"tolerance": 0.1}, OUT, Berrut(4, 8, points="interleaved"), "Berrut has none"),
        ({"outputs": "values"}, OUT, NeRCC(4, 8), "send each of them twice"),
    ],
)
def test_limits_that_do_not_fit_the_outputs_are_refused(policy, out, code, why):
    pool = SimulatedPool(model, 8, seconds=lambda size: 0.05)
    with pytest.raises(ValueError, match=why):
        CodedBatcher(pool, Coder(code), SHAPE, out, policy=BatchingPolicy(**policy))


def test_an_estimator_of_another_tolerance_is_refused():
    coder = Coder(INTERLEAVED)
    estimator = ErrorEstimator(coder, AccuracyTarget(0.1))
    pool = SimulatedPool(model, 8, seconds=lambda size: 0.05)
    policy = BatchingPolicy(tolerance=0.2)
    with pytest.raises(ValueError, match="the estimator is for a tolerance of"):
        CodedBatcher(pool, coder, SHAPE, OUT, policy=policy, estimator=estimator)
