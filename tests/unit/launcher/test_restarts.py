"""Shards and routers that end start again, as often as that is allowed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.helpers.launcher_stage import Stage, kill_children_of, stop

from lorax_contract.exit_codes import ExitCode
from lorax_launcher.restarts import SETTLED_S, Restarts
from lorax_launcher.supervisor import Supervisor


def test_shards_that_are_killed_start_again_under_the_next_epoch(stage: Stage) -> None:
    killed: list[int] = []
    epochs: list[int] = []

    def kill_or_stop(supervisor: Supervisor) -> None:
        argv = stage.seen("shard")["argv"]
        config = json.loads(Path(argv[argv.index("--config") + 1]).read_text())
        epochs.append(config["epoch"])
        if len(killed) == 2:
            supervisor.request_stop()
            return
        killed.append(stage.pid("shard"))
        os.kill(killed[-1], signal.SIGKILL)

    router = []

    def first(supervisor: Supervisor) -> None:
        router.append(stage.pid("router"))
        kill_or_stop(supervisor)

    code = stage.run(when_ready=first, on_again=kill_or_stop, restarts=2)
    assert code == ExitCode.OK
    assert len({*killed, stage.pid("shard")}) == 3
    assert stage.pid("router") == router[0]
    assert epochs == [1, 2, 3]
    text = stage.output.getvalue()
    assert "shard-0 was killed by SIGKILL" in text
    assert "start again (2 of 2)" in text


def test_a_restart_is_an_event_with_what_ended_and_the_next_epoch(stage: Stage) -> None:
    told: list[dict[str, Any]] = []

    def first(supervisor: Supervisor) -> None:
        error, info = supervisor._console.error, supervisor._console.info
        supervisor._console.error = lambda text, **fields: (
            told.append(fields),
            error(text, **fields),
        )
        supervisor._console.info = lambda text, **fields: (
            told.append(fields),
            info(text, **fields),
        )
        os.kill(stage.pid("shard"), signal.SIGKILL)

    assert stage.run(when_ready=first, on_again=stop, restarts=3) == ExitCode.OK
    restart, again = [each for each in told if each.get("event", "").startswith("restart")]
    assert restart == {
        "event": "restart", "epoch": 2, "child": "shard-0", "code": restart["code"],
        "number": 1, "limit": 3, "pause_s": 0.0,
    }  # fmt: skip
    assert again == {"event": "restarted", "epoch": 2}


def test_after_so_many_restarts_the_server_ends_and_says_so(stage: Stage) -> None:
    code = stage.run(
        when_ready=kill_children_of(stage, "shard"),
        on_again=kill_children_of(stage, "shard"),
        restarts=1,
    )
    assert code == ExitCode.CHILD_DIED
    assert "shard-0 was killed" in stage.last_line
    assert "started again 1 times without serving for 10 s" in stage.last_line


def test_shards_that_cannot_start_again_are_tried_as_often_as_that(stage: Stage) -> None:
    def break_and_kill(_: Supervisor) -> None:
        stage.plan_behaviour(shard={"kind": "fail", "code": 99})
        os.kill(stage.pid("shard"), signal.SIGKILL)

    code = stage.run(when_ready=break_and_kill, restarts=2)
    assert code == ExitCode.CHILD_DIED
    assert stage.output.getvalue().count("The shards start again") == 2
    assert "exit code 99" in stage.last_line


def test_shards_that_run_but_do_not_answer_the_router_start_again(stage: Stage) -> None:
    said = {"ts": 0.0, "level": "error", "logger": "x", "message": "the shards are lost",
            "event": "shards_lost", "epoch": 1, "reason": "a step hung"}  # fmt: skip
    stage.plan_behaviour(router={"kind": "serve", "lines": [json.dumps(said)]})
    assert stage.run(on_again=stop, restarts=1) == ExitCode.OK
    assert "shard-0 was killed: a step hung." in stage.output.getvalue()


def config_of(stage: Stage, role: str) -> dict[str, Any]:
    argv = stage.seen(role)["argv"]
    return json.loads(Path(argv[argv.index("--config") + 1]).read_text())


def test_a_router_that_ends_starts_again_where_it_was_and_the_shards_stay(stage: Stage) -> None:
    shards, ports = [], []

    def kill(_: Supervisor) -> None:
        shards.append(stage.pid("shard"))
        os.kill(stage.pid("router"), signal.SIGKILL)

    def look(supervisor: Supervisor) -> None:
        shards.append(stage.pid("shard"))
        config = config_of(stage, "router")
        ports.append((config["port"], config["metrics_port"], config["epoch"]))
        supervisor.request_stop()

    assert stage.run(when_ready=kill, on_again=look, restarts=5) == ExitCode.OK
    assert shards[0] == shards[1]
    assert ports == [(4567, 4568, 2)]
    text = stage.output.getvalue()
    assert "router was killed by SIGKILL" in text
    assert "The router starts again (1 of 5)" in text


def test_shards_that_were_ready_once_are_not_probed_again(stage: Stage) -> None:
    """They compute by what the probe left them."""
    told = []

    def look(supervisor: Supervisor) -> None:
        config = config_of(stage, "shard")
        told.append((config["was_probed"], config["elementwise_backend"]))
        if len(told) == 2:
            supervisor.request_stop()
        else:
            os.kill(stage.pid("shard"), signal.SIGKILL)

    assert stage.run(when_ready=look, on_again=look, restarts=5) == ExitCode.OK
    assert told == [(False, "auto"), (True, "torch")]


def test_router_and_shards_that_end_together_both_start_again(stage: Stage) -> None:
    before, after = [], []

    def kill(_: Supervisor) -> None:
        for role in ("router", "shard"):
            before.append(stage.pid(role))
            os.kill(stage.pid(role), signal.SIGKILL)

    def look(supervisor: Supervisor) -> None:
        after.extend(stage.pid(role) for role in ("router", "shard"))
        if not {*before} & {*after}:
            supervisor.request_stop()
        after.clear()

    assert stage.run(when_ready=kill, on_again=look, restarts=5) == ExitCode.OK


def test_a_router_that_cannot_start_again_is_tried_as_often_as_that(stage: Stage) -> None:
    def break_and_kill(_: Supervisor) -> None:
        stage.plan_behaviour(router={"kind": "fail", "code": 99})
        os.kill(stage.pid("router"), signal.SIGKILL)

    code = stage.run(when_ready=break_and_kill, restarts=2)
    assert code == ExitCode.CHILD_DIED
    assert stage.output.getvalue().count("The router starts again") == 2
    assert "exit code 99" in stage.last_line


def test_shards_that_end_while_the_router_starts_again_start_again_too(stage: Stage) -> None:
    pids = []

    def kill_router(_: Supervisor) -> None:
        pids.append(stage.pid("shard"))
        stage.plan_behaviour(router={"kind": "unready"})
        os.kill(stage.pid("router"), signal.SIGKILL)

    async def stop_when_both_are_others(supervisor: Supervisor, router: int) -> None:
        while pids[0] == stage.pid("shard") or router == stage.pid("router"):
            await asyncio.sleep(0.01)
        supervisor.request_stop()

    def kill_shard(supervisor: Supervisor) -> None:
        stage.plan_behaviour()
        os.kill(pids[0], signal.SIGKILL)
        router = stage.pid("router")
        waiting.append(asyncio.ensure_future(stop_when_both_are_others(supervisor, router)))

    waiting: list[asyncio.Future[None]] = []
    code = stage.run(
        when_ready=kill_router, on_again=kill_shard, again="loading for ever", restarts=5
    )
    assert code == ExitCode.OK
    assert "Router and shards start again" in stage.output.getvalue()


def test_a_signal_ends_a_restart_too(stage: Stage) -> None:
    def hang_and_kill(_: Supervisor) -> None:
        stage.plan_behaviour(shard={"kind": "unready"})
        os.kill(stage.pid("shard"), signal.SIGKILL)

    code = stage.run(when_ready=hang_and_kill, on_again=stop, again="loading for ever", restarts=5)
    assert code == ExitCode.OK


def test_a_series_of_restarts_ends_by_service_alone() -> None:
    now = 0.0
    restarts = Restarts(4, clock=lambda: now)
    pauses = []
    for _ in range(5):
        pauses.append(restarts.next_pause_s())
        # However long starts take that fail.
        now += SETTLED_S
    assert pauses == [0.0, 0.0, 0.0, 0.5, None]
    restarts.ready()
    now += SETTLED_S / 2
    assert restarts.next_pause_s() is None
    restarts.ready()
    now += SETTLED_S + 1
    assert restarts.next_pause_s() == 0.0
    assert Restarts(0).next_pause_s() is None
