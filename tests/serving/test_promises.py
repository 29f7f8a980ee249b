"""What a server promises, by what callers see of it: waiting, redundancy, late calls, health."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from batching import INTERLEAVED
from conftest import require
from traffic import OUT, SERVICE, SHAPE, WEIGHTS, Traffic, model

from nercc_jax import NeRCC, Replication, Uncoded
from nercc_jax.pools import Overdue
from nercc_jax.pools._times import AnswerTimes
from nercc_jax.risk._straggler_risk import AccuracyTarget
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, InferenceFailed
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator
from nercc_jax.serving.adapt._predictor import Predictor
from nercc_jax.serving.core._adaptation import Predictions
from nercc_jax.serving.core._request import Answer, ApproximateAnswer
from nercc_jax.testing import SimulatedClock, SimulatedPool


class KnowsAll(Predictor):
    """A surrogate that knows every answer, and is sure of all or none."""

    state = "answering"

    def __init__(self, sure):
        super().__init__()
        self.is_sure = sure

    def predict(self, x):
        sure = np.full(len(x), self.is_sure)
        doubt = np.where(sure, 0.0, 0.9)
        return Predictions(model(x), doubt, np.where(sure, 0.0, 1.0), sure)

    def add_answer(self, x, own):
        pass

    def admits(self, answer):
        return True

    def audit(self, given, own):
        return True


def calibrated(coder, target=None):
    """What the code's error is on this model: groups are no longer sent whole, to learn from."""
    estimator = ErrorEstimator(coder, target)
    calibrate(estimator)
    return estimator


def calibrate(estimator):
    x = np.random.default_rng(3).normal(size=(400, *SHAPE)).astype(np.float32)
    estimator.calibrate(lambda x: jnp.tanh(jnp.asarray(x) @ WEIGHTS), x)


@pytest.mark.parametrize("sure", [True, False])
def test_uncertain_redundancy_sends_coded_points_only_where_the_surrogate_doubts(sure):
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1, redundancy="uncertain")
    traffic = Traffic(KnowsAll(sure), policy, INTERLEAVED, share=0.0, estimator=calibrated)
    sent_as = traffic.send(100)
    assert all(reply.exact.all() for _, reply, _ in sent_as)
    # The code has as many coded points as queries. Of a group of one, none is ever sent.
    assert traffic.calls() == 100 if sure else traffic.calls() > 150


def test_a_group_leaves_when_its_oldest_query_has_waited_long_enough():
    """Whatever stands before it in the queue by its priority."""
    clock = SimulatedClock()
    pool = SimulatedPool(model, 8, seconds=lambda size: SERVICE, clock=clock)
    policy = BatchingPolicy(batch_wait_timeout_s=0.5, priority_lead_s=1.0, ordering=False)
    with CodedBatcher(pool, Coder(NeRCC(4, 8)), SHAPE, OUT, policy=policy) as batcher:
        x, futures = np.zeros((1, *SHAPE), np.float32), []
        for when, high in ((0.0, False), (0.3, True), (0.4, True)):
            clock.at(when, lambda high=high: futures.append(batcher.submit(x, high=high)))
        clock.run(3.0)
        waited = [future.result(0).queued for future in futures]
    assert waited == pytest.approx([0.5, 0.2, 0.1], abs=1e-3)


@pytest.mark.parametrize("tolerance", [0.05, 0.5])
def test_a_tolerance_is_kept_by_decoding_within_it_or_asking_again(tolerance):
    """Where a surrogate is never sure, and decoding mostly is far off."""
    policy = BatchingPolicy(straggler_threshold=1.4, tolerance=tolerance)
    target = AccuracyTarget(tolerance)
    traffic = Traffic(
        KnowsAll(False),
        policy,
        INTERLEAVED,
        share=0.15,
        estimator=lambda coder: calibrated(coder, target),
    )
    sent_as = traffic.send(600)
    assert sum(reply.reexecuted.sum() for _, reply, _ in sent_as) > 20
    decoded = [(reply, own) for _, reply, own in sent_as if not reply.exact[0]]
    assert (len(decoded) > 10) == (tolerance == 0.5)
    assert all(reply.expected_error[0] <= tolerance for reply, _ in decoded)
    errors = [np.sqrt(np.mean((reply.values - own) ** 2)) for reply, own in decoded]
    bars = [reply.expected_error[0] for reply, _ in decoded]
    assert np.sum(np.array(errors) > bars) <= 0.1 * len(decoded)


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
    policy = BatchingPolicy(deadline_s=3000.0, copies=1, ordering=False, max_batch_size=1)
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
    policy = BatchingPolicy(
        straggler_threshold=2.0, max_disagreement=0.1, ordering=False, max_batch_size=1
    )
    traffic = Traffic(KnowsAll(True), policy, Uncoded(1), share=0.0)
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
    predictor = KnowsAll(True)
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
    """Groups from before do not count, nor does what was decoded from them."""
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.3)
    traffic = Traffic(None, policy, INTERLEAVED, share=0.15, estimator=calibrated)
    assert any(not reply.exact.all() for _, reply, _ in traffic.send(150))
    adaptation = traffic.batcher._adaptation
    while not traffic.drifts:
        answer = Answer(np.eye(3, dtype=np.float32)[0], "decoded", 8, 7, disagreement=0.01)
        adaptation.risk("decoded").give()
        given = ApproximateAnswer(answer, None, adaptation.risk("decoded").epoch, given=True)
        adaptation.audit(given, np.eye(3, dtype=np.float32)[1])
    assert not adaptation.admits(answer, calibrated=True)
    sent_as = traffic.send(20)
    assert all(reply.exact.all() for _, reply, _ in sent_as)
    assert traffic.batcher.estimator.progress()[0] < 20, "of 256 that were known"
    status = traffic.batcher.status()["decoding"]
    assert status["drifts"] == 1
    assert status["admitted"] == 0
    # Other groups, whole ones, come with time; then what would be decoded is compared.
    calibrate(traffic.batcher.estimator)
    assert all(reply.exact.all() for _, reply, _ in traffic.send(20))
    traffic.send(300)
    assert traffic.batcher.status()["decoding"]["compared"] > 7
    assert any(not reply.exact.all() for _, reply, _ in traffic.send(200))


def test_a_new_rule_for_late_calls_knows_the_answers_so_far():
    times = AnswerTimes(Overdue(0.5, 3.0, floor=0.0))
    for number in range(20):
        times.add(1, 0.1 + 0.001 * number)
    rule = Overdue(0.9, 1.0, floor=0.0)
    other = times.under(rule)
    assert other.median(1) == times.median(1) == pytest.approx(0.11)
    assert other.limit(1) == pytest.approx(0.118), "the nine tenths of those twenty"
    assert times.limit(1) == pytest.approx(0.33)


def test_a_surrogate_that_sees_only_noise_is_equally_unsure_of_all():
    """What a regression makes of noise on its own samples is not there on others."""
    from nercc_jax.risk._error_probability import fit_error_probability_of_points

    random, spreads = np.random.default_rng(0), []
    for _ in range(8):
        features = np.column_stack([np.ones(150), random.normal(size=(150, 2))])
        wrong = random.random(150) < 0.3
        doubt = fit_error_probability_of_points(features, np.zeros(150, bool), wrong)
        spreads.append(np.std(np.asarray(doubt.of_features(jnp.asarray(features)))))
    assert np.mean(spreads) < 0.02


def test_a_call_by_grpc_has_as_long_as_draining_takes():
    """Longer than what the server keeps for last errors."""
    require("fastapi", "serve")
    grpc = require("grpc", "serve-test")
    from faces import Stub, message
    from in_process import Doubles, becomes, channel, serving
    from nercc_server import ENDS

    model = Doubles(at_once=False)
    with serving(model, grpc_port=0, drain_timeout_s=60.0) as server, channel(server) as there:
        request = message("digits", {"input": [[1.0, 2, 3, 4]]})
        future = Stub(there).ModelInfer.future(request, timeout=ENDS)
        becomes(lambda: model.asked)
        server.stop()
        timer = threading.Timer(3.5, model.may_answer.set)
        timer.start()
        begin = time.monotonic()
        assert future.code() is grpc.StatusCode.OK
        assert time.monotonic() - begin >= 3
        timer.join()
