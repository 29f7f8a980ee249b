"""What errors are to clients: a status of either face, and words."""

import asyncio
from collections.abc import Mapping
from typing import Literal

import grpc
from starlette.requests import ClientDisconnect

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

# How a request ended that an error ends, in metrics and the log; any other error: it failed.
OUTCOME: Mapping[type[BaseException], str] = {
    InvalidInput: "invalid",
    BodyTimeout: "invalid",
    TooLarge: "invalid",
    UnsupportedEncoding: "invalid",
    ModelNotFound: "not_found",
    ServerNotReady: "not_ready",
    Overloaded: "overloaded",
    QueueFull: "queue_full",
    ServerClosing: "draining",
    DeadlineExceeded: "deadline",
    InferenceFailed: "failed",
    ClientDisconnect: "cancelled",
    asyncio.CancelledError: "cancelled",
}

# Those that a model's batcher does not see, so that the faces count them, by what is counted.
REFUSED: Mapping[str, Literal["request_invalid", "request_overloaded"]] = {
    "invalid": "request_invalid",
    "overloaded": "request_overloaded",
}

# What clients are told of everything else.
INTERNAL = "internal error: see the server's log"
