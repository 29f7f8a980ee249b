"""Hedged calls: when they are made and cancelled, what they cost, and what they learn."""

import asyncio
import concurrent.futures
import random

import numpy as np
import pytest

from nercc_jax import hedge


class AtOnce(concurrent.futures.ThreadPoolExecutor):
    """Runs what it is given at once."""

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer: seconds take no time."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.set_default_executor(AtOnce())
        select = self._selector.select

        def jump(timeout=None):
            if not (found := select(0)) and timeout:
                self.now += timeout
            return found

        self._selector.select = jump

    def time(self):
        return self.now


def run(main):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Traffic:
    """Requests at random times to targets that take a second, or ten by `slow(target, request)`."""

    def __init__(self, slow, targets=("a", "b"), **options):
        self.slow, self.random = slow, random.Random(1)
        self.hedged = hedge(self.call, targets, **options)
        self.seconds, self.flying, self.cancelled = [], 0, 0

    async def call(self, *where):
        *target, request = where
        self.flying += 1
        try:
            usual = self.random.gauss(1, 0.02)
            await asyncio.sleep(10 * usual if self.slow(*target, request) else usual)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.flying -= 1

    async def send(self, number, rate=4.0):
        async def one(request):
            begin = asyncio.get_running_loop().time()
            await self.hedged(request)
            self.seconds.append(asyncio.get_running_loop().time() - begin)

        begun = []
        for request in range(number):
            begun.append(asyncio.create_task(one(request)))
            await asyncio.sleep(self.random.expovariate(rate))
        await asyncio.gather(*begun)


def sent(traffic, number, before=1500):
    """What so many requests took and cost, after others that it learned from."""

    async def main():
        await traffic.send(before)
        counts = dict(traffic.hedged.counts)
        traffic.seconds.clear()
        await traffic.send(number)
        return {name: end - counts[name] for name, end in traffic.hedged.counts.items()}

    counts = run(main())
    assert counts["hedges"] == counts["calls"] - counts["requests"]
    return np.array(traffic.seconds) / np.median(traffic.seconds or 1), counts


def test_it_learns_when_to_hedge_and_keeps_the_budget():
    draw = random.Random(0)
    traffic = Traffic(lambda target, request: draw.random() < 0.05, budget=1.1)
    seconds, counts = sent(traffic, 3000)
    assert 1.04 < counts["calls"] / 3000 < 1.1
    assert 0.9 < counts["won"] / counts["hedges"] <= 1
    assert np.quantile(seconds, 0.99) < 2.5, "10 without"
    # Losers are cancelled, but for one in ten.
    assert 0.8 < traffic.cancelled / traffic.hedged.counts["hedges"] < 0.98
    assert traffic.flying == 0
    assert min(traffic.hedged.status()["weights"]) >= 0.5


def test_a_budget_that_is_too_small_is_kept_all_the_same():
    draw = random.Random(0)
    traffic = Traffic(lambda request: draw.random() < 0.2, targets=None, budget=1.05)
    _, counts = sent(traffic, 1000)
    assert 1.04 < counts["calls"] / 1000 < 1.05 + 10 / 1000


def test_copies_that_are_as_slow_are_not_sent_until_they_help():
    slow, draw = set(random.Random(0).sample(range(3000), 150)), random.Random(0)
    traffic = Traffic(lambda target, request: request in slow)
    _, counts = sent(traffic, 2000, before=1000)
    assert counts["calls"] / 2000 < 1.02
    assert not traffic.hedged.status()["hedging"]
    traffic.slow = lambda target, request: draw.random() < 0.05
    seconds, _ = sent(traffic, 1000, before=5000)
    assert traffic.hedged.status()["hedging"]
    assert np.quantile(seconds, 0.99) < 2.5


def test_first_calls_go_to_the_target_that_is_slow_less_often():
    draw, often = random.Random(0), ["b"]
    traffic = Traffic(lambda target, request: target in often and draw.random() < 0.1)
    seconds, counts = sent(traffic, 2000, before=2000)
    assert np.quantile(seconds, 0.99) < 1.5
    assert traffic.hedged.status()["weights"] == [1, 1 / 32]
    assert counts["calls"] / 2000 < 1.1
    # What has changed is noticed.
    often[:] = "a"
    sent(traffic, 0, before=5000)
    assert traffic.hedged.status()["weights"][0] < 0.5
    assert traffic.hedged.status()["weights"][1] > 1 / 8


def test_a_target_that_hangs_or_fails_is_left():
    async def main(broken):
        async def call(target):
            await asyncio.sleep(1)
            if target == "b":
                await broken()
            return target

        hedged, failed = hedge(call, "abc", budget=1.2), 0
        for _ in range(400):
            try:
                await asyncio.wait_for(hedged(), 60)
            except (RuntimeError, TimeoutError):
                failed += 1
        return failed, hedged.status()

    async def fail():
        raise RuntimeError("b")

    failed, status = run(main(asyncio.Event().wait))
    assert failed < 25, "133 if all got as many"
    assert status["weights"][1] <= 1 / 8
    failed, status = run(main(fail))
    assert failed < 60
    assert status["weights"][1] <= 1 / 8


async def learned(number=40, **options):
    """A hedged call to two targets that learned on seconds; it does as its argument says."""

    async def call(target, does):
        return await does(target)

    async def usual(target):
        await asyncio.sleep(1.0)

    hedged = hedge(call, ["a", "b"], budget=2.0, **options)
    for _ in range(number):
        await hedged(usual)
    return hedged


def test_a_second_call_goes_to_another_target_and_the_first_answer_counts():
    async def main():
        hedged, asked = await learned(), []

        async def does(target):
            asked.append(target)
            await asyncio.sleep(10 if len(asked) == 1 else 1)
            return target

        answer = await hedged(does)
        assert sorted(asked) == ["a", "b"]
        assert answer == asked[1]
        assert hedged.counts == {"requests": 41, "calls": 42, "hedges": 1, "won": 1}

    run(main())


def test_a_call_that_fails_leaves_it_to_the_other_and_the_first_error_is_raised():
    async def main():
        hedged, asked = await learned(), []

        def failing(*numbers):
            asked.clear()

            async def does(target):
                asked.append(target)
                await asyncio.sleep(5 if len(asked) == 1 else 1)
                if (number := len(asked) and asked.index(target)) in numbers:
                    raise ValueError(f"number {number}")
                return number

            return does

        assert await hedged(failing(0)) == 1
        assert await hedged(failing(1)) == 0
        with pytest.raises(ValueError, match="number 0"):
            await hedged(failing(0, 1))

        async def at_once(target):
            asked.append(target)
            raise ValueError("no such question")

        asked.clear()
        with pytest.raises(ValueError, match="no such question"):
            await hedged(at_once)
        assert len(asked) == 1, "failures are not repeated"

    run(main())


def test_a_request_that_is_cancelled_cancels_its_calls():
    async def main():
        hedged, ended = await learned(), []

        async def does(target):
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                ended.append(target)
                raise

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hedged(does), 5)
        await asyncio.sleep(0)
        assert sorted(ended) == ["a", "b"]

    run(main())


def test_requests_at_a_time_are_spread_by_the_calls_in_hand():
    async def main():
        asked = []

        async def call(target):
            asked.append(target)
            await asyncio.sleep(100 if target == "a" else 0.1)

        hedged = hedge(call, ["a", "b"])
        begun = [asyncio.create_task(hedged())]
        for _ in range(30):
            await asyncio.sleep(0.2)
            begun.append(asyncio.create_task(hedged()))
        await asyncio.gather(*begun)
        assert asked.count("a") < 10

    run(main())


def test_prometheus_counts():
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(run(learned(name="ask")))
    assert registry.get_sample_value("ask_requests_total") == 40
    assert registry.get_sample_value("ask_hedges_total") == 0
    assert "ask_won_total 0.0" in prometheus.generate_latest(registry).decode()
