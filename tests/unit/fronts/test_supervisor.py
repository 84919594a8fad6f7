"""Fronts that do not start, or end again and again."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import psutil
import pytest
from tests.helpers.http_app import World, until
from tests.helpers.in_loop import in_loop

from lorax_contract.config import RouterConfig
from lorax_contract.errors import StartupError
from lorax_router.fronts import front_process, supervisor
from lorax_router.fronts.desk import CoreParts
from lorax_router.fronts.plan import FrontPlan
from lorax_router.fronts.supervisor import Fronts
from lorax_router.service.adapters.aliases import AliasBook


def fronts_of(number: int, listener: socket.socket) -> Fronts:
    world = World()
    parts = CoreParts(
        service=world.service, counts=world.service.ledger, app=world.app, aliases=AliasBook()
    )
    plans = [
        FrontPlan(
            config=RouterConfig(model_id="m", tokenizer_dir="", shard_uri=""),
            number=each,
            max_connections=10,
            model_device_type="cpu",
            adapter_refusal=None,
            max_total_tokens=30,
        )
        for each in range(1, number + 1)
    ]
    return Fronts(plans, parts, listener)


def bound() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


@in_loop
async def test_a_front_that_does_not_start_ends_the_start(monkeypatch):
    # A module that ends at once.
    monkeypatch.setattr(front_process, "_MODULE", "lorax_router.fronts.plan")
    with bound() as listener, pytest.raises(StartupError, match="front . does not start"):
        await fronts_of(2, listener).run()


@in_loop
async def test_the_start_ends_where_no_process_can_be_had(monkeypatch):
    monkeypatch.setattr(front_process.sys, "executable", "/nowhere/python")
    with bound() as listener, pytest.raises(StartupError, match="--http-workers 0"):
        await fronts_of(1, listener).run()


@in_loop
async def test_fronts_that_keep_ending_are_started_ever_more_seldom(monkeypatch):
    pauses: list[float] = []
    real = asyncio.timeout

    def noted(delay: float | None) -> Any:
        if delay is not None and delay < supervisor._END_S:
            pauses.append(delay)
            return real(min(delay, 0.01))
        return real(delay)

    with bound() as listener:
        fronts = fronts_of(1, listener)
        running = asyncio.create_task(fronts.run())
        await fronts.wait_started()
        monkeypatch.setattr(supervisor.asyncio, "timeout", noted)
        for number in range(1, 4):
            (front,) = fronts._serving
            psutil.Process(front.pid).kill()
            await until(lambda front=front: fronts._serving and front not in fronts._serving)
            assert fronts.num_restarts() == number
        assert pauses == [0.2, 0.4, 0.8]
        monkeypatch.undo()
        fronts.stop()
        await asyncio.wait_for(running, 30)


@in_loop
async def test_a_front_that_leaves_all_unread_is_ended_and_another_comes(monkeypatch):
    with bound() as listener:
        fronts = fronts_of(1, listener)
        running = asyncio.create_task(fronts.run())
        await fronts.wait_started()
        (front,) = fronts._serving
        process = psutil.Process(front.pid)
        process.suspend()
        # Whatever it is: nobody reads it.
        for _ in range(80):
            front._send(bytes(1 << 20))
            await asyncio.sleep(0)
        await until(lambda: fronts._serving and front not in fronts._serving)
        assert not process.is_running()
        assert fronts.num_restarts() == 1
        fronts.stop()
        await asyncio.wait_for(running, 30)
