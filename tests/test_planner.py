"""The planner: what it promises is kept, by events drawn one by one and by fresh data."""

import collections
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import invoke
from scipy import stats

from nercc_jax import coded_inference, plan
from nercc_jax.inference import order_points
from nercc_jax.planning import Candidate, Plan
from nercc_jax.stragglers import (
    AbstractLatency,
    ExponentialLatency,
    Hedge,
    LogNormalLatency,
    ParetoLatency,
    TraceLatency,
    latency_law,
)
from nercc_jax.stragglers.draws import draw_latencies
from nercc_jax.stragglers.simulate import wait_for
from nercc_jax.surrogates import Surrogate
from nercc_models import find_points

QUERIES = 4
# Eight in a hundred calls take ten times as long; hardly two take the same time.
TAIL = TraceLatency(
    jnp.concatenate([jnp.linspace(0.05, 0.052, 1840), jnp.linspace(0.5, 0.52, 160)])
)


def _model(batch, xp=jnp):
    """Three labels along the line."""
    along = batch @ xp.array([0.5, -0.3, 0.8], xp.float32)
    return xp.stack([along, 0.4 - 0.1 * along**2, -along], axis=-1)


def _data(count, seed=0):
    """Data points near a line."""
    random = np.random.default_rng(seed)
    along = random.normal(size=(count, 1)) * np.array([0.5, -0.3, 0.8])
    return (along + 0.05 * random.normal(size=(count, 3))).astype(np.float32)


def _plan(key, latency: Any = TAIL, count=480, **options):
    options = {
        "layouts": ("chebyshev", "interleaved"),
        "max_workers": 6,
        "max_extra_work": 0.5,
        "max_disagreement": 0.02,
    } | options
    return plan(
        _model, _data(count), latency, key=key, num_queries=QUERIES, num_data=(4,), **options
    )


@pytest.fixture(scope="module")
def coded():
    return _plan(jax.random.key(3))


@pytest.fixture(scope="module")
def exact():
    return _plan(jax.random.key(3), max_disagreement=0.0)


# What is recommended.


@pytest.mark.slow
def test_everything_recommended_is_feasible_and_everything_faster_is_not(coded, exact):
    for found in (coded, exact):
        assert found.recommended.feasible(found.asked)
        for row in found.candidates:
            if row.p99 < 0.99 * found.recommended.p99 / 1.03:
                assert not row.feasible(found.asked)


# What is promised.


def _events(row, code, matrix, x, latency, random):
    """One batch of queries, event by event: seconds, and labels (-1 for lost ones)."""
    coded = matrix @ x
    near = np.abs(coded - x[:, None]).max(axis=-1) < 1e-5
    own = [np.flatnonzero(near[k]) for k in range(row.num_data)]
    draws = random.choice(latency, row.num_workers)
    events = sorted((t, n) for n, t in enumerate(draws))
    answered, responded, moment = {}, [], 0.0
    for t, n in events:
        if len(responded) >= row.wait_for and t > row.min_wait:
            break
        responded.append(n)
        moment = t
        answered |= {k: t for k in range(row.num_data) if n in own[k] and k not in answered}
        if len(answered) == row.num_data:
            break
    everything = len(answered) == row.num_data or len(responded) == row.num_workers
    end = moment if everything else max(moment, row.min_wait)
    labels = np.argmax(_model(x, np), axis=1)
    wanting = [k for k in range(row.num_data) if k not in answered]
    if not wanting:
        return end, labels
    made = np.full(row.num_data, -1)
    if row.points is not None:
        mask = np.isin(np.arange(row.num_workers), responded)
        made = np.asarray(_labels(code, _model(coded, np), mask))
    labels[wanting] = made[wanting]
    return end, labels


@jax.jit
def _labels(code, y, mask):
    return jnp.argmax(code.decode(y, mask), axis=-1)


def _simulate(row, batches=1000):
    random, latency = np.random.default_rng(9), np.asarray(TAIL.latencies)
    x = _data(QUERIES * batches, seed=5)
    if row.order is not None:
        x = x[np.asarray(order_points(x, row.num_data, buffer_size=QUERIES))]
    code = row.code
    matrix = np.asarray(code.encoder_matrix())
    seconds, wrong = [], []
    for start in range(0, len(x), QUERIES):
        batch = x[start : start + QUERIES]
        taken, labels = _events(row, code, matrix, batch, latency, random)
        seconds.append(taken)
        wrong.append(np.mean(labels != np.argmax(_model(batch, np), axis=1)))
    return np.array(seconds), np.array(wrong)


def _keeps(row, seconds, wrong):
    """The p99 by a binomial count of slower ones, the mean within four standard errors."""
    later = int(np.sum(seconds > 1.001 * row.p99))
    assert stats.binomtest(later, len(seconds), 0.01, alternative="greater").pvalue > 1e-3
    error = row.most_disagreement - row.disagreement.mean
    off = abs(wrong.mean() - row.disagreement.mean)
    assert off <= 2 * error + 4 * wrong.std() / np.sqrt(len(wrong))


@pytest.mark.slow
def test_the_recommended_code_keeps_its_promise_on_fresh_data(coded):
    row = coded.recommended
    seconds, wrong = _simulate(row)
    _keeps(row, seconds, wrong)
    assert wrong.mean() <= 0.02


@pytest.mark.slow
def test_replication_that_loses_tells_how_many(exact):
    rows = [r for r in exact.candidates if r.system == "replication" and not r.exact]
    row = max(rows, key=lambda row: row.disagreement.mean)
    assert row.disagreement.mean > 0.005
    _keeps(row, *_simulate(row))


# Time.


@pytest.mark.parametrize(("copies", "at_once"), [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)])
def test_hedging_is_as_the_formula_has_it(key, copies, at_once):
    """Exponential: P(T > t) by the copies that are out."""
    drawn = draw_latencies(ExponentialLatency(1.0), key, (copies, 200_000))
    there, sent, _ = Hedge(0.5, at_once).outcome(drawn[:1], drawn[1:])
    times = [0.5 * -(-number // at_once) for number in range(copies)]  # when each copy goes out
    for t in (0.3, 0.8, 1.7):
        out = sum(max(t - time, 0) for time in times)
        assert np.mean(there > t) == pytest.approx(np.exp(-out), abs=5e-3)
    late = [np.exp(-sum(max(time - earlier, 0) for earlier in times)) for time in times[1:]]
    assert np.mean(sent) == pytest.approx(1 + sum(late), abs=5e-3)


def test_where_no_call_is_late_every_system_is_shown_with_its_longest_wait(key):
    found = _plan(key, TraceLatency(jnp.full(50, 0.05)), 96)
    assert found.recommended.system == "uncoded"
    seen = collections.defaultdict(set)
    for row in found.candidates:
        waits, copies = (row.num_workers, row.wait_for), (row.copies, row.hedge_copies)
        seen[row.system].add(copies if row.system == "hedged" else waits)
    assert seen == {
        "uncoded": {(4, 4)},
        "hedged": {(2, 1), (3, 1), (3, 2)},
        "replication": {(5, 5), (6, 6)},
        "NeRCC chebyshev": {(5, 4), (6, 5)},
        "NeRCC interleaved": {(5, 4), (6, 5)},
    }


def test_an_odd_number_of_queries_is_not_halved_by_default(key):
    found = plan(
        _model, _data(40), TAIL, key=key, num_queries=5, max_workers=6, layouts=("chebyshev",)
    )
    assert {row.num_data for row in found.candidates} == {5}


def test_a_group_ends_when_every_data_point_has_an_answer_of_its_own():
    """Workers 0 and 2 run on the first data point, 1 and 3 on the second."""
    copies = np.array([[True, False, True, False], [False, True, False, True]])
    mask, end, own = wait_for(4, np.array([[0.3, 0.9, 2.0, 0.4]]), copies, 9.0)
    assert (end.tolist(), own.tolist()) == ([0.4], [[0.3, 0.4]])
    assert mask.tolist() == [[True, False, False, True]]


class RackLatency(AbstractLatency):
    """Racks of `size` workers, of which one in twenty is slow at a time."""

    size: int

    def sample(self, key, shape):
        *groups, workers = shape
        racks = jax.random.bernoulli(key, 0.05, (*groups, -(-workers // self.size)))
        return 0.05 + 0.45 * jnp.repeat(racks, self.size, axis=-1)[..., :workers]


@pytest.mark.slow
def test_a_law_may_slow_workers_together(key):
    """Four in one rack: all wait, or none does."""
    together, apart = (draw_latencies(RackLatency(size), key, (20_000, 4)) for size in (4, 1))
    for drawn, often in ((together, 0.05), (apart, 1 - 0.95**4)):
        assert np.isclose(np.mean(drawn), 0.05 + 0.45 * 0.05, rtol=0.05)
        assert abs(np.mean(drawn.max(axis=-1) > 0.4) - often) < 4 * np.sqrt(often / 20_000)
    # A code survives two slow workers, but not a rack of its own.
    plans = [_plan(key, latency=RackLatency(size), max_disagreement=0.05) for size in (1, 6)]
    p99 = [min(r.p99 for r in each.candidates if r.points) for each in plans]
    assert p99[0] < 0.4 < p99[1]


# The command.


def test_laws_by_name(tmp_path, key):
    for text, law in (
        ("lognormal:0.05:0.6", LogNormalLatency(0.05, 0.6)),
        ("exponential:0.1", ExponentialLatency(0.1)),
        ("exponential:0.1:0.02", ExponentialLatency(0.1, 0.02)),
        ("pareto:0.05:1.5", ParetoLatency(0.05, 1.5)),
    ):
        assert latency_law(text) == law
    draws = latency_law("stragglers:0.05:0.1:11").sample(key, (20_000,))
    assert np.mean(np.asarray(draws) > 0.3) == pytest.approx(0.1, abs=0.01)
    path = tmp_path / "trace.txt"
    path.write_text("0.1\n0.2\n")
    law: Any = latency_law(f"trace:{path}")
    np.testing.assert_allclose(law.latencies, [0.1, 0.2])
    for wrong in ("lognormal:1", "normal:1:2", "trace", "pareto:a:b", "lognormal"):
        with pytest.raises(ValueError, match="a law of latency is lognormal:MEDIAN:SIGMA"):
            latency_law(wrong)
    for wrong in ("stragglers:0:0.1:11", "stragglers:0.05:1.1:11", "stragglers:0.05:0.1:-1"):
        with pytest.raises(ValueError, match="must be positive, and the share between 0 and 1"):
            latency_law(wrong)


def test_a_plan_says_how_it_is_carried_out():
    def words(*numbers, **options):
        row = Candidate("a system", *numbers, **options)
        about = {"held_out_points": 8, "straggler_sets": 9, "seconds": 1}
        asked = {"num_queries": 4, "max_workers": 8, "max_extra_work": 1, "max_disagreement": 0.1}
        table, reason, further = str(Plan((), row, "it is fast", asked, about)).partition(
            "recommended: it is fast\n"
        )
        assert reason
        assert f"*  a system  ({numbers[1]}, {numbers[0]})" in table
        return further

    coded = words(4, 6, 5, 0.1, points="chebyshev")
    assert coded.startswith("decode when 5 of 6 workers have answered")
    assert "before 100 ms" in coded
    assert "again" not in coded
    assert "decode" not in words(4, 4, 4, 0.0)
    hedged = words(4, 4, 4, 0.0, copies=2, hedge_after=0.1)
    assert hedged.startswith("send up to 2 copies, 1 further after every 100 ms")
    assert "decode" not in hedged


def _cheap(x):
    """Nine of ten labels are the model's."""
    x = jnp.asarray(x)
    return _model(x) + jnp.where(x[:, :1] > 0.55, 1.0, 0.0) * jnp.array([-3.0, 0.0, 3.0])


def test_a_surrogate_tells_which_queries_go_out_twice(key):
    """A worker or two more for four queries: the promise is kept on data that planned nothing."""

    def doubting(x):  # unsure where it is wrong
        return _cheap(x) * jnp.where(jnp.asarray(x)[:, :1] > 0.55, 0.1, 2.0)

    found = _plan(key, count=1600, layouts=("interleaved",), surrogate=doubting)
    rows = [row for row in found.candidates if row.system == "copies of the uncertain"]
    best = min((row for row in rows if row.feasible(found.asked)), key=lambda row: row.p99)
    exact = [row.p99 for row in found.candidates if row.exact and row.feasible(found.asked)]
    assert best.p99 < 0.6 * min(exact)
    screened = [row for row in rows if not row.held_out]
    assert screened
    assert not any(row.feasible(found.asked) for row in screened), (
        "they were measured on what they were chosen by"
    )
    scheme, x = best.scheme(doubting), jnp.asarray(_data(4000, seed=5))
    own = np.argmax(np.asarray(_model(x)), axis=1)
    masks = np.random.default_rng(0).random((len(x) // QUERIES, best.num_workers)) >= 0.08
    wrong = {}
    alone = Surrogate(doubting, kappa=jnp.inf)
    for placed in ("uncertain", "code"):
        each = dataclasses.replace(scheme, surrogate=alone, redundancy=placed)
        run = coded_inference(_model, each)
        wrong[placed] = np.mean(np.argmax(np.asarray(run(x, masks)), axis=1) != own)
    assert wrong["uncertain"] <= best.most_disagreement <= 0.02
    assert wrong["uncertain"] < 0.5 * wrong["code"]
    with pytest.raises(ValueError, match="answers by a surrogate: give it"):
        best.scheme()


@pytest.mark.slow
def test_the_command_plans_as_python_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", _data(400))
    np.savetxt("trace.txt", np.asarray(TAIL.latencies))
    asked = "--latency trace:trace.txt --queries 4 --max-workers 6 --budget 0.5 --overhead-s 0"
    asked += " --max-disagreement 0.05 --layouts interleaved --output planned"
    model = f"{__name__}:_model"
    result = invoke("plan", "--model", model, "--inputs", "x.npy", *asked.split())
    assert result.exit_code == 0, result.output
    x = find_points(model, inputs="x.npy").shuffled("train", 2000, 0)
    latency = TraceLatency.from_file("trace.txt")
    options = {"max_workers": 6, "max_extra_work": 0.5, "max_disagreement": 0.05}
    layouts = {"layouts": ("interleaved",), "num_queries": 4}
    found = plan(_model, x, latency, key=jax.random.key(0), **options, **layouts)
    written = json.loads((tmp_path / "planned/plan.json").read_text())
    for name in ("candidates", "recommended", "reason", "asked"):
        assert written[name] == json.loads(json.dumps(dataclasses.asdict(found)[name])), name
    assert written["latency"] == "trace:trace.txt"
