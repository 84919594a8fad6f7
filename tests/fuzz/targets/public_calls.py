"""Messages of the public gRPC service, to a router over a fake shard."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import Message
from tests.fuzz.targets.messages import MESSAGE_MUTATORS
from tests.fuzz.targets.mutate import BYTE_MUTATORS
from tests.fuzz.targets.target import (
    Case,
    FoundFaultError,
    LoopTarget,
    Mutator,
    require,
    require_words,
)
from tests.helpers.adapter_world import adapter_world
from tests.helpers.grpc_calls import grpc_served, refusal_of
from tests.helpers.http_app import TEMPLATE

from lorax_proto import lorax_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["Lorax"]
_BROKEN = ("UNKNOWN", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED")
_PATIENCE_S = 60.0
_TWO = pb.Parameters(max_new_tokens=2)


def _generate() -> pb.GenerateRequest:
    return pb.GenerateRequest(text="w1 w2", parameters=_TWO)


def _chat() -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="w1")], parameters=_TWO)


_PLAIN: dict[str, Callable[[], Message]] = {
    "Generate": _generate,
    "GenerateStream": _generate,
    "Chat": _chat,
    "ChatStream": _chat,
    "Embed": lambda: pb.EmbedRequest(text="w1 w2"),
    "Classify": lambda: pb.ClassifyRequest(
        text="w1 w2", adapter=pb.Adapter(id="judge", source="local")
    ),
    "Tokenize": lambda: pb.TokenizeRequest(text="w1"),
    "Detokenize": lambda: pb.DetokenizeRequest(ids=[1, 2]),
    "Info": pb.InfoRequest,
    "ListAdapters": pb.ListAdaptersRequest,
    "LoadAdapter": lambda: pb.LoadAdapterRequest(adapter=pb.Adapter(id="x", source="local")),
    "UnloadAdapter": lambda: pb.UnloadAdapterRequest(adapter=pb.Adapter(id="x", source="local")),
}


class PublicCalls(LoopTarget):
    """A content is the name of a method, its request or the bytes of one, and metadata."""

    name = "grpc"
    num_per_opening = 400

    def __init__(self) -> None:
        self.mutators = {name: _of_request(each) for name, each in MESSAGE_MUTATORS.items()}
        self.mutators |= {"method": _method, "head": _head}
        self.raw_mutators = {name: _of_request(each) for name, each in BYTE_MUTATORS.items()}

    def plain(self, draw: random.Random) -> Any:
        """Return what a method takes of anybody."""
        name = draw.choice([each for each in sorted(_PLAIN) if not each.endswith("loadAdapter")])
        name = "Generate" if name == "LoadAdapter" else name
        return name, _PLAIN[name](), ()

    def written(self, content: Any) -> Any:
        """Return the same with the request as bytes."""
        name, request, head = content
        return name, request.SerializeToString(), head

    async def opened(self, stack: contextlib.AsyncExitStack) -> None:
        """Start a router."""
        world = await stack.enter_async_context(
            adapter_world(template=TEMPLATE, default_adapter_source="local")
        )
        self._served = await stack.enter_async_context(grpc_served(world.parts.servicer))

    async def judged(self, case: Case) -> str:
        """A call ends with messages that can be read, or with a status in words."""
        name, raw, head = case.content
        answer_type = _SERVICE.methods_by_name[name].output_type._concrete_class
        call = self._served.channel.unary_stream(f"/{_SERVICE.full_name}/{name}")
        outcome = "taken"
        try:
            async for each in call(raw, timeout=_PATIENCE_S, metadata=head):
                answer_type.FromString(each)
        except grpc.aio.AioRpcError as error:
            outcome = _refused(error)
        await self._served.stub.Generate(_generate(), timeout=_PATIENCE_S)
        return outcome


def _refused(error: grpc.aio.AioRpcError) -> str:
    require(error.code().name not in _BROKEN, f"{error.code().name}: {error.details()}")
    require_words(error.details() or "")
    if "larger than max" in (error.details() or ""):
        # The library's own words, before there is a request.
        return "refused"
    try:
        refusal_of(error)
    except AssertionError as fault:
        raise FoundFaultError(
            f"its status is not rich: {error.code()} {error.details()}"
        ) from fault
    return "refused"


def _of_request(mutator: Mutator) -> Mutator:
    def change(draw: random.Random, content: Any) -> Any:
        name, request, head = content
        return name, mutator(draw, request), head

    return change


def _method(draw: random.Random, content: Any) -> Any:
    """What another method takes."""
    name = draw.choice(sorted(_PLAIN))
    return name, _PLAIN[name](), content[2]


def _head(draw: random.Random, content: Any) -> Any:
    """Metadata that calls have, or that nobody knows."""
    name, request, head = content
    key = draw.choice(
        [
            "authorization",
            "x-request-id",
            "x-api-key",
            "traceparent",
            "accept",
            "nobody-knows",
            "x-bin",
        ]
    )
    values = [
        "",
        "Bearer",
        "Bearer x",
        "Basic x",
        "x" * 3_000,
        "a b",
        "00-" + "0" * 32 + "-" + "0" * 16 + "-00",
        "~",
    ]
    value = draw.randbytes(9) if key.endswith("-bin") else draw.choice(values)
    return name, request, (*head, (key, value))
