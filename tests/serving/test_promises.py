"""What a server promises, by what callers see of it: waiting, redundancy, late calls, health."""

import gc

import jax.numpy as jnp
import numpy as np
import pytest
from traffic import INTERLEAVED, OUT, SERVICE, SHAPE, WEIGHTS, KnowsAll, Traffic, model

from nercc_jax import Berrut, NeRCC, Replication, Uncoded
from nercc_jax.pools import Batch
from nercc_jax.pools.batch import Task
from nercc_jax.risk import Accuracy
from nercc_jax.serving import (
    BatchingPolicy,
    CodedBatcher,
    Coder,
    DecodingScores,
    InferenceFailed,
    Predictor,
    calibrate_decoding,
)
from nercc_jax.serving.core._group import Group
from nercc_jax.serving.core._request import Answer, Query, Request
from nercc_jax.testing import SimulatedClock, SimulatedPool


def knows(sure):
    """A surrogate that is sure of all or none."""
    return KnowsAll(lambda x: [sure] * len(x))


def calibrated(coder, accuracy, name="model"):
    """Scores of the code's decoded answers on this model."""
    size, function = {
        "model": (400, lambda x: jnp.tanh(x @ WEIGHTS)),
        "revenue": (2000, lambda x: (jnp.tanh(x @ HIDDEN / 2) @ LAST)[:, 0].astype(jnp.float32)),
    }[name]
    x = np.random.default_rng(3).normal(size=(size, *SHAPE)).astype(np.float32)
    return calibrate_decoding(coder, lambda x: function(jnp.asarray(x)), x, accuracy)


@pytest.mark.parametrize("sure", [True, False])
def test_uncertain_redundancy_sends_coded_points_only_where_the_surrogate_doubts(sure):
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1, redundancy="uncertain")
    decoding = lambda coder: calibrated(coder, policy.accuracy)  # noqa: E731
    traffic = Traffic(knows(sure), policy, INTERLEAVED, share=0.0, decoding=decoding)
    sent_as = traffic.send(100)
    assert all(reply.exact.all() for _, reply, _ in sent_as)
    # The code has as many coded points as queries. Of a group of one, none is ever sent.
    assert traffic.calls() == 100 if sure else traffic.calls() > 150


def test_without_a_promise_decoded_answers_are_compared_and_nothing_is_learned_from_them():
    """They have no features. Once, learning failed after 32 of them, and was logged as an error."""
    options = {"share": 0.15, "rate": 600, "num_workers": 128}
    traffic = Traffic(None, BatchingPolicy(straggler_threshold=1.4), INTERLEAVED, **options)
    traffic.send(600)  # which fails at an internal error
    assert traffic.observed["audit_same"] + traffic.observed["audit_other"] > 40


def test_a_slow_model_is_well_for_as_long_as_its_answers_take():
    """Answers take ten seconds: four of silence are no trouble, five answers' time is."""
    clock, answering = SimulatedClock(), [True]
    pool = SimulatedPool(
        model,
        4,
        seconds=lambda size: 10.0 if answering[0] else 1e4,
        clock=clock,
        hang_timeout=1e5,
    )
    policy = BatchingPolicy(deadline_s=3000.0, copies=1, max_batch_size=1)
    with CodedBatcher(pool, Coder(Uncoded(1)), SHAPE, OUT, policy=policy) as batcher:
        x = np.zeros((1, *SHAPE), np.float32)
        for _ in range(30):
            batcher.submit(x)
            clock.run(clock.now() + 11.0)
        answering[0] = False
        batcher.submit(x)
        begin = clock.now()
        clock.run(begin + 4.0)
        assert batcher.health().ready
        clock.run(begin + 49.0)
        assert batcher.health().ready
        clock.run(begin + 51.0)
        assert not batcher.health().ready
        assert batcher.health().live
        assert "no answer for" in str(batcher.health().trouble)


def seconds_of_a_straggler(traffic, **options):
    """How long a query takes whose first call straggles: until that is late, and what follows."""
    whole, first = traffic.pool_seconds, [10 * SERVICE]
    traffic.pool_seconds = lambda size: first.pop() if first else SERVICE
    ((seconds, _, _),) = traffic.send(1, **options)
    traffic.pool_seconds = whole
    return seconds


@pytest.mark.parametrize("fails", ["raises", "is no number"])
def test_answers_that_fail_leave_the_limits_of_late_calls_as_they_are(fails):
    """However quickly they fail: of predicted queries as of those that are sent again."""
    policy = BatchingPolicy(straggler_threshold=2.0, max_disagreement=0.1, max_batch_size=1)
    traffic = Traffic(knows(True), policy, Uncoded(1), share=0.0)
    ways = ({"exact": False}, {"exact": True})
    traffic.send(100)
    traffic.send(100, exact=True)
    before = [seconds_of_a_straggler(traffic, **way) for way in ways]
    assert before == pytest.approx([2 * SERVICE, 3 * SERVICE], rel=0.1)

    def broken(x):
        if fails == "raises":
            raise RuntimeError("out of order")
        return np.full((len(x), *OUT), np.nan, np.float32)

    traffic.model, whole, seconds = broken, traffic.model, traffic.pool_seconds
    traffic.pool_seconds = lambda size: SERVICE / 50
    failed = []
    for _ in range(100):  # with three calls each
        future = traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32), exact=True)
        traffic.clock.run(traffic.clock.now() + SERVICE)
        failed.append(future.exception(0))
    assert all(isinstance(error, InferenceFailed) for error in failed)
    traffic.model, traffic.pool_seconds = whole, seconds
    assert [seconds_of_a_straggler(traffic, **way) for way in ways] == pytest.approx(
        before, rel=0.1
    )


def test_what_was_predicted_before_a_drift_is_not_given_out_after_it():
    """Predictions are looked up when a query goes out, if its redundancy depends on them."""
    predictor = knows(True)
    policy = BatchingPolicy(straggler_threshold=2.0, max_disagreement=0.1, redundancy="uncertain")
    traffic = Traffic(predictor, policy, Replication(1, 2), share=0.0)
    traffic.send(50)
    traffic.share = 1.0
    future = traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32))
    traffic.clock.run(traffic.clock.now() + SERVICE)
    predictor.state = "drifted"
    traffic.clock.run(traffic.clock.now() + 20 * SERVICE)
    assert future.result(0).exact.all()


def test_nothing_is_decoded_after_a_drift_until_new_stragglers_were_compared():
    """The calibration's limit does not count, nor does what was decoded before."""
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.3)
    known = lambda coder: calibrated(coder, policy.accuracy)  # noqa: E731
    traffic = Traffic(None, policy, INTERLEAVED, share=0.15, decoding=known)
    assert any(not reply.exact.all() for _, reply, _ in traffic.send(150))
    learned = traffic.batcher._approximations
    while not traffic.observed["drift"]:
        learned.decoded.give()
        kept = {"epoch": learned.decoded.epoch, "given": True}
        label = np.eye(3, dtype=np.float32)[0]
        given = Answer(label, "decoded", 8, 7, disagreement=0.01, **kept)
        learned.audit(given, np.eye(3, dtype=np.float32)[1])
    risk = learned.decoded
    assert not risk.admits(given.disagreement, given.error)
    status = traffic.batcher.status()["decoding"]
    assert (status["drifts"], status["compared"], status["admitted"]) == (1, 0, 0)
    # What would be decoded is compared, until there is enough evidence.
    replies = traffic.send(300)
    first = next(place for place, (_, reply, _) in enumerate(replies) if not reply.exact.all())
    assert first > 3
    assert traffic.batcher.status()["decoding"]["compared"] > 7


# Outputs that are values: no label says anything about them, so only a tolerance lets any out.

HIDDEN, LAST = (np.random.default_rng(0).normal(size=shape) for shape in ((4, 3), (3, 2)))


def predict(x):  # smooth, two outputs, neither of which is a score
    return (np.tanh(np.asarray(x) @ HIDDEN / 2) @ LAST).astype(np.float32)


def revenue(x):
    return predict(x)[:, 0]


FUNCTIONS = {"revenue": (revenue, ()), "predict": (predict, (2,)), "model": (model, OUT)}


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


@pytest.mark.parametrize(
    ("name", "tolerance", "known", "number"),
    [
        ("revenue", 0.7, "decoding", 1500),
        ("predict", 0.1, "learner", 1500),
        # A surrogate that is never sure, and decoding that is mostly far off.
        ("model", 0.05, "decoding", 600),
        ("model", 0.5, "decoding", 600),
    ],
)
def test_a_tolerance_is_kept_by_answers_within_it_or_asking_again(name, tolerance, known, number):
    """Bars hold of a coverage of 0.95, so that nine of ten hold of some hundred, too."""
    policy = BatchingPolicy(straggler_threshold=1.4, tolerance=tolerance, coverage=0.95)
    options = {"predictor": Predictor()}
    if known == "decoding":
        options = {"decoding": lambda coder: calibrated(coder, policy.accuracy, name)}
        options |= {"predictor": knows(False), "rate": 150} if name == "model" else {}
    served = traffic_of(name, policy, **options)
    replies = served.send(number)
    errors, bars, predicted = approximate(replies)
    assert (len(errors) > 10) == (tolerance != 0.05)
    assert predicted == (known == "learner")
    assert (bars <= tolerance).all()
    assert np.sum(errors > bars) <= 0.1 * len(errors)
    if name == "model":
        assert sum(reply.reexecuted.sum() for _, reply, _ in replies) > 20
    elif known == "decoding":
        assert served.batcher.status()["decoding"]["drifts"] == 0


@pytest.mark.parametrize(
    ("name", "policy", "exact"),
    [
        ("revenue", {}, True),
        ("predict", {}, True),
        ("predict", {"outputs": "values"}, True),
        ("predict", {"outputs": "logits"}, False),
        ("predict", {"outputs": "probabilities"}, False),
        ("predict", {"max_disagreement": 1.0}, False),
    ],
)
def test_outputs_are_values_unless_something_says_that_they_are_scores_of_labels(
    name, policy, exact
):
    """Without a tolerance all answers to values are exact."""
    traffic = traffic_of(name, BatchingPolicy(straggler_threshold=1.4, **policy))
    replies = traffic.send(400)
    assert all(reply.exact.all() for _, reply, _ in replies) == exact
    if exact:
        assert sum(reply.reexecuted.sum() for _, reply, _ in replies) > 20
        # Redundancy of a code that may decode nothing is not sent either.
        calls, traffic.share = traffic.calls(), 0.0
        traffic.send(100)
        assert traffic.calls() - calls == 100


@pytest.mark.parametrize(
    ("policy", "out", "code", "why"),
    [
        ({"tolerance": 0.2}, OUT, INTERLEAVED, "decoding was calibrated for a tolerance of"),
        ({"outputs": "logits"}, (), INTERLEAVED, "one number a row"),
        ({"outputs": "probabilities"}, (1,), INTERLEAVED, "one number a row"),
        ({"max_disagreement": 0.1}, (), INTERLEAVED, "these are values"),
        ({"max_disagreement": 0.1, "outputs": "values"}, OUT, INTERLEAVED, "these are values"),
        ({"tolerance": 0.1, "max_disagreement": 0.1}, OUT, INTERLEAVED, "these are values"),
        ({"tolerance": 0.1, "outputs": "logits"}, OUT, INTERLEAVED, "a tolerance is for"),
        ({"coverage": 1.0, "tolerance": 0.1}, OUT, INTERLEAVED, "(?s)coverage.*less than 1"),
        ({"tolerance": 0.1}, OUT, Uncoded(1), "a tolerance needs error bars.*predictor"),
        ({"tolerance": 0.1}, OUT, Berrut(4, 8, points="interleaved"), "Berrut has none"),
        ({"redundancy": "uncertain"}, OUT, Uncoded(1), "redundancy 'uncertain' needs a predictor"),
        ({"check_answers": 0.01}, OUT, Uncoded(1), "check_answers needs a predictor"),
        ({}, OUT, NeRCC(4, 8), "mixes all queries"),
        ({}, OUT, Berrut(3, 5), "mixes all queries"),
        ({"outputs": "logits"}, OUT, Predictor(), "max_disagreement, or with a tolerance"),
    ],
)
def test_policies_that_do_not_fit_the_rest_are_refused(policy, out, code, why):
    pool = SimulatedPool(model, 8, seconds=lambda size: 0.05)
    # Scores for another tolerance than any of these.
    options = {"decoding": DecodingScores(Accuracy(tolerance=0.1)) if "calibrated" in why else None}
    if isinstance(code, Predictor):
        options["predictor"], code = code, Uncoded(1)
    with pytest.raises(ValueError, match=why):
        CodedBatcher(pool, Coder(code), SHAPE, out, policy=BatchingPolicy(**policy), **options)


# -- What is over goes by itself: to look for garbage stops all threads ----------------------------


KEPT = Request, Query, Group, Batch, Task


def living():
    # By type: `isinstance` asks each object for its class, and some of torch's warn when asked.
    return sum(type(each) in KEPT for each in gc.get_objects())


@pytest.mark.parametrize("code", [Uncoded(1), Replication(1, 2)], ids=("hedged", "twice"))
def test_what_is_over_goes_without_a_look_for_garbage(code, untyped):
    # From Python 3.13 on, the run-time type checks themselves keep what they saw.
    policy = BatchingPolicy(straggler_threshold=1.5, max_disagreement=0.5, deadline_s=1.0)
    traffic = Traffic(None, policy, code)
    gc.collect()
    before = living()
    gc.disable()
    try:
        traffic.send(50)
        future = traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32))
        assert future.cancel()
        traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32), deadline=SERVICE / 2)
        assert living() > before, "two are under way"
        traffic.clock.run(traffic.clock.now() + 60.0)  # the last deadline, too
        assert living() == before
    finally:
        gc.enable()
    traffic.batcher.close()
    traffic.pool.close()
