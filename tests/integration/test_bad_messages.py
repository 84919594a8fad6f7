"""Bad messages over gRPC: INVALID_ARGUMENT in words that name the field, streamed as whole."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from tests.helpers.adapter_world import adapter_world
from tests.helpers.grpc_calls import Refusal, Served, grpc_served, refusal_of
from tests.helpers.http_app import TEMPLATE
from tests.helpers.in_loop import in_loop

from lorax_proto import lorax_pb2 as pb

NAN, INF = float("nan"), float("inf")
ODD: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_FLOAT: (NAN, INF, -INF, 3e38, -3e38, -1.0, 0.0, 1e-40),
    FieldDescriptor.TYPE_DOUBLE: (NAN, INF, -INF, 1e308),
    FieldDescriptor.TYPE_UINT32: (0, 2**31, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_STRING: ("", "x", "\x00\n", "é" * 2_000),
    FieldDescriptor.TYPE_BOOL: (True, False),
    FieldDescriptor.TYPE_ENUM: (0, 1, 99),
}
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND"}


@contextlib.asynccontextmanager
async def asked() -> AsyncIterator[Served]:
    """A server that answers before and after whatever it is asked."""
    async with (
        adapter_world(template=TEMPLATE, default_adapter_source="local") as world,
        grpc_served(world.parts.servicer) as served,
    ):
        yield served
        assert (await served.stub.Generate(generate(), timeout=30)).sequences


def generate(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="w1", parameters=pb.Parameters(max_new_tokens=2, **fields))


def chat(**fields: Any) -> pb.ChatRequest:
    message = pb.ChatMessage(role="user", content="w1")
    parameters = pb.Parameters(max_new_tokens=2)
    return pb.ChatRequest(**{"messages": [message], "parameters": parameters, **fields})


async def told(call: Any) -> Refusal | None:
    """How a call was refused; None: it was answered."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        found = refusal_of(error)
        assert found.code in REFUSED, found
        assert 0 < len(found.text.encode()) < 1_100
        found.request_id = ""
        return found
    return None


async def both(served: Served, request: Message) -> Refusal | None:
    """What is said of a request, whole and streamed, which must be the same."""
    name = "Generate" if isinstance(request, pb.GenerateRequest) else "Chat"
    calls = (getattr(served.stub, each) for each in (name, f"{name}Stream"))
    whole, streamed = [await told(call(request, timeout=30)) for call in calls]
    assert whole == streamed
    return whole


def odd_fields(
    message: Message, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each scalar field of a message, and below it, with each odd value."""
    for field in message.DESCRIPTOR.fields:
        if field.type in ODD and not field.is_repeated:
            for value in ODD[field.type]:
                yield (*path, field.name), value
        elif field.message_type is not None and not field.is_repeated and len(path) < 3:
            yield from odd_fields(getattr(message, field.name), (*path, field.name))


@pytest.mark.parametrize("make", [generate, chat])
def test_whatever_a_field_is_sent_a_stream_says_what_a_whole_answer_says(make: Any) -> None:
    # What is left out of streams by LoRAX's rule, and texts of the base.
    of_one_mode = {"best_of", "return_prompt_tokens", "num_prompt_alternatives"}

    @in_loop
    async def scene() -> None:
        async with asked() as served:
            for (*outer, name), value in odd_fields(make()):
                if name in of_one_mode or "template_kwargs" in outer:
                    continue
                request = make()
                place = request
                for each in outer:
                    place = getattr(place, each)
                setattr(place, name, value)
                found = await both(served, request)
                if (isinstance(value, float) and value != value) or value in (INF, -INF):
                    assert found is not None, (name, value)
                    # A merge of no adapters is at fault whatever its density is.
                    named = (name, "merge.adapters" if name == "density" else name)
                    assert found.field.endswith(named), (name, found)

    scene()


def schema(text: str) -> pb.GenerateRequest:
    return generate(constraint=pb.Constraint(json_schema=text))


def tool(**fields: Any) -> pb.ChatRequest:
    return chat(tools=[pb.Tool(**fields)])


ENDLESS = '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}'
NO_SCHEMAS = ("{", "[]", "5", '{"a": NaN}', '{"a": "\\ud800"}', '{"a": ' * 990 + "1" + "}" * 990,
              '{"a": ' + "9" * 5_000 + "}", "[" * 100_000)  # fmt: skip
WRONG: tuple[tuple[Message, str], ...] = (
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(text=""), "prompt"),
    (pb.GenerateRequest(text="w1 " * 400), "prompt"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])), "prompt"),
    (generate(n=1_000), "n"),
    (generate(n=100, min_new_tokens=2**32 - 1), "min_new_tokens"),
    (generate(stop=["a"] * 5), "stop"),
    (generate(stop=[""]), "stop"),
    (generate(stop_token_ids=[1] * 65), "stop_token_ids"),
    (generate(logit_bias={1: NAN}), "logit_bias"),
    (generate(logit_bias={2**32 - 1: 1.0}), "logit_bias"),
    (generate(merge=pb.AdapterMerge(adapters=[pb.WeightedAdapter(id="a", weight=NAN)])), "merge"),
    (generate(merge=pb.AdapterMerge(adapters=[pb.WeightedAdapter(id="a", weight=1.0)],
                                    strategy="ties", density=NAN)), "merge"),
    (generate(constraint=pb.Constraint()), "constraint"),
    (generate(constraint=pb.Constraint(regex="(")), "constraint"),
    (generate(constraint=pb.Constraint(choice=pb.Choice())), "constraint"),
    (schema(ENDLESS), "constraint"),
    *((schema(text), "constraint") for text in NO_SCHEMAS),
    (pb.ChatRequest(), "messages"),
    (chat(messages=[pb.ChatMessage(content="w1")]), "messages.0.role"),
    (chat(messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart()])]), "messages.0.parts"),
    (tool(), "tools.0.name"),
    (chat(tools=[pb.Tool(name="f"), pb.Tool(name="f")]), "tools.1.name"),
    (chat(tools=[pb.Tool(name=f"f{n}") for n in range(129)]), "tools"),
    *((tool(name="f", parameters_schema=text), "tools.0.parameters_schema")
      for text in NO_SCHEMAS),
)  # fmt: skip


@in_loop
async def test_messages_that_ask_for_what_is_none_are_refused_by_their_field() -> None:
    async with asked() as served:
        for request, field in WRONG:
            found = await both(served, request)
            assert found is not None, str(request)[:300]
            assert found.code == "INVALID_ARGUMENT", (str(request)[:300], found)
            assert found.field.startswith(field), (str(request)[:300], found)


@in_loop
async def test_bytes_that_are_no_message_are_refused_in_words() -> None:
    async with asked() as served:
        # A text that is not UTF-8, a message that is cut off, a field that is none.
        for raw in (b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\xff" * 10):
            for name in ("Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize"):
                call = served.channel.unary_stream(f"/lorax.v1.Lorax/{name}")(raw, timeout=30)
                found = await told(call)
                assert found is not None
                assert found.code == "INVALID_ARGUMENT"
