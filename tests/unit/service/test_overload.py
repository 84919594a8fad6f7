"""Requests that there is no place or no time for, in the inference service."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from tests.helpers.http_app import World

from lorax_contract.errors import DeadlineError, QueueFullError, ValidationError
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt


def request(**params: Any) -> GenerateRequest:
    return GenerateRequest(prompt=TextPrompt("w1 w2"), parameters=GenerateParameters(**params))


def test_what_the_queue_refuses_costs_no_tokens():
    async def run() -> None:
        world = World()
        caller = Caller(tenant="a", quotas=Quotas(tokens_per_minute=60))
        world.engine.full = QueueFullError("full")
        with pytest.raises(QueueFullError):
            await world.service.generate(dataclasses.replace(request(), caller=caller))
        world.engine.full = None
        await world.service.generate(dataclasses.replace(request(), caller=caller))
        assert world.metric("lorax_tenant_tokens_total", tenant="a", kind="prompt") == 3

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_of_sequences_of_which_one_is_refused_none_goes_on(is_stream):
    async def run() -> None:
        world = World()
        submit = world.engine.submit

        def two_at_most(spec: Any, terms: Any) -> Any:
            if len(world.engine.submitted) == 2:
                raise DeadlineError("too late")
            return submit(spec, terms)

        world.engine.submit = two_at_most
        call = world.service.generate_stream if is_stream else world.service.generate
        with pytest.raises(DeadlineError):
            await call(request(n=3, do_sample=True))
        assert sorted(world.engine.cancelled) == [1, 2]
        await world.service.wait_idle()

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_request_whose_time_is_over_before_it_has_tokens_ends_there(is_stream):
    async def run() -> None:
        world = World()

        async def never(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        world.validator.complete = never
        call = world.service.generate_stream if is_stream else world.service.generate
        with pytest.raises(DeadlineError, match="is over"):
            await call(request(timeout_s=0.02))
        await world.service.wait_idle()
        assert world.metric("lorax_request_rejected_total", tenant="", reason="deadline") == 1

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(seconds):
    async def run() -> None:
        with pytest.raises(ValidationError, match="timeout must be above 0"):
            await World().service.generate(request(timeout_s=seconds))

    asyncio.run(run())
