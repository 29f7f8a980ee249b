"""Codes: two matrices each, regression points, and files."""

from ._berrut import Berrut
from ._berrut_spline import BerrutSpline
from ._code import AbstractCode, as_mask
from ._decoding import Decoded, decode_groups, encode_groups
from ._files import code_card, load_code, save_code
from ._lagrange import Lagrange
from ._learned_decoder import LearnedDecoder
from ._nercc import NeRCC
from ._parity import Parity
from ._points import regression_points
from ._replication import Replication, Uncoded

__all__ = [
    "AbstractCode",
    "Berrut",
    "BerrutSpline",
    "Decoded",
    "Lagrange",
    "LearnedDecoder",
    "NeRCC",
    "Parity",
    "Replication",
    "Uncoded",
    "as_mask",
    "code_card",
    "decode_groups",
    "encode_groups",
    "load_code",
    "regression_points",
    "save_code",
]
