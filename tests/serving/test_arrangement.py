"""Queries that go out together are put beside their like."""

import time

import batching
import numpy as np
import pytest
from batching import INTERLEAVED, LONG, count, serving, settled

from nercc_jax import Berrut, NeRCC
from nercc_jax.serving import Coder
from nercc_jax.serving.core import _dispatch
from nercc_jax.serving.core._dispatch import QueryOrdering
from nercc_jax.serving.core._request import Request

CODE = INTERLEAVED


def queries(x):
    return Request(np.asarray(x, np.float32), np.zeros((len(x), 2)), 0.0, 1.0, False).queries


def arranger(code=CODE, shape=(3,), rows=4):
    return QueryOrdering(Coder(code), shape, rows)


def test_the_path_is_the_shortest_there_is_and_compiled_beforehand():
    """Of points on a line it is their own order, this way or that; of more than a group's, by
    stretches."""
    ready = arranger(rows=2)
    ready.compile()
    programs = ready._path._cache_size()
    for number in range(1, 9):
        x = np.random.default_rng(number).permutation(number)[:, None] * np.ones((1, 3))
        order = ready.path(queries(x))
        assert sorted(order) == list(range(number))
        assert (np.abs(np.diff(x[order, 0])) == 1).all()
    order = ready.path(queries(np.random.default_rng(2).normal(size=(20, 3))))
    for first in (0, 8, 16):
        stretch = order[first : first + 8]
        assert sorted(stretch) == list(range(first, first + len(stretch)))
    assert ready._path._cache_size() == programs
    assert ready.assign([], [], 0) == []


@pytest.mark.parametrize(
    "code", [CODE, NeRCC(5, 7), Berrut(4, 7)], ids=["interleaved", "Chebyshev", "BACC"]
)
def test_rows_of_groups_lie_along_the_curve(code):
    """Numbers in a row increase or decrease with the alphas that they stand at."""
    coder = Coder(code)
    count = 4 * code.num_data
    x = np.random.default_rng(0).permutation(count)
    dealt = QueryOrdering(coder, (2,), 4).assign(
        queries(x[:, None] * np.ones((1, 2))), [4] * code.num_data, 0
    )
    assert [len(cell) for cell in dealt] == [4] * code.num_data
    values = np.array([[query.x[0] for query in cell] for cell in dealt])
    assert sorted(values.ravel()) == list(range(count))
    alpha = np.asarray(code.alpha)[coder._order]
    for row in values.T:
        assert set(np.diff(row[np.argsort(alpha)])) in ({1.0}, {-1.0})


@pytest.mark.parametrize("place", [0, 1, 3])
def test_cells_of_any_size_and_groups_that_have_begun(place):
    sizes = [4, 2, 2, 1, 1, 1, 1]
    x = np.random.default_rng(1).permutation(12)[:, None] * np.ones((1, 3))
    cells = arranger().assign(queries(x), sizes, place)
    assert [len(cell) for cell in cells] == sizes
    assert sorted(query.x[0] for cell in cells for query in cell) == list(range(12))
    # A group's cells hold a stretch of the path: the first group's, then the next one's.
    ends = [4 - place, 8 - place]
    groups = [cells[: ends[0]], cells[ends[0] : ends[1]], cells[ends[1] :]]
    for group in groups:
        values = sorted(query.x[0] for cell in group for query in cell)
        assert not values or values[-1] - values[0] == len(values) - 1


def test_queries_whose_projection_overflows_are_dealt_like_others():
    """They come last in the path, among what fills it up; none is lost, and none is there twice."""
    ready = arranger(shape=(300,))
    for number in (3, 5, 9, 16):
        x = np.random.default_rng(number).normal(size=(number, 300))
        x[::2] = 3e38
        cells = ready.assign(queries(x), [1] * number, 0)
        assert sorted(query.place for (query,) in cells) == list(range(number))


@pytest.mark.parametrize(
    ("seconds", "share", "ordered"), [(0.0, 0.0, False), (LONG, 0.0, True), (0.0, 1e9, True)]
)
def test_what_takes_long_to_order_goes_out_as_it_comes(seconds, share, ordered, monkeypatch):
    """The thread that answers orders: no longer than this, or this share of an answer's time."""
    monkeypatch.setattr(_dispatch, "_ORDERING", seconds)
    monkeypatch.setattr(_dispatch, "_ORDERING_SHARE", share)
    with serving(CODE, workers=8, ordering=True) as batcher:
        batcher.submit(batching.queries(8)).result(LONG)
        settled(batcher)
        assert bool(count(batcher, "order_seconds")) == ordered
    with serving(CODE, workers=8, ordering=True, warm=False) as batcher:  # answers may be quick
        batcher.submit(batching.queries(8)).result(LONG)
        assert bool(count(batcher, "order_seconds")) == (seconds > 0)


@pytest.mark.parametrize(("share", "again"), [(1e-3, False), (1.0, True)])
def test_ordering_takes_no_more_than_its_share_of_the_time(share, again, monkeypatch):
    """What comes soon after an ordering that took long goes out as it comes."""
    assign = QueryOrdering.assign

    def slow(*args):
        time.sleep(0.05)
        return assign(*args)

    monkeypatch.setattr(QueryOrdering, "assign", slow)
    monkeypatch.setattr(_dispatch, "_ORDERING", LONG)
    monkeypatch.setattr(_dispatch, "_OF_THE_TIME", share)
    with serving(CODE, workers=8, ordering=True) as batcher:
        for _ in range(2):
            batcher.submit(batching.queries(8)).result(LONG)
            settled(batcher)
        assert (count(batcher, "order_seconds") > 1) == again


def test_what_ordering_takes_is_measured_by_the_most_that_are_ordered(monkeypatch):
    """As of images: when it is compiled, before there is anything to be late."""
    ready = arranger(rows=4)
    path = ready._path

    def slow(x):
        time.sleep(0.01 * len(x))
        return path(x)

    monkeypatch.setattr(ready, "_path", slow)
    ready.compile()
    assert ready.seconds >= 0.01 * 4 * CODE.num_data
