"""On what terms a call comes, and what was in the cache."""

from __future__ import annotations

from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, words

from lorax_proto import lorax_pb2 as pb
from lorax_router.core.request import RequestTerms


@in_loop
async def test_terms_go_in_and_cached_tokens_come_out():
    terms: list[RequestTerms] = []

    class Noting(ScriptedEngine):
        def submit(self, spec, given):
            terms.append(given)
            return super().submit(spec, given)

    def script(_spec):
        for chunk in words("w0", "w1"):
            chunk.num_cached_tokens = 2
            yield chunk

    async with grpc_served(World(engine=Noting(script))) as served:
        parameters = pb.Parameters(max_new_tokens=2, priority=-3, cache_salt="mine")
        asked = pb.GenerateRequest(text="w1 w2", parameters=parameters)
        answer = await served.stub.Generate(asked, timeout=30)
        assert (answer.usage.prompt_tokens, answer.usage.cached_tokens) == (3, 2)
        chunks = [each async for each in served.stub.GenerateStream(asked, timeout=30)]
        assert chunks[-1].usage.cached_tokens == 2
        said = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="w1")])
        answer = await served.stub.Chat(said, timeout=30)
        assert answer.usage.cached_tokens == 2
    assert [(each.priority, each.cache_salt) for each in terms] == [
        (-3, "mine"), (-3, "mine"), (0, ""),
    ]  # fmt: skip


@in_loop
async def test_terms_that_make_no_sense_are_refused_by_their_names():
    async with grpc_served(World()) as served:
        parameters = pb.Parameters(cache_salt="x" * 5000)
        asked = pb.GenerateRequest(text="w1", parameters=parameters)
        refusal = await refused(served.stub.Generate(asked, timeout=30))
        assert "cache_salt" in str(refusal)
