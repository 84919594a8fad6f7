"""Too much waits, or too little time is left: what gRPC's clients are told."""

from __future__ import annotations

from time import perf_counter

import pytest
from tests.helpers.grpc_calls import grpc_served, refused
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop

from lorax_contract.errors import BusyError, DeadlineError, LoraxError, QueueFullError
from lorax_proto import lorax_pb2 as pb


def request() -> pb.GenerateRequest:
    return pb.GenerateRequest(text="w1", parameters=pb.Parameters(max_new_tokens=2))


FULL = QueueFullError("3 requests of yours wait already", retry_after_s=17)
BUSY = BusyError(retry_after_s=23)


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "seconds"), [(FULL, "RESOURCE_EXHAUSTED", 17), (BUSY, "UNAVAILABLE", 23)]
)
def test_who_finds_no_place_is_told_when_to_come_back_in_details_and_in_the_trailer(
    name: str, early: bool, error: LoraxError, code: str, seconds: int
) -> None:
    @in_loop
    async def scene() -> None:
        world = World()
        if early:
            world.engine.full = error
        else:
            world.engine.refusal = error
        async with grpc_served(world) as served:
            call = getattr(served.stub, name)(request(), timeout=30)
            found = await refused(call)
            assert (found.code, found.retry_s) == (code, seconds)
            # What gRPC's own retries go by.
            trailers = dict(await call.trailing_metadata())
            assert trailers["grpc-retry-pushback-ms"] == str(seconds * 1000)
        assert world.metric("lorax_request_count_total") == 1

    scene()


@in_loop
async def test_who_would_be_too_late_hears_so_in_words_and_is_not_made_to_try_again() -> None:
    world = World()
    world.engine.refusal = DeadlineError("its first token is at least 9 s away")
    async with grpc_served(world) as served:
        call = served.stub.Generate(request(), timeout=30)
        found = await refused(call)
        assert (found.code, found.reason, found.retry_s) == ("DEADLINE_EXCEEDED", "DEADLINE", None)
        assert "at least 9 s away" in found.text
        assert "grpc-retry-pushback-ms" not in dict(await call.trailing_metadata())


@pytest.mark.parametrize("name", ["Generate", "GenerateStream"])
def test_the_deadline_of_a_call_is_that_of_its_request(name: str) -> None:
    @in_loop
    async def scene() -> None:
        world, before = World(), perf_counter()
        async with grpc_served(world) as served:
            call = getattr(served.stub, name)(request(), timeout=20)
            if name == "Generate":
                await call
            else:
                async for _ in call:
                    pass
        (terms,) = world.engine.terms
        # On the wire a time is rounded up to one of few digits.
        assert before + 19 < terms.deadline < perf_counter() + 21

    scene()


@in_loop
async def test_a_call_without_a_deadline_has_none() -> None:
    world = World()
    async with grpc_served(world) as served:
        await served.stub.Generate(request())
    (terms,) = world.engine.terms
    assert terms.deadline == float("inf")
