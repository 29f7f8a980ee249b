"""Codes: two matrices each, regression points, and files."""

from ._at_hand import decode_groups, decode_sets
from ._berrut import Berrut
from ._berrut_spline import BerrutSpline
from ._code import AbstractCode, as_mask
from ._decoding import AMPLIFICATION, Decoded
from ._files import code_card, load_code, save_code
from ._grouped import copies_of_uncertain, following_points
from ._groups import encode_groups
from ._lagrange import Lagrange
from ._nercc import NeRCC
from ._parity import Parity
from ._points import LAYOUTS, coincident, mean_gap, regression_points
from ._replication import Replication, Uncoded

__all__ = [
    "AMPLIFICATION",
    "LAYOUTS",
    "AbstractCode",
    "Berrut",
    "BerrutSpline",
    "Decoded",
    "Lagrange",
    "NeRCC",
    "Parity",
    "Replication",
    "Uncoded",
    "as_mask",
    "code_card",
    "coincident",
    "copies_of_uncertain",
    "decode_groups",
    "decode_sets",
    "encode_groups",
    "following_points",
    "load_code",
    "mean_gap",
    "regression_points",
    "save_code",
]
