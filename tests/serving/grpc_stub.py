"""A client's stub of the protocol's gRPC service, made from its description."""

from google.protobuf.message_factory import GetMessageClass

from nercc_jax.serving.transport import open_inference_pb2 as messages


class GRPCInferenceServiceStub:
    """Has a method for each of the service's."""

    def __init__(self, channel):
        service = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        for method in service.methods:
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)
