"""Hints on the status page: why nothing is predicted."""

from traffic import Traffic

from nercc_jax.risk import Comparison
from nercc_jax.serving import BatchingPolicy, Predictor


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
