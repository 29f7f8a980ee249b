"""From when on an answer is late: running times by the size of the batch."""

import math

import pytest

from nercc_jax.pools import Overdue
from nercc_jax.pools._times import AnswerTimes


def seen(overdue=None, **sizes):
    """Times of which each size was seen often: `seen(s8=1.0)` is 8 data points in a second."""
    times = AnswerTimes(overdue or Overdue(0.5, 1.5, least=4))
    for name, seconds in sizes.items():
        for _ in range(4):
            times.add(int(name[1:]), seconds)
    return times


def test_a_size_has_its_own_limit():
    """The longest of any size would let a straggler of one query wait as long as 64 take."""
    times = seen(s1=0.1, s64=4.0)
    assert (times.median(1), times.median(64)) == (0.1, 4.0)
    assert times.limit(1) == pytest.approx(0.15)
    assert times.limit(64) == pytest.approx(6.0)


def test_a_size_that_is_new_is_bounded_by_others():
    """No longer than a larger one, nor in proportion than a smaller one."""
    times = seen(s2=0.1, s16=0.4)
    assert times.median(1) == pytest.approx(0.1)
    assert times.median(3) == pytest.approx(0.15)
    assert times.median(8) == pytest.approx(0.4)
    assert times.median(32) == pytest.approx(0.8)


def test_nothing_is_late_before_enough_is_known():
    times = AnswerTimes(Overdue(least=4))
    for _ in range(3):
        assert not times.add(1, 0.1)
        assert times.median(1) == times.limit(1) == math.inf
    assert times.add(1, 0.1), "a wait for the limit is notified that there is one"
    assert times.limit(1) == pytest.approx(0.3)


def test_noise_is_not_lateness():
    """Half as long again is nothing, where a call takes a millisecond."""
    assert seen(s1=0.001).limit(1) == pytest.approx(0.011)
    assert seen(Overdue(0.5, 1.5, least=4, floor=0.0), s1=0.001).limit(1) == pytest.approx(0.0015)
    assert seen(s1=1.0).limit(1) == pytest.approx(1.5)


def test_the_median_follows_the_last_answers_and_not_a_few_stragglers():
    times = seen(s1=1.0)
    fell = [times.add(1, 0.1) for _ in range(400)]
    assert any(fell)
    assert times.median(1) == 0.1
    for _ in range(64):
        times.add(1, 5.0)
    assert times.median(1) == 0.1
    for _ in range(256):
        times.add(1, 5.0)
    assert times.median(1) == 5.0


def test_another_rule_looks_at_the_same_times():
    times = AnswerTimes(Overdue(least=10))
    for number in range(1, 161):
        times.add(1, number / 160)
    late = times.under(Overdue(0.95, 1.0, least=10, floor=0.0))
    assert 0.5 <= late.median(1) <= 0.51
    assert 0.95 <= late.limit(1) <= 0.96
    assert times.limit(1) == pytest.approx(3 * times.median(1))


@pytest.mark.parametrize("floor", [-0.001, math.nan, math.inf])
def test_a_floor_is_a_number_of_seconds(floor, untyped):
    with pytest.raises(ValueError, match="floor is a number of seconds from 0 on"):
        Overdue(floor=floor)
