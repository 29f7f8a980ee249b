"""Codes: two matrices each, regression points, and files."""

from ._at_hand import decode_groups, decode_sets
from ._berrut import Berrut, berrut_matrix
from ._checks import check_count, check_counts, check_fields, check_not_negative, check_positive
from ._code import (
    AbstractCode,
    as_mask,
    deviation,
    joined_answers,
    variances,
)
from ._decoding import (
    AMPLIFICATION,
    Decoded,
    Matrices,
    decode_vectors,
    mask_mixed_groups,
)
from ._files import code_card, load_code, save_code
from ._grouped import (
    GroupPoints,
    check_has_points,
    copies_of_doubtful,
    following_points,
    has_points,
)
from ._groups import encode_groups, encode_leaf, multiply_groups
from ._kept import (
    CachedMatrices,
    Lookups,
    encoder_of,
    encoder_rows,
    kept_matrices,
    known_decoders,
    known_encoder,
    known_matrices,
    x64_enabled,
)
from ._lagrange import Lagrange
from ._meshes import coded_on_mesh
from ._nercc import NeRCC
from ._parity import Parity
from ._points import LAYOUTS, Layout, coincident, copies, mean_gap, regression_points
from ._products import multiply
from ._replication import Replication, Uncoded
from ._trees import (
    Form,
    any_tracer,
    check_beside,
    check_finite,
    check_floats,
    check_leading,
    finite_points,
    groups_of,
    is_float,
    join,
    leaves_of,
    points_of,
    to_device,
)
from ._whole import write_whole

__all__ = [
    "AMPLIFICATION",
    "LAYOUTS",
    "AbstractCode",
    "Berrut",
    "CachedMatrices",
    "Decoded",
    "Form",
    "GroupPoints",
    "Lagrange",
    "Layout",
    "Lookups",
    "Matrices",
    "NeRCC",
    "Parity",
    "Replication",
    "Uncoded",
    "any_tracer",
    "as_mask",
    "berrut_matrix",
    "check_beside",
    "check_count",
    "check_counts",
    "check_fields",
    "check_finite",
    "check_floats",
    "check_has_points",
    "check_leading",
    "check_not_negative",
    "check_positive",
    "code_card",
    "coded_on_mesh",
    "coincident",
    "copies",
    "copies_of_doubtful",
    "decode_groups",
    "decode_sets",
    "decode_vectors",
    "deviation",
    "encode_groups",
    "encode_leaf",
    "encoder_of",
    "encoder_rows",
    "finite_points",
    "following_points",
    "groups_of",
    "has_points",
    "is_float",
    "join",
    "joined_answers",
    "kept_matrices",
    "known_decoders",
    "known_encoder",
    "known_matrices",
    "leaves_of",
    "load_code",
    "mask_mixed_groups",
    "mean_gap",
    "multiply",
    "multiply_groups",
    "points_of",
    "regression_points",
    "save_code",
    "to_device",
    "variances",
    "write_whole",
    "x64_enabled",
]
