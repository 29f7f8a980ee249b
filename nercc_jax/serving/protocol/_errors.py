"""Errors of the protocol, and what every error is to clients: statuses and outcomes."""

import asyncio
from collections.abc import Mapping
from typing import Literal

import grpc
from starlette.requests import ClientDisconnect

from ..core._request import DeadlineExceeded, InferenceFailed, QueueFull, ServerClosing


class InvalidInput(ValueError):
    """A request that is not as the protocol or the model wants it."""


class Unauthenticated(Exception):
    """A request without a token that the server knows."""

    def __init__(self):
        Exception.__init__(self, "a token is needed: Authorization: Bearer TOKEN")


class ModelNotFound(Exception):
    """There is no such model, or no such version of it."""

    def __init__(self, model: str):
        Exception.__init__(self, f"Model with name {model} does not exist.")


class ServerNotReady(RuntimeError):
    """The server or a model is not ready."""

    def __init__(self, reason: str = ""):
        RuntimeError.__init__(self, f"Server is not ready. {reason}".rstrip())


class TooLarge(Exception):
    """A body or a batch is larger than the server accepts."""


class BodyTimeout(Exception):
    """A body did not arrive in time."""


class UnsupportedEncoding(Exception):
    """A body is compressed in an unknown way."""


class Overloaded(RuntimeError):
    """The requests in progress use all memory they may: the client should come back later."""


# By error: the statuses of HTTP and gRPC.
STATUS: Mapping[type[Exception], tuple[int, grpc.StatusCode]] = {
    InvalidInput: (400, grpc.StatusCode.INVALID_ARGUMENT),
    Unauthenticated: (401, grpc.StatusCode.UNAUTHENTICATED),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    BodyTimeout: (408, grpc.StatusCode.DEADLINE_EXCEEDED),
    TooLarge: (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    UnsupportedEncoding: (415, grpc.StatusCode.UNIMPLEMENTED),
    QueueFull: (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    NotImplementedError: (403, grpc.StatusCode.UNIMPLEMENTED),
    InferenceFailed: (502, grpc.StatusCode.INTERNAL),
    Overloaded: (503, grpc.StatusCode.UNAVAILABLE),
    ServerClosing: (503, grpc.StatusCode.UNAVAILABLE),
    ServerNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    DeadlineExceeded: (504, grpc.StatusCode.DEADLINE_EXCEEDED),
}

# By error that ends a request: its outcome in metrics and the log. Any other error: "failed".
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

# By outcome that a model's batcher does not see, so that the transport counts it: the measure.
REFUSED: Mapping[str, Literal["request_invalid", "request_overloaded"]] = {
    "invalid": "request_invalid",
    "overloaded": "request_overloaded",
}

# The message of all other errors.
INTERNAL = "internal error: see the server's log"
