"""The gRPC face of Triton's extensions: two methods that kserve's service does not have.

Their messages are made here, as far as we fill them, with Triton's names and numbers (its
`grpc_service.proto` and `model_config.proto`), in a pool of their own: in the default one, which
takes each name once, are kserve's, which Triton's own module could not join.
"""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass

from ._plane import Plane
from ._protocol import VERSION

_NAMED = {"name": (1, "string"), "version": (2, "string")}
_DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
_DURATIONS += ("cache_hit", "cache_miss")

# Each message's fields: number and type.
_MESSAGES: Mapping[str, Mapping[str, tuple[int, str]]] = {
    "ModelConfigRequest": _NAMED,
    "ModelConfigResponse": {"config": (1, "ModelConfig")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "max_batch_size": (4, "int32"),
        "input": (5, "repeated ModelInput"),
        "output": (6, "repeated ModelOutput"),
        "dynamic_batching": (11, "ModelDynamicBatching"),
        "backend": (17, "string"),
    },
    "ModelInput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (4, "repeated int64"),
    },
    "ModelOutput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (3, "repeated int64"),
    },
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "repeated int32"),
        "max_queue_delay_microseconds": (2, "uint64"),
        "priority_levels": (4, "uint64"),
        "default_priority_level": (5, "uint64"),
    },
    "ModelStatisticsRequest": _NAMED,
    "ModelStatisticsResponse": {"model_stats": (1, "repeated ModelStatistics")},
    "ModelStatistics": {
        **_NAMED,
        "last_inference": (3, "uint64"),
        "inference_count": (4, "uint64"),
        "execution_count": (5, "uint64"),
        "inference_stats": (6, "InferStatistics"),
        "batch_stats": (7, "repeated InferBatchStatistics"),
    },
    "InferStatistics": {
        name: (number, "StatisticDuration") for number, name in enumerate(_DURATIONS, 1)
    },
    "InferBatchStatistics": {"batch_size": (1, "uint64")},
    "StatisticDuration": {"count": (1, "uint64"), "ns": (2, "uint64")},
}
_TYPES = ("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32")
_TYPES += ("INT64", "FP16", "FP32", "FP64", "STRING", "BF16")


def add_extensions(plane: Plane, server: grpc.aio.Server) -> None:
    """Adds Triton's `ModelConfig` and `ModelStatistics` to a server."""
    known = _make_messages()

    async def config(request: Any, context: Any) -> Any:
        told = plane.configuration(request.name, request.version or VERSION)
        return ParseDict({"config": told}, known["ModelConfigResponse"]())

    async def statistics(request: Any, context: Any) -> Any:
        told = plane.statistics(request.name, request.version or VERSION)
        return ParseDict(told, known["ModelStatisticsResponse"]())

    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=known[f"{name}Request"].FromString,
            response_serializer=known[f"{name}Response"].SerializeToString,
        )
        for name, answer in (("ModelConfig", config), ("ModelStatistics", statistics))
    }
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers)
    server.add_generic_rpc_handlers((service,))


def _make_messages() -> Mapping[str, Any]:
    """The messages' classes, by name."""
    file = FileDescriptorProto(name="nercc_jax.proto", package="inference", syntax="proto3")
    types = file.enum_type.add(name="DataType")
    for number, name in enumerate(_TYPES):
        types.value.add(name=f"TYPE_{name}", number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            message.field.append(_field(field, number, kind))
    pool = DescriptorPool()
    pool.Add(file)
    return {
        name: GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}")) for name in _MESSAGES
    }


def _field(name: str, number: int, kind: str) -> FieldDescriptorProto:
    *many, kind = kind.split()
    field = FieldDescriptorProto(name=name, number=number)
    field.label = field.LABEL_REPEATED if many else field.LABEL_OPTIONAL
    if kind in _MESSAGES or kind == "DataType":
        field.type_name = f".inference.{kind}"
    else:
        field.type = field.Type.Value(f"TYPE_{kind.upper()}")
    return field
