"""The public gRPC service over replicas: the answers of one router, streams that outlive theirs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.helpers.adapter_world import HEADS
from tests.helpers.grpc_calls import Served, grpc_served, refused
from tests.helpers.in_loop import in_loop
from tests.helpers.replicas import Replicas, replicas

from lorax_contract.errors import LoraxError
from lorax_contract.step import OutputKind
from lorax_ingress.app import IngressCounts
from lorax_ingress.messages import FleetServicer
from lorax_proto import lorax_pb2 as pb

TEMPLATE = "{% for each in messages %}{{ each['content'] }} {% endfor %}"
SAMPLED = {"temperature": 0.9, "seed": 7, "n": 3, "return_tokens": True}
WAYS: list[dict[str, Any]] = [
    {}, {"return_tokens": True}, SAMPLED, {"num_alternatives": 2}, {"stop": [" t7"]},
    {"adapter": pb.Adapter(id="poet", source="local")},
]  # fmt: skip


def params(num: int = 6, **values: Any) -> pb.Parameters:
    return pb.Parameters(max_new_tokens=num, ignore_eos_token=True, **values)


def text(num: int = 6, **values: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="w1 w2", parameters=params(num, **values))


def chat(**values: Any) -> pb.ChatRequest:
    messages = [pb.ChatMessage(role="user", content="w1 w2")]
    return pb.ChatRequest(messages=messages, parameters=params(**values))


@contextlib.asynccontextmanager
async def over(made: Replicas) -> AsyncIterator[Served]:
    counts = IngressCounts(made.fleet._metrics)
    servicer = FleetServicer(made.service, counts, made.fleet)
    async with grpc_served(servicer) as served:
        yield served


def plain(answer: Any) -> Any:
    """An answer without what differs each time, which it has."""
    for name in ("request_id", "timings"):
        answer.ClearField(name)
    return answer


async def answers(served: Served) -> list[Any]:
    """One of each kind in each way."""
    found: list[Any] = []
    for way in WAYS:
        found.append(await served.stub.Generate(text(**way), timeout=30))
        found += [each async for each in served.stub.GenerateStream(text(**way), timeout=30)]
        found.append(await served.stub.Chat(chat(**way), timeout=30))
        found += [each async for each in served.stub.ChatStream(chat(**way), timeout=30)]
    for name in ("judge", "tagger"):
        adapter = pb.Adapter(id=name, source="local")
        embedding = pb.EmbedRequest(text="w1 w2", adapter=adapter)
        found.append(await served.stub.Embed(embedding, timeout=30))
        classifying = pb.ClassifyRequest(text="w1 w2", adapter=adapter)
        found.append(await served.stub.Classify(classifying, timeout=30))
    return found


@in_loop
async def test_answers_are_those_of_one_router() -> None:
    async with replicas(2, template=TEMPLATE) as made, over(made) as served:
        world = made.by_name["r0"].world
        async with grpc_served(world.parts.servicer) as direct:
            expected = await answers(direct)
        found = await answers(served)
        timed = [each.timings for each in found if each.HasField("timings")]
        assert len(timed) == 4 * len(WAYS) + 4
        assert all(each.total_s >= each.first_token_s > 0 for each in timed)
        assert [*map(_without_cache, found)] == [*map(_without_cache, expected)]


@in_loop
async def test_heads_are_told_through_an_ingress() -> None:
    async with replicas(2) as made:
        world = made.by_name["r0"].world
        for name in ("judge", "tagger", "poet"):
            request = world.request(name, 0, output=OutputKind.VECTOR)
            assert await made.service.head_of(request) == HEADS.get(name)


def _without_cache(answer: Any) -> Any:
    answer.usage.cached_tokens = 0
    return plain(answer)


@in_loop
async def test_a_stream_outlives_its_replica() -> None:
    async with replicas(2) as made, over(made) as served:
        asked = text(150, return_tokens=True, temperature=0.9, seed=7)
        expected = [each async for each in served.stub.GenerateStream(asked, timeout=30)]
        found = []
        async for each in served.stub.GenerateStream(asked, timeout=30):
            found.append(each)
            if len(found) == 3:
                await made.kill(made.places()[0])
        ids = [[token.id for each in run for token in each.tokens] for run in (expected, found)]
        assert ids[0] == ids[1]
        assert len(ids[0]) == 150
        assert "".join(each.text for each in found) == "".join(each.text for each in expected)
        last = found[-1]
        assert (last.seed, last.finish_reason) == (7, pb.FINISH_REASON_LENGTH)
        assert last.usage.generated_tokens == 150
        assert last.timings.total_s > last.timings.first_token_s > 0


@in_loop
async def test_sequences_that_go_on_apart_keep_their_seeds() -> None:
    async with replicas(2) as made, over(made) as served:
        asked = text(150, **SAMPLED)
        kept: dict[int, list[int]] = {}
        seeds: dict[int, int] = {}
        num = 0
        async for each in served.stub.GenerateStream(asked, timeout=30):
            kept.setdefault(each.sequence, []).extend(token.id for token in each.tokens)
            if each.finish_reason:
                seeds[each.sequence] = each.seed
            num += 1
            if num == 2:
                await made.kill(made.places()[0])
        whole = await served.stub.Generate(asked, timeout=30)
        assert seeds == {0: 7, 1: 8, 2: 9}
        assert [kept[each] for each in range(3)] == [
            [token.id for token in each.tokens] for each in whole.sequences
        ]


@in_loop
async def test_what_does_not_generate_is_answered_by_a_replica() -> None:
    asked: list[tuple[str, Any]] = [
        ("Info", pb.InfoRequest()),
        ("Tokenize", pb.TokenizeRequest(text="w1 w2")),
        ("Detokenize", pb.DetokenizeRequest(ids=[5, 6])),
        ("ListAdapters", pb.ListAdaptersRequest(page_size=1)),
    ]
    async with replicas(2) as made, over(made) as served:
        world = made.by_name["r0"].world
        async with grpc_served(world.parts.servicer) as direct:
            for name, request in asked:
                expected = await getattr(direct.stub, name)(request, timeout=30)
                found = await getattr(served.stub, name)(request, timeout=30)
                assert type(found) is type(expected)
                if name == "ListAdapters":
                    assert len(found.adapters) == 1
                else:
                    assert found == expected
            # What is wrong with a call, the replica says in its words.
            for name, request in (
                ("Tokenize", pb.TokenizeRequest()),
                ("LoadAdapter", pb.LoadAdapterRequest(adapter=pb.Adapter(id="poet"))),
                ("Generate", pb.GenerateRequest()),
            ):
                refusals = [
                    await refused(getattr(each.stub, name)(request, timeout=30))
                    for each in (direct, served)
                ]
                for each in refusals:
                    each.request_id = ""
                assert refusals[0] == refusals[1]


@in_loop
async def test_without_replicas_nothing_is_served() -> None:
    async with replicas(1, wait_s=0.2) as made, over(made) as served:
        health = health_pb2_grpc.HealthStub(served.channel)
        status = health_pb2.HealthCheckResponse
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == status.SERVING
        following = asyncio.create_task(served.server.follow_health())
        served.server._interval_s = 0.01
        await made.kill("r0")
        watched = [each async for each in _until(health, status.NOT_SERVING)]
        assert watched[-1] == status.NOT_SERVING
        for call in (
            served.stub.Info(pb.InfoRequest(), timeout=30),
            served.stub.Generate(text(), timeout=30),
        ):
            assert (await refused(call)).code == "UNAVAILABLE"
        following.cancel()


async def _until(health: Any, wanted: int) -> AsyncIterator[int]:
    async for each in health.Watch(health_pb2.HealthCheckRequest(), timeout=30):
        yield each.status
        if each.status == wanted:
            return


@in_loop
async def test_a_replica_of_an_earlier_version_is_not_asked_what_it_does_not_know() -> None:
    async with replicas(2) as made, over(made) as served:
        import msgspec

        former = made.by_name["r0"]
        former.facts = msgspec.structs.replace(former.facts, takes_messages=False)

        async def fail(*_: object) -> bytes:
            raise LoraxError("it was asked")

        former.messages.answer = fail  # type: ignore[method-assign]
        for _ in range(4):
            assert (await served.stub.Info(pb.InfoRequest(), timeout=30)).model_id == "fake"
        made.by_name["r1"].facts = former.facts
        assert (await refused(served.stub.Info(pb.InfoRequest(), timeout=30))).code == "UNAVAILABLE"
