"""Errors of the protocol, and what every error is to clients: statuses and outcomes."""

import asyncio
from collections.abc import Mapping
from typing import NamedTuple

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


class UnsupportedEncoding(Exception):
    """A body is compressed in an unknown way."""


class Overloaded(RuntimeError):
    """The requests in progress use all memory they may: the client should come back later."""


class ErrorKind(NamedTuple):
    """An error's statuses in HTTP and gRPC, and its outcome in metrics and the log."""

    http: int
    grpc: grpc.StatusCode
    outcome: str = "failed"


KINDS: Mapping[type[Exception], ErrorKind] = {
    InvalidInput: ErrorKind(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    Unauthenticated: ErrorKind(401, grpc.StatusCode.UNAUTHENTICATED),
    ModelNotFound: ErrorKind(404, grpc.StatusCode.NOT_FOUND, "not_found"),
    TooLarge: ErrorKind(413, grpc.StatusCode.RESOURCE_EXHAUSTED, "invalid"),
    UnsupportedEncoding: ErrorKind(415, grpc.StatusCode.UNIMPLEMENTED, "invalid"),
    QueueFull: ErrorKind(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full"),
    NotImplementedError: ErrorKind(403, grpc.StatusCode.UNIMPLEMENTED),
    InferenceFailed: ErrorKind(502, grpc.StatusCode.INTERNAL),
    Overloaded: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "overloaded"),
    ServerClosing: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "draining"),
    ServerNotReady: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "not_ready"),
    DeadlineExceeded: ErrorKind(504, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline"),
}


def outcome_of(error: BaseException) -> str:
    """Return the outcome, in metrics and the log, of a request that an error ends."""
    if isinstance(error, ClientDisconnect | asyncio.CancelledError):
        return "cancelled"
    kind = KINDS.get(type(error))  # pyright: ignore[reportArgumentType]
    return "failed" if kind is None else kind.outcome


# The message of all other errors.
INTERNAL = "internal error: see the server's log"
