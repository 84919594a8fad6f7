"""One question to the base model and to three adapters at once, each answer a stream: asyncio."""

from __future__ import annotations

import asyncio
import sys

import grpc

from lorax_proto import lorax_pb2, lorax_pb2_grpc

QUESTION = "I love how the sea looks today. What do you think?"
ADAPTERS = ("", "pirate", "json-only", "sentiment")


async def ask(stub: lorax_pb2_grpc.LoraxStub, adapter: str) -> str:
    """Return what an adapter says, put together from the chunks."""
    request = lorax_pb2.ChatRequest()
    request.messages.add(role="user", content=QUESTION)
    request.parameters.max_new_tokens = 40
    if adapter:
        request.parameters.adapter.id = adapter
        request.parameters.adapter.source = "local"
    call = stub.ChatStream(request, timeout=120)
    return "".join([chunk.content async for chunk in call])


async def main(address: str) -> None:
    """Ask all of them; their rows share every step of the model."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = lorax_pb2_grpc.LoraxStub(channel)
        answers = await asyncio.gather(*(ask(stub, adapter) for adapter in ADAPTERS))
        for adapter, answer in zip(ADAPTERS, answers, strict=True):
            print(f"{adapter or 'base model'}: {answer}")
        listed = await stub.ListAdapters(lorax_pb2.ListAdaptersRequest(), timeout=10)
        for each in listed.adapters:
            print(f"{each.source}:{each.id} is {each.state}, {each.bytes.device} bytes")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:] or ["127.0.0.1:3002"]))
