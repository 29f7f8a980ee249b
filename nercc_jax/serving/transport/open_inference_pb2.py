"""The messages of `open_inference.proto`, from its compiled form in the same folder.

They have a descriptor pool of their own: the default pool accepts each name only once, and clients
of KServe or Triton in the same process have messages with the same names.
"""

from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

_compiled = Path(__file__).with_name("open_inference.binpb")
(_file,) = FileDescriptorSet.FromString(_compiled.read_bytes()).file
DESCRIPTOR = DescriptorPool().AddSerializedFile(_file.SerializeToString())

for _name, _message in DESCRIPTOR.message_types_by_name.items():
    globals()[_name] = GetMessageClass(_message)
for _name, _enum in DESCRIPTOR.enum_types_by_name.items():
    globals()[_name] = EnumTypeWrapper(_enum)
