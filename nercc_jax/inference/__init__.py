"""Encode, model, decode: on one device, on a mesh, partly, in order, among liars."""

from ._coded import AbstractScheme, Work, coded_inference, coded_predictions
from ._groups import group_points
from ._models import Model, call_model, check_model
from ._ordering import Features, order_points, ordered, random_projection
from ._partial import partial_inference
from ._paths import short_path
from ._robust import RobustDecoded, RobustMethod, find_adversaries, robust_decode
from ._spmd import place, slots
from ._workers import run_workers

__all__ = [
    "AbstractScheme",
    "Features",
    "Model",
    "RobustDecoded",
    "RobustMethod",
    "Work",
    "call_model",
    "check_model",
    "coded_inference",
    "coded_predictions",
    "find_adversaries",
    "group_points",
    "order_points",
    "ordered",
    "partial_inference",
    "place",
    "random_projection",
    "robust_decode",
    "run_workers",
    "short_path",
    "slots",
]
