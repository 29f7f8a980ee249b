"""What we use of kserve, which reads the process's command line as its own when it is imported.

With `nercc serve --config server.toml` it would end the process: to its parser `--config` is short
for `--configure_logging`. So it is imported here only, behind its back.
"""

import sys

_argv, sys.argv = sys.argv, sys.argv[:1]
try:
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
finally:
    sys.argv = _argv

__all__ = ["add_service", "bodies", "messages"]
