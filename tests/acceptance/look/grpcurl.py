"""Stands in for grpcurl, which few machines have: calls by what a server's reflection tells.

``grpcurl.py -plaintext [-H HEADER] [-d JSON] ADDRESS (describe SYMBOL or METHOD)``
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import grpc
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

_BOUND_S = 120.0


def _describe(pool: descriptor_pool.DescriptorPool, symbol: str) -> None:
    service = pool.FindServiceByName(symbol)
    for method in service.methods:
        print(f"rpc {method.name} ({method.input_type.full_name})")


def _call(
    channel: grpc.Channel,
    pool: descriptor_pool.DescriptorPool,
    name: str,
    document: Any,
    metadata: Any,
) -> None:
    service, _, method = name.partition("/")
    found = pool.FindServiceByName(service).FindMethodByName(method)
    request = json_format.ParseDict(
        document, message_factory.GetMessageClass(found.input_type)(), descriptor_pool=pool
    )
    make = channel.unary_stream if found.server_streaming else channel.unary_unary
    answer = make(
        f"/{name}",
        lambda message: message.SerializeToString(),
        message_factory.GetMessageClass(found.output_type).FromString,
    )(request, timeout=_BOUND_S, metadata=metadata)
    for message in answer if found.server_streaming else [answer]:
        print(json_format.MessageToJson(message, descriptor_pool=pool))


def main() -> None:
    """Do what the command line says; what goes wrong is raised."""
    parser = argparse.ArgumentParser("grpcurl")
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-d", default="{}")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("address")
    parser.add_argument("verb")
    parser.add_argument("symbol", nargs="?")
    asked = parser.parse_args()
    pairs = [tuple(part.strip() for part in each.split(":", 1)) for each in asked.H]
    metadata = [(name.lower(), value) for name, value in pairs]
    with grpc.insecure_channel(asked.address) as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        if asked.verb == "describe":
            _describe(pool, asked.symbol)
        else:
            _call(channel, pool, asked.verb, json.loads(asked.d), metadata)


if __name__ == "__main__":
    main()
