"""Codes: one interface, one file a code."""

from ._berrut import Berrut
from ._code import (
    AbstractCode,
    Decoded,
    as_mask,
    decode_groups,
    deviation,
    encode_groups,
    encoder_rows,
    variances,
)
from ._lagrange import Lagrange
from ._nercc import NeRCC
from ._parity import Parity
from ._replication import Replication, Uncoded

__all__ = [
    "AbstractCode",
    "Berrut",
    "Decoded",
    "Lagrange",
    "NeRCC",
    "Parity",
    "Replication",
    "Uncoded",
    "as_mask",
    "decode_groups",
    "deviation",
    "encode_groups",
    "encoder_rows",
    "variances",
]
