"""Workers that answer wrongly before a server that checks: found, answered by others, fenced."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from traffic import OUT, WEIGHTS, Traffic, labels_right

from nercc_jax import DevicePool, RayPool, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor

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


def test_errors():
    with pytest.raises(ValueError, match="check_answers needs a predictor"):
        Traffic(None, BatchingPolicy(check_answers=0.01))


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
