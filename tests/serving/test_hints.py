"""Hints for the log: each is logged once when it has lasted, and once when it is over."""

# ruff: noqa: E402 (`require` comes before what needs it)

import logging

import pytest
from conftest import require
from schedulers import soon
from traffic import Traffic

require("fastapi", "serve")

from nercc_jax.risk._straggler_risk import StragglerRow
from nercc_jax.serving import BatchingPolicy, Predictor, _served_model


@pytest.fixture
def hear(monkeypatch, caplog):
    """Gives looks to a log of hints, one after the other; what was logged by each."""
    monkeypatch.setattr(_served_model, "_BEGINS", 2)
    monkeypatch.setattr(_served_model, "_ENDS", 3)
    caplog.set_level(logging.INFO)
    log = _served_model.HintLog("digits", list)

    def hear(*looks):
        reported = []
        for hints in looks:
            caplog.clear()
            log.update(hints)
            assert all(record.model == "digits" for record in caplog.records)
            reported.append([record.message for record in caplog.records])
        return reported

    return hear


def test_a_hint_is_reported_once_whatever_its_numbers(hear):
    reported = hear(*([f"no estimate yet: {known} of 32 groups"] for known in range(5)))
    assert reported == [[], ["hint: no estimate yet: 1 of 32 groups"], [], [], []]


def test_what_comes_and_goes_is_not_told(hear):
    assert hear(["full"], [], ["full"], [], ["full"]) == [[]] * 5


def test_the_end_of_a_hint_is_reported_once_it_has_lasted(hear):
    hear(["full"], ["full"])
    assert hear([], [], ["full"], [], []) == [[]] * 5
    assert hear([], []) == [["over: full"], []]
    assert hear(["full"], ["full"]) == [[], ["hint: full"]]


def test_hints_do_not_hide_each_other(hear):
    assert hear(["a"], ["a", "b"], ["b"], ["b"]) == [[], ["hint: a"], ["hint: b"], []]
    assert hear(["b"]) == [["over: a"]]


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
        predictor.risk.add(StragglerRow(0.01, 0.0, False, 0.0), given=False)
    assert predictor.hints() == []
    for _ in range(20):
        predictor.risk.add(StragglerRow(0.4, 0.0, True, 0.0), given=False)
    (harder,) = predictor.hints()
    assert "harder than others" in harder
