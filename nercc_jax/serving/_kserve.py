"""What we use of kserve, which reads the process's command line as its own when it is imported.

With `nercc serve --config server.toml` it would end the process: to its parser `--config` is short
for `--configure_logging`. So it is imported here only, behind its back. Nor are pandas and the
client of Kubernetes imported with it, for more than a second: kserve uses them where we do not.
"""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any


class _Later(types.ModuleType):
    """A module that is imported once something of it is used, but not while it stands for it."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            raise AttributeError(name)
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _later(name: str, **parts: Any) -> Iterator[None]:
    """Within it, `import name` gives a module that has these parts, and nothing else."""
    if name in sys.modules:
        yield
        return
    later = _Later(name)
    later.__spec__ = importlib.util.find_spec(name)
    vars(later).update(parts)
    sys.modules[name] = later
    try:
        yield
    finally:
        del sys.modules[name]
        for each in parts:
            delattr(later, each)


@contextlib.contextmanager
def _without_arguments() -> Iterator[None]:
    own, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = own


_KUBERNETES = {name: _Later(f"kubernetes.{name}") for name in ("client", "config", "watch")}

with (
    _without_arguments(),
    _later("pandas", DataFrame=object),  # in an annotation
    _later("kubernetes", **_KUBERNETES),
):
    from kserve.errors import InvalidInput as InvalidInput
    from kserve.errors import ModelNotFound as ModelNotFound
    from kserve.errors import ServerNotReady as ServerNotReady
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
        add_GRPCInferenceServiceServicer_to_server as add_service,
    )
    from kserve.protocol.grpc.servicer import InferenceServicer as InferenceServicer
    from kserve.protocol.infer_type import InferInput as InferInput
    from kserve.protocol.infer_type import InferOutput as InferOutput
    from kserve.protocol.infer_type import InferRequest as InferRequest
    from kserve.protocol.infer_type import InferResponse as InferResponse
    from kserve.protocol.infer_type import RequestedOutput as RequestedOutput
    from kserve.protocol.rest import v2_datamodels as bodies
    from kserve.protocol.rest.v2_endpoints import V2Endpoints as V2Endpoints

__all__ = ["add_service", "bodies", "messages"]
