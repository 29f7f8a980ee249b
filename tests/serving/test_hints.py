"""Hints for the log: each is logged once when it has lasted, and once when it is over."""

# ruff: noqa: E402 (`require` comes before what needs it)

import logging

import pytest
from conftest import require
from schedulers import soon
from traffic import Traffic

require("fastapi", "serve")

from nercc_jax.risk import Comparison
from nercc_jax.serving import BatchingPolicy, Predictor, _served_model


def known(*numbers):
    return [[f"{number} of 32 were compared"] for number in numbers]


@pytest.mark.parametrize(
    ("looks", "reported"),
    [
        # Once, whatever its numbers.
        (known(0, 1, 2, 3), [[], ["hint: 1 of 32 were compared"], [], []]),
        # What comes and goes is not told.
        ([["full"], [], ["full"], [], ["full"]], [[]] * 5),
        # Its end, once it has lasted; and then it may come again.
        (
            [["full"], ["full"], [], [], ["full"], [], [], [], [], ["full"], ["full"]],
            [[], ["hint: full"], *[[]] * 5, ["over: full"], [], [], ["hint: full"]],
        ),
        # They do not hide each other.
        (
            [["a"], ["a", "b"], ["b"], ["b"], ["b"]],
            [[], ["hint: a"], ["hint: b"], [], ["over: a"]],
        ),
    ],
)
def test_a_hint_is_logged_once_it_has_lasted_and_once_it_is_over(
    monkeypatch, caplog, looks, reported
):
    monkeypatch.setattr(_served_model, "_BEGINS", 2)
    monkeypatch.setattr(_served_model, "_ENDS", 3)
    caplog.set_level(logging.INFO)
    log = _served_model.HintLog("digits", list)
    for hints, expected in zip(looks, reported, strict=True):
        caplog.clear()
        log.update(hints)
        assert [(record.model, record.message) for record in caplog.records] == [
            ("digits", each) for each in expected
        ]


def test_a_look_that_fails_is_logged_and_the_next_works(monkeypatch, caplog):
    monkeypatch.setattr(_served_model, "_LOOK", 0.01)
    monkeypatch.setattr(_served_model, "_BEGINS", 1)
    caplog.set_level(logging.INFO)
    failing = [True]

    def look():
        if failing:
            failing.pop()
            raise RuntimeError("a bug of ours")
        return ["full"]

    log = _served_model.HintLog("digits", look)
    log.start()
    soon(lambda: "hint: full" in caplog.text)
    log.close()
    assert "looking for hints failed" in caplog.text


def test_hints_say_why_nothing_is_predicted():
    predictor = Predictor()
    traffic = Traffic(predictor, BatchingPolicy(straggler_threshold=1.4, max_disagreement=0.1))
    assert "still learning: 0 of 384" in predictor.hints()[0]
    traffic.send(500)
    compared = predictor.risk.status()["compared"]
    (hint,) = predictor.hints()
    assert f"{compared} of 14 stragglers' answers were compared" in hint
    for _ in range(40):
        predictor.risk.add(Comparison(0.01, 0.0, False, 0.0), given=False)
    assert predictor.hints() == []
    for _ in range(20):
        predictor.risk.add(Comparison(0.4, 0.0, True, 0.0), given=False)
    (harder,) = predictor.hints()
    assert "harder than others" in harder
