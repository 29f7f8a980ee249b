"""Codes: two matrices each, regression points, and files."""

from ._berrut_spline import BerrutSpline
from ._files import code_card, load_code, save_code
from ._lagrange import Lagrange
from ._nercc import NeRCC
from ._parity import Parity
from ._replication import Replication, Uncoded
from .berrut import Berrut
from .code import AbstractCode, as_mask
from .decoding import Decoded, decode_groups, encode_groups
from .learned_decoder import LearnedDecoder
from .points import regression_points

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
