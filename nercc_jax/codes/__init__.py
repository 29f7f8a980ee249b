"""Codes: two matrices each, regression points, and files."""

from ._berrut import Berrut, berrut_matrix
from ._checks import check_count, check_counts, check_not_negative, check_positive
from ._code import (
    AbstractCode,
    Decoded,
    as_mask,
    decode_groups,
    deviation,
    encode_groups,
    encoder_rows,
    multiply,
    variances,
)
from ._files import code_card, load_code, save_code
from ._lagrange import Lagrange
from ._nercc import NeRCC
from ._parity import Parity
from ._points import LAYOUTS, Layout, coincident, copies, mean_gap, regression_points
from ._replication import Replication, Uncoded

__all__ = [
    "LAYOUTS",
    "AbstractCode",
    "Berrut",
    "Decoded",
    "Lagrange",
    "Layout",
    "NeRCC",
    "Parity",
    "Replication",
    "Uncoded",
    "as_mask",
    "berrut_matrix",
    "check_count",
    "check_counts",
    "check_not_negative",
    "check_positive",
    "code_card",
    "coincident",
    "copies",
    "decode_groups",
    "deviation",
    "encode_groups",
    "encoder_rows",
    "load_code",
    "mean_gap",
    "multiply",
    "regression_points",
    "save_code",
    "variances",
]
