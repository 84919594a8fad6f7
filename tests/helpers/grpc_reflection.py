"""Calls as tools make them that know nothing of a server but what its reflection tells."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def call_by_reflection(channel: grpc.Channel, method: str, document: dict[str, Any]) -> Any:
    """Call a method as grpcurl does; return what a method answers."""
    pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
    service = pool.FindServiceByName("lorax.v1.Lorax")
    found = service.FindMethodByName(method)
    request = json_format.ParseDict(
        document, message_factory.GetMessageClass(found.input_type)(), descriptor_pool=pool
    )
    call = channel.unary_unary(
        f"/{service.full_name}/{method}",
        lambda message: message.SerializeToString(),
        message_factory.GetMessageClass(found.output_type).FromString,
    )
    return json_format.MessageToDict(call(request, timeout=120))
