"""Answers from what is known: when they are given, how right they are, and when they stop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from traffic import OUT, SERVICE, SHAPE, WEIGHTS, KnowsAll, Traffic, labels_right, model

from nercc_jax import DevicePool, RayPool, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.stragglers import TraceLatency
from nercc_jax.surrogates import principal_components


def turned(x):
    """Another one: every label is the next one's."""
    return np.roll(model(x), 1, axis=-1)


def test_stragglers_are_answered_as_soon_as_they_are_noticed():
    predictor = Predictor()
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1))
    early = traffic.send(300)
    assert (predictor.state, predictor.share) == ("learning", 0)
    assert not any(reply.predicted[0] for _, reply, _ in early)
    assert labels_right(early) == 1
    traffic.send(700)  # until enough stragglers were compared
    assert predictor.state == "answering"
    before, replies = traffic.calls(), traffic.send(500)
    seconds = np.array([seconds for seconds, *_ in replies])
    predicted = [each for each in replies if each[1].predicted[0]]
    assert traffic.observed["predict_seconds"] >= len(predicted)
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
    ids=["right", "wrong"],
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


@pytest.mark.parametrize("late", [10 * SERVICE, 1e4], ids=["straggles", "hangs"])
def test_what_was_given_is_compared_with_the_own_answer_to_the_same_query(late):
    """What hangs until its worker is replaced, long after groups are kept, is computed again."""
    predictor = KnowsAll(lambda x: [True] * len(x), off=1e-3)
    policy = BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1, max_batch_size=8)
    traffic = Traffic(predictor, policy)
    traffic.pool_seconds = lambda size: SERVICE
    traffic.send(50)
    traffic.pool_seconds = lambda size: late if traffic.random.random() < 0.1 else SERVICE
    replies = traffic.send(100)
    predicted = sum(bool(reply.predicted[0]) for _, reply, _ in replies)
    assert predicted > 4
    assert (len(traffic.audited) < predicted) == (late == 1e4)
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


def test_a_predictor_has_one_batcher():
    used = Predictor()
    Traffic(used, BatchingPolicy(max_disagreement=0.1))
    with pytest.raises(ValueError, match="another batcher's"):
        Traffic(used, BatchingPolicy(max_disagreement=0.1))


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


# -- Workers that answer wrongly before a server that checks ---------------------------------------


# After these calls of each worker, some 600 queries, the learner knows enough.
LATER = range(80, 10**6)


class Net(eqx.Module):
    """As `traffic.model`, with parameters that a fault can change."""

    w: np.ndarray

    def __call__(self, x):
        return np.tanh(x @ self.w)


def jax_net():
    """The same for real workers; Ray's actors need not import it."""

    class JaxNet(eqx.Module):
        w: jax.Array

        def __call__(self, x):
            return jnp.tanh(x @ self.w)

    return JaxNet(jnp.asarray(WEIGHTS))


def served(*faults, workers=8, **options):
    policy = BatchingPolicy(
        straggler_threshold=4.0,
        max_disagreement=0.1,
        check_answers=0.01,
        max_batch_size=4,
    )
    return Traffic(
        Predictor(),
        policy,
        share=0.0,
        rate=100,
        model=Net(WEIGHTS),
        num_workers=workers,
        faults=Faults(faults, seed=3),
        **options,
    )


def fenced(traffic):
    return sorted(map(int, traffic.batcher.status()["checks"]["fenced"]))


def states(traffic):
    return [worker.state for worker in traffic.pool.report().workers]


@pytest.mark.slow
def test_without_faults_nobody_is_fenced_and_hardly_a_call_is_made_twice():
    traffic = served()
    assert labels_right(traffic.send(600)) == 1
    assert traffic.batcher.status()["checks"]["ready"]
    before = traffic.calls(), traffic.observed["check_again"]
    replies = traffic.send(1000)
    assert traffic.observed["check_again"] - before[1] < 0.03 * 1000
    assert not any(reply.suspicious.any() for _, reply, _ in replies)
    assert fenced(traffic) == []
    assert traffic.observed["check_wrong"] == 0
    # As fast as the service, but for what is computed twice.
    assert np.quantile([seconds for seconds, *_ in replies], 0.9) < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("calls", [None, LATER], ids=["from the first", "later"])
def test_swapped_answers_are_fenced_and_no_wrong_label_goes_out(calls):
    traffic = served(
        Fault("swap", workers=(2,), calls=calls), Fault("swap", workers=(5,), calls=calls)
    )
    replies = traffic.send(1400)
    assert fenced(traffic) == [2, 5]
    assert [states(traffic)[worker] for worker in (2, 5)] == ["fenced", "fenced"]
    assert traffic.observed["worker_fenced"] == 2
    assert labels_right(replies) >= 0.995
    sent = [call.worker for call in traffic.pool.calls()][-300:]
    assert labels_right(traffic.send(700)) == 1
    assert not {2, 5} & {*sent}
    reasons = traffic.batcher.status()["checks"]["fenced"].values()
    assert all("answers were not those of two other workers" in reason for reason in reasons)


def test_a_fenced_worker_that_is_replaced_is_released():
    traffic = served(Fault("swap", workers=(5,)), Fault("death", workers=(5,), calls=(4,)))
    traffic.send(200)
    traffic.clock.run(traffic.clock.now() + 60)
    times = traffic.pool.report().deaths
    assert times == traffic.observed["worker_fenced"] == traffic.observed["worker_released"] > 0
    assert fenced(traffic) == []
    assert "fenced" not in states(traffic)


@pytest.mark.slow
def test_no_more_are_fenced_than_the_policy_allows_and_the_status_says_so(caplog):
    traffic = served(Fault("swap", workers=(1, 4, 6)))
    traffic.send(300)
    status = traffic.batcher.status()["checks"]
    assert len(status["fenced"]) == status["max_fenced"] == 2
    assert len(status["not_fenced"]) == 1
    assert sum("no more may be fenced" in record.message for record in caplog.records) == 1
    # Its answers are computed again, one and all; two that swap rows alike confirm each other.
    assert labels_right(traffic.send(200)) >= 0.99


def test_an_answer_that_nobody_confirms_goes_out_in_time_and_says_so():
    """The other worker hangs."""
    hang = Fault("hang", workers=(1,), calls=range(2, 100))
    traffic = served(hang, workers=2, hang_timeout=1e4)
    traffic.settle = 20.0
    replies = traffic.send(6)
    assert max(seconds for seconds, *_ in replies) < 10
    late = [reply for seconds, reply, _ in replies if seconds > 8]
    assert late
    assert all(reply.suspicious.all() and reply.exact.all() for reply in late)
    assert traffic.observed["check_open"] == len(late)
    assert traffic.observed["request_deadline"] == 0


class FirstOnly(Predictor):
    """Knows that answers are twice their queries, if a query's first number is positive."""

    checks_answers = True

    def __init__(self):
        super().__init__()
        self.learned = []

    def suspicious(self, x, own):
        return np.any(own != 2 * x[:, :3], axis=1) & (x[:, 0] > 0)

    def add_answer(self, x, own):
        self.learned.append((x, own))


def known_first(**options):
    policy = BatchingPolicy(max_disagreement=0.1, check_answers=0.01, max_batch_size=4)
    predictor = FirstOnly()
    model = {"share": 0.0, "num_workers": 4, "model": lambda x: 2 * x[:, :3]}
    return predictor, Traffic(predictor, policy, **model | options)


def send_requests(traffic, number):
    """Send requests of four queries at once, the first of which is known; return the replies."""
    x = traffic.random.uniform(0.5, 1, (number, 4, 4)).astype(np.float32)
    x[:, 1:, 0] *= -1
    futures = [traffic.batcher.submit(each, deadline=10.0) for each in x]
    traffic.clock.run(traffic.clock.now() + 30.0)
    return x, [future.result(0) for future in futures]


def test_the_rest_of_a_request_that_came_with_an_outvoted_answer_is_computed_by_others():
    """All answers of one call are wrong, of which only the first looks so."""
    swap = Faults([Fault("swap", workers=(1,), calls=(6,))])
    predictor, traffic = known_first(faults=swap)
    x, replies = send_requests(traffic, 40)
    values = np.stack([reply.values for reply in replies])
    np.testing.assert_array_equal(values, 2 * x[:, :, :3])
    assert not any(reply.suspicious.any() for reply in replies)
    assert traffic.observed["check_wrong"] == 4
    learned, own = map(np.stack, zip(*predictor.learned, strict=True))
    assert len(learned) == 160
    np.testing.assert_array_equal(own, 2 * learned[:, :3])


def test_requests_of_several_queries_get_all_their_answers():
    traffic = served(Fault("swap", workers=(7,)))
    futures = []
    x = traffic.random.normal(size=(40, 6, 4)).astype(np.float32)
    for place, each in enumerate(x):
        traffic.clock.at(place / 20, lambda each=each: futures.append(traffic.batcher.submit(each)))
    traffic.clock.run(5.0)
    replies = [future.result(0) for future in futures]
    values = np.concatenate([reply.values for reply in replies])
    assert values.shape == (240, *OUT)
    right = np.isclose(values, np.tanh(x.reshape(-1, 4) @ WEIGHTS), atol=1e-5).all(axis=1)
    suspicious = np.concatenate([reply.suspicious for reply in replies])
    assert right[~suspicious].all()
    assert suspicious.sum() <= 5
    assert not suspicious[60:].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["devices", "ray"])
def test_on_real_workers(kind):
    """One of eight threads, or of four processes, swaps answers; the others serve everybody."""
    options: dict = {"example": [np.zeros((size, 4), np.float32) for size in (1, 2, 4)]}
    number = 8
    if kind == "ray":
        require("ray", "ray")
        options["address"] = "local"
        number = 4
    faults = Faults([Fault("swap", workers=(2,))], seed=3)
    policy = BatchingPolicy(max_disagreement=0.1, check_answers=0.01, max_batch_size=4)
    x = np.random.default_rng(0).normal(size=(1000, 1, 4)).astype(np.float32)
    right = np.tanh(x[:, 0] @ WEIGHTS)
    with (
        {"devices": DevicePool, "ray": RayPool}[kind](
            jax_net(), number, faults=faults, **options
        ) as pool,
        CodedBatcher(
            pool, Coder(Uncoded(1)), (4,), OUT, policy=policy, predictor=Predictor()
        ) as batcher,
    ):
        exact = 0
        for part in np.split(np.arange(len(x)), 50):
            replies = [batcher.submit(x[place], deadline=30.0) for place in part]
            for place, reply in zip(part, replies, strict=True):
                found = reply.result(60.0)
                if found.suspicious[0]:
                    assert place < 200
                elif found.exact[0]:  # a straggler's query may have the learner's answer
                    np.testing.assert_allclose(found.values[0], right[place], atol=1e-4)
                    exact += 1
        assert exact > 800
        assert [*batcher.status()["checks"]["fenced"]] == ["2"]
        assert [worker.state for worker in pool.report().workers].count("fenced") == 1
