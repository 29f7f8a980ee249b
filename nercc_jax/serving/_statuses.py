"""What errors are to clients: a status of either face, and words."""

from collections.abc import Mapping

import grpc

from ._intake import Overloaded
from ._kserve import InvalidInput, ModelNotFound, ServerNotReady
from ._protocol import BodyTimeout, TooLarge, UnsupportedEncoding
from ._request import DeadlineExceeded, InferenceFailed, QueueFull, ServerClosing

# What an error is to clients of either face.
STATUS: Mapping[type[Exception], tuple[int, grpc.StatusCode]] = {
    InvalidInput: (400, grpc.StatusCode.INVALID_ARGUMENT),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    BodyTimeout: (408, grpc.StatusCode.DEADLINE_EXCEEDED),
    TooLarge: (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    UnsupportedEncoding: (415, grpc.StatusCode.UNIMPLEMENTED),
    QueueFull: (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    NotImplementedError: (501, grpc.StatusCode.UNIMPLEMENTED),
    InferenceFailed: (502, grpc.StatusCode.INTERNAL),
    Overloaded: (503, grpc.StatusCode.UNAVAILABLE),
    ServerClosing: (503, grpc.StatusCode.UNAVAILABLE),
    ServerNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    DeadlineExceeded: (504, grpc.StatusCode.DEADLINE_EXCEEDED),
}

# Whoever asks has made a mistake.
INVALID = (InvalidInput, BodyTimeout, TooLarge, UnsupportedEncoding)

# What clients are told of everything else.
INTERNAL = "internal error: see the server's log"
