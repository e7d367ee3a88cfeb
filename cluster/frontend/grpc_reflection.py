"""Server reflection in both of its versions. grpcio-reflection has v1alpha; v1, which newer clients
ask for first, has the same messages under another package."""

import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.rpc import inference_pb2

_V1ALPHA_PACKAGE, _V1_PACKAGE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
_REFLECTION = tuple(f"{package}.ServerReflection" for package in (_V1_PACKAGE, _V1ALPHA_PACKAGE))


def add_reflection(server: grpc.aio.Server) -> None:
    """Serve the descriptors of the public API, of health and of reflection itself."""
    services = [
        *inference_pb2.DESCRIPTOR.services_by_name.values(),
        *health_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    names = [*(service.full_name for service in services), *_REFLECTION]
    servicer = reflection.aio.ReflectionServicer(names, pool=_descriptors())  # type: ignore[attr-defined]
    info = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": info}) for name in _REFLECTION
        )
    )


def _descriptors() -> descriptor_pool.DescriptorPool:
    """Return a pool of its own, since grpcio-reflection may add v1 to the default one some day."""
    pool = descriptor_pool.DescriptorPool()
    for file in (inference_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        _add(pool, file)
    v1 = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1)
    v1.name, v1.package = "grpc/reflection/v1/reflection.proto", _V1_PACKAGE
    for message in v1.message_type:
        for field in filter(lambda field: field.type_name, message.field):
            field.type_name = field.type_name.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
    for method in v1.service[0].method:
        method.input_type = method.input_type.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
        method.output_type = method.output_type.replace(_V1ALPHA_PACKAGE, _V1_PACKAGE)
    pool.AddSerializedFile(v1.SerializeToString())
    return pool


def _add(pool: descriptor_pool.DescriptorPool, file: FileDescriptor) -> None:
    for dependency in file.dependencies:
        _add(pool, dependency)
    pool.AddSerializedFile(file.serialized_pb)
