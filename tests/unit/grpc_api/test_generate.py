"""Generate and Chat over a real connection: texts, tokens, ends, streams, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from tests.helpers.constraints import AnyConstraints, choice, lark, regex, schema
from tests.helpers.grpc_calls import Served, grpc_served, refusal_of, refused
from tests.helpers.http_app import World, limits, until
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import GenerationError, LoraxError, OverloadedError, ShardError
from lorax_contract.step import Alternatives, FinishCode, OutputKind, TokenColumns
from lorax_proto import lorax_pb2 as pb
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode


def request(text: str = "w1 w2", **params: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, parameters=pb.Parameters(**params))


def chat(*said: str, **params: Any) -> pb.ChatRequest:
    messages = [pb.ChatMessage(role="user", content=each) for each in said]
    return pb.ChatRequest(messages=messages, parameters=pb.Parameters(**params))


async def chunks_of(served: Served, sent: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [each async for each in served.stub.GenerateStream(sent, timeout=30)]


@in_loop
async def test_an_answer_has_text_reason_usage_and_timings():
    async with grpc_served(World()) as served:
        answer = await served.stub.Generate(request(max_new_tokens=3), timeout=30)
        (sequence,) = answer.sequences
        assert sequence.text == " w0 w1 w2"
        assert sequence.finish_reason == pb.FINISH_REASON_LENGTH
        assert not sequence.tokens
        assert not sequence.HasField("seed")
        assert (answer.usage.prompt_tokens, answer.usage.generated_tokens) == (3, 3)
        assert answer.timings.total_s >= answer.timings.first_token_s > 0


@in_loop
async def test_tokens_alternatives_and_the_prompts_tokens_come_when_asked_for():
    world = World()
    async with grpc_served(world) as served:
        asked = request(max_new_tokens=2, num_alternatives=2, return_prompt_tokens=True)
        answer = await served.stub.Generate(asked, timeout=30)
        tokens = answer.sequences[0].tokens
        assert [(each.id, each.text, each.logprob) for each in tokens] == [
            (100, " w0", -0.5),
            (101, " w1", -0.5),
        ]
        assert [each.id for each in tokens[0].alternatives] == [0, 1]
        first, second, _ = answer.prompt_tokens
        # Nothing precedes the first token of a prompt.
        assert (first.HasField("logprob"), second.logprob) == (False, -1.0)
        assert world.engine.submitted[0].sampling.prompt_logprobs


@in_loop
async def test_prompts_are_texts_ids_or_chats():
    world = World()
    async with grpc_served(world) as served:
        stub = served.stub
        await stub.Generate(request("w1"), timeout=30)
        bare = pb.GenerateRequest(text="w1", add_special_tokens=False)
        await stub.Generate(bare, timeout=30)
        await stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])), timeout=30)
        answer = await stub.Chat(chat("w1"), timeout=30)
        assert answer.choices[0].message.role == "assistant"
        ids = [list(each.prompt_ids) for each in world.engine.submitted]
        assert ids == [[900, 1], [1], [5, 6], [902, 904, 903, 1, 902, 905, 903]]


@in_loop
async def test_a_stream_makes_the_same_text_as_a_whole_answer():
    texts = ["w0 ST", "O", "P", " w1", "STOP"]

    def script(_spec):
        return words(*texts, finish=FinishCode.STOP_SEQUENCE)

    world = World(engine=ScriptedEngine(script))
    async with grpc_served(world) as served:
        for include in (False, True):
            for stop in (["STOP"], ["none", "P"], []):
                asked = request(stop=stop, include_stop=include)
                whole = (await served.stub.Generate(asked, timeout=30)).sequences[0]
                chunks = await chunks_of(served, asked)
                assert "".join(each.text for each in chunks) == whole.text
                assert chunks[-1].stopped_by == whole.stopped_by
                assert [each.finish_reason for each in chunks[:-1]] == [0] * (len(chunks) - 1)
                assert chunks[-1].finish_reason == whole.finish_reason == pb.FINISH_REASON_STOP


@in_loop
async def test_what_ended_a_text_is_told_and_cut_off():
    def script(_spec):
        return words("w0", " w1", " END", finish=FinishCode.STOP_SEQUENCE)

    async with grpc_served(World(engine=ScriptedEngine(script))) as served:
        by_text = await served.stub.Generate(request(stop=[" END"]), timeout=30)
        assert by_text.sequences[0].text == "w0 w1"
        assert by_text.sequences[0].stopped_by.text == " END"
        by_token = await served.stub.Generate(request(stop_token_ids=[102]), timeout=30)
        assert by_token.sequences[0].stopped_by.token_id == 102


@in_loop
async def test_several_sequences_are_told_apart_and_counted_together():
    world = World()
    async with grpc_served(world) as served:
        asked = request(n=3, temperature=0.7, seed=7, max_new_tokens=2)
        answer = await served.stub.Generate(asked, timeout=30)
        assert [each.seed for each in answer.sequences] == [7, 8, 9]
        assert answer.usage.generated_tokens == 6
        chunks = await chunks_of(served, asked)
        by_sequence = {each.sequence: "" for each in chunks}
        for each in chunks:
            by_sequence[each.sequence] += each.text
        assert by_sequence == {0: " w0 w1", 1: " w0 w1", 2: " w0 w1"}
        # Once for all: what belongs to the request, in the first chunk and in the last.
        assert [bool(each.request_id) for each in chunks].count(True) == 1
        assert [each.HasField("usage") for each in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].usage.generated_tokens == 6


@pytest.mark.parametrize(
    ("params", "is_drawn"),
    [({}, False), ({"temperature": 1.0}, True), ({"temperature": 0.0}, False), ({"top_k": 1}, True),
     ({"temperature": 0.0, "top_p": 0.5}, False), ({"seed": 3}, False),
     ({"repetition_penalty": 1.1}, False)],
)  # fmt: skip
def test_tokens_are_drawn_when_a_field_for_that_is_given(params, is_drawn):
    @in_loop
    async def scene():
        world = World()
        async with grpc_served(world) as served:
            await served.stub.Generate(request(**params), timeout=30)
            assert world.engine.submitted[0].sampling.do_sample is is_drawn

    scene()


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        (pb.Constraint(json_schema='{"type": "array"}'), schema({"type": "array"})),
        (pb.Constraint(json_object=True), schema({"type": "object"})),
        (pb.Constraint(regex="a+"), regex("a+")),
        (pb.Constraint(grammar='start: "a"'), lark('start: "a"')),
        (pb.Constraint(choice=pb.Choice(texts=["a", "b"])), choice("a", "b")),
    ],
)
def test_an_output_is_bound_to_what_is_asked_for(constraint, expected):
    @in_loop
    async def scene():
        world = World(constraints=AnyConstraints())
        async with grpc_served(world) as served:
            await served.stub.Generate(request(constraint=constraint), timeout=30)
            assert world.engine.submitted[0].constraint == expected

    scene()


@in_loop
async def test_biases_a_least_length_and_the_models_own_logprobs_reach_the_engine():
    world = World()
    async with grpc_served(world) as served:
        asked = request(logit_bias={5: -1.5}, min_new_tokens=2, raw_logprobs=True, watermark=False)
        await served.stub.Generate(asked, timeout=30)
        (spec,) = world.engine.submitted
        assert (spec.sampling.logit_bias.ids, spec.sampling.logit_bias.values) == ((5,), (-1.5,))
        assert spec.stopping.min_new_tokens == 2
        assert spec.sampling.raw_logprobs


@in_loop
async def test_a_prompt_alone_is_computed_and_told():
    def script(spec):
        size = len(spec.prompt_ids)
        prompt = TokenColumns(
            list(spec.prompt_ids),
            [float("nan"), *[-1.0] * (size - 1)],
            ["p"] * size,
            [False] * size,
        )
        best = [Alternatives([], [], []), *[Alternatives([7], [-0.1], ["w7"])] * (size - 1)]
        yield TokenChunk(
            TokenColumns(), finish=FinishCode.LENGTH, generated_text="", prompt_tokens=prompt,
            prompt_alternatives=best,
        )  # fmt: skip

    world = World(engine=ScriptedEngine(script))
    async with grpc_served(world) as served:
        asked = request(max_new_tokens=0, return_prompt_tokens=True, num_prompt_alternatives=1)
        answer = await served.stub.Generate(asked, timeout=30)
        assert world.engine.submitted[0].output is OutputKind.PROMPT
        assert answer.sequences[0].text == ""
        assert answer.usage.generated_tokens == 0
        assert [each.id for each in answer.prompt_tokens] == [900, 1, 2]
        assert not answer.prompt_tokens[0].alternatives
        assert answer.prompt_tokens[1].alternatives[0].text == "w7"


@in_loop
async def test_a_chat_streams_its_content():
    world = World()
    async with grpc_served(world) as served:
        call = served.stub.ChatStream(chat("w1", max_new_tokens=3), timeout=30)
        chunks = [each async for each in call]
        assert "".join(each.content for each in chunks) == " w0 w1 w2"
        assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH


@in_loop
async def test_what_templates_take_is_what_messages_say():
    template = (
        "{% for m in messages %}{% for part in m.content %}{% endfor %}{% endfor %}{{ messages | tojson }}|{{ tools | tojson }}|{{ size }}|{{ ratio }}|{{ thinks }}|"
        "{{ add_generation_prompt }}"
    )
    world = World(template=template, bounds=limits(max_input_length=900, max_total_tokens=999))
    rendered: list[str] = []
    encode = world.tokenizer.encode

    async def noted(asked: TextToEncode) -> EncodedText:
        rendered.append(asked.text)
        return await encode(asked)

    world.tokenizer.encode = noted
    sent = json_format.ParseDict(
        {
            "messages": [
                {"role": "system", "parts": [{"text": "Be"}, {"text": "brief"}]},
                {"role": "assistant", "tool_calls": [
                    {"id": "c1", "name": "f", "arguments": '{"x": 1}'}]},
                {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "f"},
            ],
            "tools": [{"name": "f", "description": "d", "parameters_schema":
                       '{"type": "object", "properties": {"b": {"minimum": 1}, "a": {}}}'}],
            "template_kwargs": {"size": 3, "ratio": 0.5, "thinks": False},
            "parameters": {"max_new_tokens": 1},
        },
        pb.ChatRequest(),
    )  # fmt: skip
    async with grpc_served(world) as served:
        await served.stub.Chat(sent, timeout=30)
    text = rendered[0]
    assert '{"role": "system", "content": [{"type": "text", "text": "Be"}' in text
    assert '"function": {"name": "f", "arguments": {"x": 1}}' in text
    assert '"content": "2", "name": "f", "tool_call_id": "c1"' in text
    # A schema keeps its order and its integers, and so do the template's own values.
    assert '"properties": {"b": {"minimum": 1}, "a": {}}' in text
    assert text.endswith("|3|0.5|False|True")


@in_loop
async def test_an_answer_that_was_begun_is_continued():
    world = World()
    async with grpc_served(world) as served:
        begun = chat("w1")
        begun.messages.add(role="assistant", content="w2 w3")
        begun.continue_final_message = True
        await served.stub.Chat(begun, timeout=30)
        # The template's text ends where the message ends.
        assert list(world.engine.submitted[0].prompt_ids)[-2:] == [2, 3]


# --- errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "field", "words_in_it"),
    [
        (request(max_new_tokens=40), "prompt", "at most 30"),
        (request(min_new_tokens=5, max_new_tokens=4), "min_new_tokens", "at most"),
        (request(logit_bias={906: 1.0}), "logit_bias", "906 is not a token"),
        (request(constraint=pb.Constraint()), "constraint", "is empty"),
        (request(constraint=pb.Constraint(json_schema="{")), "constraint.json_schema", "no JSON"),
        (request(constraint=pb.Constraint(json_schema="[]")), "constraint.json_schema", "object"),
        (request(constraint=pb.Constraint(regex="")), "constraint.regex", "not empty"),
        (request(constraint=pb.Constraint(choice=pb.Choice())), "constraint.choice", "list"),
        (request(constraint=pb.Constraint(json_object=False)), "constraint.json_object", "false"),
        (request(""), "prompt", "must not be empty"),
        (pb.GenerateRequest(), "prompt", "`text` or `token_ids`"),
        (request("w1 " * 40), "prompt", "at most 20 tokens"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[906])), "prompt", "906 is not a token"),
        (request(temperature=-1.0), "temperature", "negative"),
        (request(top_k=0), "top_k", "from 1"),
        (request(num_alternatives=9999), "num_alternatives", "from 1 to 256"),
        (request(stop=[""]), "stop", "empty"),
        (request(n=0), "n", "from 1"),
        (request(adapter=pb.Adapter(id="a")), "adapter.id", "base model only"),
        (request(merge=pb.AdapterMerge()), "merge", "base model only"),
        (request(adapter=pb.Adapter(id="a\n")), "adapter.id", "control characters"),
    ],
)
def test_a_bad_value_is_refused_by_its_name_here(sent, field, words_in_it):
    @in_loop
    async def scene():
        world = World()
        async with grpc_served(world) as served:
            for call in (served.stub.Generate, served.stub.GenerateStream):
                found = await refused(call(sent, timeout=30))
                assert (found.code, found.reason) == ("INVALID_ARGUMENT", "VALIDATION")
                assert found.field == field
                assert words_in_it in found.text
            # Counted once each, whichever part of the house refused it.
            assert world.metric("lorax_request_count_total") == 2
            assert world.metric("lorax_request_failure_total", err="validation") == 2

    scene()


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (pb.ChatRequest(), "messages"),
        (pb.ChatRequest(messages=[pb.ChatMessage(content="x")]), "messages.0.role"),
        (chat("w1", return_prompt_tokens=True), "return_prompt_tokens"),
        (
            pb.ChatRequest(
                messages=[pb.ChatMessage(role="user", content="x")],
                tools=[pb.Tool(name="f", parameters_schema="[1]")],
            ),
            "tools.0.parameters_schema",
        ),
    ],
)
def test_a_bad_chat_is_refused(sent, field):
    @in_loop
    async def scene():
        async with grpc_served(World()) as served:
            found = await refused(served.stub.ChatStream(sent, timeout=30))
            assert (found.code, found.field) == ("INVALID_ARGUMENT", field)

    scene()


@pytest.mark.parametrize(
    ("error", "code", "reason", "text"),
    [
        (GenerationError("kernel x", public="the row failed"), "ABORTED", "GENERATION", "row fail"),
        (ShardError("rank 1 at /tmp/x"), "ABORTED", "GENERATION", "a shard failed"),
        (LoraxError("secret", public=""), "INTERNAL", "INTERNAL", "Internal error"),
    ],
)
def test_what_fails_inside_tells_nothing_of_the_inside(error, code, reason, text):
    @in_loop
    async def scene():
        world = World(engine=ScriptedEngine(lambda _spec: failure(error)))
        async with grpc_served(world) as served:
            for call in (served.stub.Generate, served.stub.GenerateStream):
                found = await refused(call(request(), timeout=30))
                assert (found.code, found.reason) == (code, reason)
                assert text in found.text
                assert str(error) not in found.text

    scene()


@in_loop
async def test_an_unexpected_error_is_internal_and_the_server_goes_on():
    world = World()
    async with grpc_served(world) as served:
        world.engine.refusal = RuntimeError("a secret path")
        found = await refused(served.stub.Generate(request(), timeout=30))
        assert (found.code, found.text) == ("INTERNAL", "Internal error")
        world.engine.refusal = None
        assert (await served.stub.Generate(request(), timeout=30)).sequences


@in_loop
async def test_a_stream_that_fails_late_has_sent_what_it_had():
    def script(_spec):
        yield from list(words(" w0", " w1", " w2"))[:2]
        yield from failure(GenerationError("x"))

    async with grpc_served(World(engine=ScriptedEngine(script))) as served:
        call = served.stub.GenerateStream(request(), timeout=30)
        read = [await call.read(), await call.read()]
        assert [each.text for each in read] == [" w0", " w1"]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert refusal_of(raised.value).code == "ABORTED"


@in_loop
async def test_overload_says_when_to_try_again_before_the_request_is_read():
    world = World(max_concurrent_requests=1)
    world.engine.open.clear()
    async with grpc_served(world) as served:
        running = asyncio.ensure_future(served.stub.Generate(request(), timeout=30))
        await until(lambda: world.engine.submitted)
        found = await refused(served.stub.Generate(request(), timeout=30))
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert found.retry_s == OverloadedError.kind.retry_after_s
        world.engine.open.set()
        await running


@in_loop
async def test_a_draining_server_says_so():
    world = World()
    world.service.stop_admitting()
    async with grpc_served(world) as served:
        found = await refused(served.stub.Generate(request(), timeout=30))
        assert (found.code, found.reason, found.retry_s) == ("UNAVAILABLE", "SHUTTING_DOWN", 5)


@in_loop
async def test_a_long_text_with_any_characters_fits_into_a_status():
    """Metadata holds 8 kB, and a status has its text more than once."""
    world = World()
    async with grpc_served(world) as served:
        sent = request(merge=pb.AdapterMerge(strategy="\N{GRINNING FACE}" * 9_000))
        found = await refused(served.stub.Generate(sent, timeout=30))
        assert found.code == "INVALID_ARGUMENT"
        world.engine.refusal = GenerationError("\N{GRINNING FACE}" * 9_000)
        found = await refused(served.stub.Generate(request(), timeout=30))
        assert found.text.endswith("\N{GRINNING FACE}…")


# --- metadata ---------------------------------------------------------------------


@in_loop
async def test_a_calls_id_comes_back_in_answers_errors_and_metadata():
    async with grpc_served(World()) as served:
        named = (("x-request-id", "my-own-7"),)
        call = served.stub.Generate(request(), metadata=named, timeout=30)
        assert (await call).request_id == "my-own-7"
        assert dict(await call.initial_metadata())["x-request-id"] == "my-own-7"
        found = await refused(served.stub.Generate(request(n=0), metadata=named, timeout=30))
        assert found.request_id == "my-own-7"
        stream = served.stub.GenerateStream(request(), metadata=named, timeout=30)
        assert [each.request_id for each in [one async for one in stream] if each.request_id] == [
            "my-own-7"
        ]


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129])
def test_an_id_that_is_none_gets_one_of_the_servers(bad):
    @in_loop
    async def scene():
        async with grpc_served(World()) as served:
            named = (("x-request-id", bad),)
            answer = await served.stub.Generate(request(), metadata=named, timeout=30)
            assert len(answer.request_id) == 32

    scene()


@in_loop
async def test_what_is_no_message_is_refused():
    async with grpc_served(World()) as served:
        raw = served.channel.unary_unary("/lorax.v1.Lorax/Generate")
        found = await refused(raw(b"\xff\xff\xff", timeout=30))
        assert (found.code, found.reason) == ("INVALID_ARGUMENT", "BAD_REQUEST")
        none = served.channel.stream_unary("/lorax.v1.Lorax/Generate")
        found = await refused(none(iter(()), timeout=30))
        assert "without a request" in found.text


@in_loop
async def test_info_tells_model_and_limits():
    async with grpc_served(World()) as served:
        info = await served.stub.Info(pb.InfoRequest(), timeout=30)
        assert (info.model_id, info.version) == ("tests/tiny", "0.0.test")
        assert (info.max_input_tokens, info.max_total_tokens) == (20, 30)
