"""Answers from what is known: when they are given, how right they are, and when they stop."""

import jax.numpy as jnp
import numpy as np
import pytest
from traffic import SERVICE, SHAPE, WEIGHTS, KnowsAll, Traffic, labels_right, model

from nercc_jax.pools import Fault, Faults
from nercc_jax.serving import BatchingPolicy, Predictor
from nercc_jax.stragglers import TraceLatency
from nercc_jax.surrogates import principal_components


def turned(x):
    """Another one: every label is the next one's."""
    return np.roll(model(x), 1, axis=-1)


def test_stragglers_are_answered_as_soon_as_they_are_noticed():
    predictor = Predictor()
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1))
    early = traffic.send(300)
    assert predictor.state == "learning"
    assert not any(reply.predicted[0] for _, reply, _ in early)
    assert labels_right(early) == 1
    traffic.send(700)  # until enough stragglers were compared
    assert predictor.state == "answering"
    before, replies = traffic.calls(), traffic.send(500)
    seconds = np.array([seconds for seconds, *_ in replies])
    predicted = [each for each in replies if each[1].predicted[0]]
    # A tenth straggles, most of which is known: hardly a call more, and few wait for another.
    assert len(predicted) > 25
    assert traffic.calls() - before < 520
    assert np.quantile(seconds, 0.98) < 1.5 * SERVICE
    assert labels_right(predicted) >= 0.9
    for _, reply, _ in predicted:
        assert not reply.exact[0]
        assert 0 < reply.expected_disagreement[0] < 1
        assert reply.expected_error[0] > 0
    # Exact ones are the model's own, whatever is known.
    assert not any(reply.predicted[0] for _, reply, _ in traffic.send(60, exact=True))


def test_when_the_world_changes_nothing_is_predicted_until_it_is_known_anew():
    predictor = Predictor()
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1))
    traffic.send(900)
    assert predictor.share > 0.5
    traffic.model = turned
    replies = traffic.send(200)
    assert traffic.observed["drift"] >= 1
    assert predictor.status()["drifts"] == traffic.observed["drift"]
    wrong = sum(reply.values[0].argmax() != own.argmax() for _, reply, own in replies)
    assert wrong <= 12, "of twenty stragglers; what was given out stops within 100 queries"
    traffic.send(700)
    assert predictor.state == "answering"
    assert labels_right(traffic.send(200)) >= 0.97


@pytest.mark.parametrize(
    ("student", "answers"),
    [
        (lambda x: jnp.tanh(x @ WEIGHTS) + 0.01, True),
        (lambda x: 3 * jnp.roll(jnp.tanh(x @ WEIGHTS), 1, axis=-1), False),
    ],
)
def test_a_student_answers_once_it_has_shown_that_it_is_right(student, answers):
    predictor = Predictor(student)
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.05))
    assert not any(reply.predicted[0] for _, reply, _ in traffic.send(120))
    traffic.send(600)  # until enough stragglers were compared
    replies = traffic.send(250)
    assert any(reply.predicted[0] for _, reply, _ in replies) == answers
    assert labels_right(replies) >= 0.99
    assert (predictor.share > 0.9) == answers


def test_parameters_that_tell_less_than_others_do_not_hide_what_is_known():
    x = np.random.default_rng(0).uniform(-1, 1, (512, 8)).astype(np.float32)
    y = np.sin(x @ (2.0 / 2.0 ** np.arange(8)))[:, None].astype(np.float32)
    predictor = Predictor()
    Traffic(predictor, BatchingPolicy(tolerance=0.05), shape=(8,), out=(1,))
    for place in range(0, len(x), 32):
        predictor.learn(x[place : place + 32], y[place : place + 32])
    found = predictor.predict(x)
    assert found is not None
    assert np.mean(found.recovered) > 0.9


def test_late_answers_audit_what_was_given_to_the_same_query():
    predictor = KnowsAll(off=1e-3)
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1, max_batch_size=8)
    traffic = Traffic(predictor, policy)
    traffic.send(200)
    assert len(traffic.audited) > 4
    assert max(traffic.audited) < 2e-3


def test_what_hangs_is_computed_elsewhere_to_be_compared():
    """The calls of a tenth hang until their workers are replaced, long after groups are kept."""
    predictor = KnowsAll(lambda x: [True] * len(x), off=1e-3)
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1))
    traffic.pool_seconds = lambda size: SERVICE
    traffic.send(50)
    traffic.pool_seconds = lambda size: 1e4 if traffic.random.random() < 0.1 else SERVICE
    replies = traffic.send(100)
    predicted = sum(bool(reply.predicted[0]) for _, reply, _ in replies)
    assert predicted > 4
    assert len(traffic.audited) < predicted
    traffic.pool_seconds = lambda size: SERVICE
    traffic.clock.run(traffic.clock.now() + 100)
    assert len(traffic.audited) == predicted
    assert np.max(traffic.audited) < 2e-3


def by_difficulty(slow, delay):
    """Traffic whose hardest queries are slow, and so are their copies."""

    def score(batch):
        top = np.sort(model(np.asarray(batch)), axis=-1)
        return top[:, -1] - top[:, -2] <= slow

    latency = TraceLatency(jnp.array([delay]))
    faults = Faults([Fault("delay", latency=latency, score=score, least_score=1.0)])
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1)
    traffic = Traffic(Predictor(), policy, rate=60, share=0.0, faults=faults)
    traffic.settle = 4 * delay
    return traffic


@pytest.mark.slow
@pytest.mark.parametrize("delay", [10 * SERVICE, 3.0])
def test_queries_that_are_slow_because_they_are_hard_keep_the_promise(delay):
    """However late their own answers come: groups are kept for a second."""
    traffic = by_difficulty(0.02, delay)
    predictor, replies = traffic.batcher._approximations.predictor, traffic.send(2000)
    traffic.clock.run(traffic.clock.now() + 10)
    predicted = [(reply, own) for _, reply, own in replies if reply.predicted[0]]
    wrong = sum(reply.values[0].argmax() != own.argmax() for reply, own in predicted)
    assert wrong <= 0.1 * len(predicted) + 10
    evidence = predictor.status()["stragglers"]
    assert evidence["compared"] > 40
    assert evidence["pending"] == evidence["unknown"] == 0
    x = traffic.random.normal(size=(2000, *SHAPE)).astype(np.float32)
    usual = np.mean(predictor.predict(x).predictions.argmax(-1) != np.asarray(model(x)).argmax(-1))
    assert evidence["disagreement"] > usual


def test_answers_wake_a_learner_that_has_to_wait_once_and_not_one_by_one():
    """Each time another thread would take the interpreter from those who answer."""
    wakes, predictor = [], Predictor()
    traffic = Traffic(None, BatchingPolicy(max_disagreement=0.1))
    predictor.attach(traffic.batcher._setup, lambda: wakes.append(1))
    for query in np.random.default_rng(0).normal(size=(200, *SHAPE)).astype(np.float32):
        predictor.add_answer(query, model(query))
    assert len(wakes) == 1


def test_arguments():
    with pytest.raises(ValueError, match="max_disagreement, or with a tolerance"):
        Traffic(Predictor(), BatchingPolicy())
    used = Predictor()
    Traffic(used, BatchingPolicy(max_disagreement=0.1))
    with pytest.raises(ValueError, match="another batcher's"):
        Traffic(used, BatchingPolicy(max_disagreement=0.1))
    for alone in ({"tolerance": 0.1}, {"redundancy": "uncertain"}):
        with pytest.raises(ValueError, match="predictor"):
            Traffic(None, BatchingPolicy(**alone))


def test_principal_components_are_those_of_the_covariance():
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 6)) @ random.normal(size=(6, 6))
    for rows in (x, x[:5]):
        found = principal_components(rows.astype(np.float32), 3)
        deviations = rows - rows.mean(axis=0)
        values, vectors = np.linalg.eigh(deviations.T @ deviations)
        np.testing.assert_allclose(
            np.abs(np.asarray(found.directions)), np.abs(vectors[:, ::-1][:, :3]), atol=1e-4
        )
        np.testing.assert_allclose(
            np.sum(np.asarray(found(jnp.asarray(rows, jnp.float32))) ** 2, axis=0),
            values[::-1][:3],
            rtol=1e-3,
        )
    assert principal_components(x[:3].astype(np.float32)).directions.shape == (6, 2)


def test_a_promise_of_nothing_wrong_is_kept_by_giving_nothing_out():
    predictor = Predictor(lambda x: jnp.tanh(x @ WEIGHTS))  # however good it is
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.0))
    replies = traffic.send(260)
    assert not any(reply.predicted[0] for _, reply, _ in replies)
    assert labels_right(replies) == 1
    assert predictor.share == 0
