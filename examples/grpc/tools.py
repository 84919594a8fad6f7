"""A call of a tool: one that must be made, as it forms, and the answer to what it returned."""

from __future__ import annotations

import json
import sys

import grpc

from lorax_proto import lorax_pb2, lorax_pb2_grpc

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
}


def called(stub: lorax_pb2_grpc.LoraxStub, request: lorax_pb2.ChatRequest) -> lorax_pb2.ToolCall:
    """Return the call that a stream makes, put together; print it as it forms."""
    call = lorax_pb2.ToolCall()
    for chunk in stub.ChatStream(request, timeout=120):
        for delta in chunk.tool_calls:
            call.id += delta.id
            call.name += delta.name
            call.arguments += delta.arguments
            print(delta.name + delta.arguments, end=" ", flush=True)
    print()
    return call


def main(address: str) -> None:
    """Have a tool called, and go on with what it returns."""
    with grpc.insecure_channel(address) as channel:
        stub = lorax_pb2_grpc.LoraxStub(channel)
        request = lorax_pb2.ChatRequest()
        request.messages.add(role="user", content="What is the weather like in Paris?")
        request.tools.add(name="get_weather", parameters_schema=json.dumps(SCHEMA))
        request.tool_choice.name = "get_weather"
        request.parameters.max_new_tokens = 64
        call = called(stub, request)
        print(f"in {json.loads(call.arguments)['city']!r}")

        request.messages.add(role="assistant", tool_calls=[call])
        request.messages.add(role="tool", tool_call_id=call.id, content="Sunny, 21 degrees.")
        request.tool_choice.mode = lorax_pb2.ToolChoice.MODE_NONE
        print(stub.Chat(request, timeout=120).choices[0].message.content)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["127.0.0.1:3002"])
