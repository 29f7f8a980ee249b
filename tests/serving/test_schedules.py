"""Random schedules under a simulated clock: whatever happens, and in whichever order, holds.

A schedule is a seed: requests that come alone and together, with and without deadlines,
exact ones, some cancelled; workers that are slow, hang, die, raise, answer NaN, or answer when they
have long been replaced. After each event the books of batcher and pool are counted anew. A seed
that fails fails again: `python tests/serving/test_schedules.py 7 8` plays number 7.
"""

import functools
import random
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from traffic import INTERLEAVED, OUT, SHAPE, KnowsAll, by_margin, model

from nercc_jax import Berrut, Replication, Uncoded
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.serving import (
    BatchingPolicy,
    CodedBatcher,
    Coder,
    DeadlineExceeded,
    InferenceFailed,
    QueueFull,
)
from nercc_jax.serving.adapt import _setting_controller
from nercc_jax.stragglers.picking import Picking
from nercc_jax.stragglers.simulate import RecordedCalls
from nercc_jax.testing import SimulatedClock, SimulatedPool

REPLAY_FEW = functools.partial(RecordedCalls.replay, least=3)
SECONDS = 0.02  # that an answer takes
HANG = 1.0  # seconds until a worker is replaced
# Seconds by which a turn may come after what it is due for: a group is looked at a little later.
LATE = 1e-3
CODES = (
    Uncoded(1),
    Replication(1, 2),
    Replication(3, 6),
    INTERLEAVED,
    Berrut(3, 6, points="interleaved"),
)


class Checks(KnowsAll):
    """One that is sure of every other query, and sees that what comes is of the same query."""

    OFF = 2e-3

    def __init__(self):
        KnowsAll.__init__(self, lambda x: x[:, 1] > 0, self.OFF, model)

    def add_answer(self, x, own):
        assert np.allclose(model(x[None])[0], own, atol=1e-6), "a lesson about another query"


def make_coders():
    return [Coder(code) for code in CODES]


@pytest.fixture(scope="module")
def coders():
    return make_coders()


def draw_faults(draw):
    """What goes wrong, and how often: sometimes nothing, sometimes nearly everything."""
    each = []
    for kind in ("error", "nan", "hang", "death"):
        if draw.random() < 0.4:
            each.append(Fault(kind, draw.choice([0.02, 0.2, 0.6])))
    return Faults(each, seed=draw.randrange(2**31))


class Schedule:
    """One life of a batcher, and all that its callers see."""

    def __init__(self, seed, coders):
        # Python's: NumPy's takes twenty times as long for one number of a list.
        self.draw = draw = random.Random(seed)
        self.inputs = np.random.default_rng(seed)
        self.coder = draw.choice(coders)
        self.clock, self.slow = SimulatedClock(), draw.choice([0.0, 0.1, 0.6])
        self.pool = SimulatedPool(
            model,
            draw.randint(1, 8),
            seconds=self.seconds,
            clock=self.clock,
            faults=draw_faults(draw),
            start_seconds=draw.choice([0.0, 0.3, 3.0]),
            overdue=Overdue(factor=1.5, least=5),
            max_attempts=draw.randint(1, 3),
            hang_timeout=HANG,
        )
        self.predicts = draw.random() < 0.4
        self.policy = BatchingPolicy(
            max_batch_size=4,  # for which decoders are compiled, once for all schedules
            batch_wait_timeout_s=draw.choice([0.0, 0.05]),
            max_queue_size=draw.choice([6, 200]),
            deadline_s=draw.choice([0.3, 5.0]),
            outputs="logits",
            max_disagreement=0.01 if self.predicts else draw.choice([None, 0.01]),
            redundancy=draw.choice(["always", "uncertain"]) if self.predicts else "always",
            copies=draw.randint(1, 3),
            max_calls=1.5 if draw.random() < 0.3 else None,
        )
        self.seen = {"internal_error": 0}
        self.batcher = CodedBatcher(
            self.pool,
            self.coder,
            SHAPE,
            OUT,
            policy=self.policy,
            decoding=by_margin(self.coder),
            predictor=Checks() if self.predicts else None,
            observe=self.observe,
        )
        audit = self.batcher._approximations.audit

        def audited(given, own):
            if given.source == "predicted" and own is not None:
                value = given.value - Checks.OFF
                assert np.allclose(value, own, atol=1e-6), "an audit of another query"
            return audit(given, own)

        self.batcher._approximations.audit = audited
        self.submitted = []
        self.ended = []  # a number of a request each time that one ends
        self.checked = 0  # of those, how many were looked at

    def seconds(self, size):
        """Of a call: most take as long as others, some longer, few until they are given up."""
        usual = SECONDS * (1 + size / 8)
        if self.draw.random() >= self.slow:
            return usual
        longest = 5 * SECONDS if self.draw.random() < 0.8 else 2 * HANG
        return usual + self.draw.uniform(0, longest)

    def observe(self, what, number):
        if what in self.seen:
            self.seen[what] += number

    def plan(self):
        """Requests at random times, in bursts, and who goes away again."""
        draw, when = self.draw, 0.0
        pauses = [0.0, SECONDS / 3, 1.0]
        for pause in draw.choices(pauses, [0.5, 0.45, 0.05], k=draw.randint(1, 24)):
            when += pause * draw.random()
            self.clock.at(when, self.come)

    def come(self):
        draw = self.draw
        (size,) = draw.choices([1, 2, 7], [0.8, 0.15, 0.05])
        x = self.inputs.normal(size=(size, *SHAPE))
        number, arrived = len(self.submitted), self.clock.now()
        (deadline,) = draw.choices([self.policy.deadline_s, 0.05, 2.0], [0.7, 0.1, 0.2])
        ways = {"exact": draw.random() < 0.2}
        try:
            future = self.batcher.submit(x.astype(np.float32), deadline=deadline, **ways)
        except QueueFull:
            return
        self.submitted.append((x.astype(np.float32), future, arrived + deadline, ways["exact"]))
        future.add_done_callback(lambda future: self.ended.append(number))
        if draw.random() < 0.1:
            self.clock.at(arrived + draw.choice([0.0, SECONDS]), future.cancel)

    def run(self):
        # What is picked, if something is, changes every few queries.
        with (
            mock.patch.object(_setting_controller, "PICKING", Picking(every=3)),
            mock.patch.object(RecordedCalls, "replay", REPLAY_FEW),
        ):
            self._run()

    def _run(self):
        self.plan()
        end = 20.0  # all deadlines, and all that is kept to hear stragglers, are over by then
        while self.clock.next <= end:
            self.clock.step()
            if self.checked < len(self.ended):
                self.check_answers()
            if self.clock.next > self.clock.now():  # all that is to happen at this moment has
                self.check_books()
        self.check_end()
        self.batcher.close()
        self.pool.close()

    def check_answers(self):
        """One end each, the model's own answers to its own queries, no later than promised."""
        assert len(set(self.ended)) == len(self.ended), "a request ended twice"
        for number in self.ended[self.checked :]:
            x, future, end, exact = self.submitted[number]
            if future.cancelled():
                continue
            assert self.clock.now() <= end + LATE, "it came after its deadline"
            if (error := future.exception()) is not None:
                assert isinstance(error, DeadlineExceeded | InferenceFailed)
                assert not str(error).startswith("internal"), error
                continue
            reply = future.result()
            own = model(x)
            assert np.array_equal(reply.values[reply.exact], own[reply.exact]), "swapped"
            guessed = own[reply.predicted] + Checks.OFF
            assert np.allclose(reply.values[reply.predicted], guessed, atol=1e-6), "swapped"
            assert not (reply.predicted & reply.exact).any()
            assert np.isfinite(reply.values).all()
            assert reply.exact.all() or not exact
        self.checked = len(self.ended)

    def check_books(self):
        batcher, schedule, now = self.batcher, self.pool._schedule, self.clock.now()
        assert not self.seen["internal_error"]
        assert not self.pool.report().internal_errors
        for request in batcher._requests:
            assert now <= request.arrived + request.deadline + LATE, "forgotten at its deadline"
        # The queue.
        lanes = batcher._requests
        stand = [*lanes.queue]
        waiting = [query for query in stand if query.waiting]
        assert lanes.waiting == len(waiting), "the queue's count is wrong"
        assert not any(query.done for query in waiting)
        assert not waiting or not self.pool.idle, "a query waits beside an idle worker"
        # The scheduler.
        slots = schedule.slots
        idle = {w for w, seat in enumerate(slots) if seat.ready and seat.task is None}
        assert set(schedule.available) == idle
        busy = [seat for seat in schedule.slots if seat.task is not None]
        assert all(now <= seat.since + HANG + LATE for seat in busy), "it hangs, and nobody saw"
        running = [seat.task for seat in busy]
        for batch in schedule.batches:
            fresh = [
                seat.task
                for seat in schedule.slots
                if seat.task is not None and seat.task.batch is batch and not seat.overdue
            ]
            open_ = {task for task in fresh if not task.settled}
            assert batch.pending == sum(fresh.count(task) >= task.wanted for task in open_)
            for task in batch.tasks.values():
                assert task.running == running.count(task)

    def check_end(self):
        batcher, schedule = self.batcher, self.pool._schedule
        assert len(self.ended) == len(self.submitted), "a request was forgotten"
        assert all(request.own == "probe" for request in batcher._requests)
        if batcher.in_flight:
            return  # it still asks whether somebody answers
        assert not batcher._dispatcher.groups
        assert not batcher.waiting
        assert not schedule.batches


def play(seeds, coders):
    for seed in seeds:
        try:
            Schedule(seed, coders).run()
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error


def test_a_few_schedules(coders):
    play(range(25), coders)


@pytest.mark.slow
def test_many_schedules():
    """In a process of its own, as users run it: without types checked at every call.

    Schedules 400 to 1000 took no line of serving, pools or testing after another one than the first
    400 had. Ten thousand by hand: `python tests/serving/test_schedules.py 0 10000`.
    """
    command = [sys.executable, __file__, "0", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    play(range(*map(int, sys.argv[1:])), make_coders())
