"""Limited processes: asked, ended, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.limited_process import BOUNDS, MODULE, limited, nursery

from lorax_contract.errors import LoraxError
from lorax_router.service.processes import limited_process
from lorax_router.service.processes.limited_process import ProcessLostError
from lorax_router.service.processes.nursery import Nursery


@pytest.fixture(autouse=True)
def _module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())


@in_loop
async def test_questions_and_bytes_go_in_and_answers_come_out() -> None:
    async with limited() as process:
        for value in ({"a": [1, None, "ü\n\x00\ud800"]}, "x" * (3 << 20)):
            answer = await process.ask({"echo": value}, [b"\x00" * 70_000, b""], deadline_s=20)
            assert answer == {"value": value, "blobs_seen": [70_000, 0], "blobs": []}


@in_loop
async def test_a_question_that_there_is_no_memory_for_is_answered_so_and_is_the_last() -> None:
    async with limited() as process:
        assert await process.ask({"echo": "x" * (90 << 20)}, deadline_s=60) == {
            "memory": "", "blobs": []
        }  # fmt: skip
        with pytest.raises(ProcessLostError):
            await process.ask({"echo": 1}, deadline_s=60)


@in_loop
async def test_what_libraries_print_is_no_answer_and_fills_no_pipe() -> None:
    async with limited() as process:
        assert await process.ask({"print": 1 << 20}, deadline_s=20) == {"blobs": []}


@in_loop
async def test_secrets_of_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "API_KEY"):
        monkeypatch.setenv(name, "secret")
    async with limited() as process:
        names = (await process.ask({"environment": 1}, deadline_s=20))["value"]
    assert "PATH" in names
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "API_KEY"} & set(names)


@in_loop
async def test_it_has_pipes_and_no_sockets() -> None:
    async with limited() as process:
        files = (await process.ask({"files": 1}, deadline_s=20))["value"]
    kinds = [name.partition(":")[0] for name in files]
    # What it reads, where what libraries print goes, and what it writes.
    assert kinds == ["pipe", "/dev/null", "/dev/null", "pipe"]


@in_loop
async def test_a_late_answer_ends_the_process() -> None:
    async with limited() as process:
        with pytest.raises(ProcessLostError) as caught:
            await process.ask({"power": 9}, deadline_s=0.2)
        assert caught.value.overdue
        assert not psutil.pid_exists(process.pid)


@in_loop
async def test_what_a_process_does_not_get_of_a_core_is_not_counted_against_it() -> None:
    async with limited() as process:
        # An answer by the clock five times too late, of next to no computing.
        assert await process.ask({"sleep": 1.0}, deadline_s=0.2) == {"blobs": []}
        late: list[float] = []
        timer = process.after_computing(0.1, lambda: late.append(process.computed_s()))
        before = process.computed_s()
        await process.ask({"sleep": 0.5}, deadline_s=20)
        assert not late
        with pytest.raises(ProcessLostError):
            await process.ask({"power": 9}, deadline_s=0.5)
        assert late[0] - before >= 0.1
        timer.close()


@in_loop
async def test_patience_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "PATIENCE_S", 0.3)
    async with limited() as process:
        with pytest.raises(ProcessLostError) as caught:
            await process.ask({"sleep": 60}, deadline_s=20)
        assert caught.value.overdue


@in_loop
async def test_a_caller_that_leaves_ends_the_process() -> None:
    async with limited() as process:
        task = asyncio.create_task(process.ask({"power": 9}, deadline_s=60))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not psutil.pid_exists(process.pid))


@in_loop
async def test_how_it_ended_is_told() -> None:
    async with nursery() as made:
        process = await made.start(BOUNDS)
        with pytest.raises(ProcessLostError, match="with code 3") as caught:
            await process.ask({"leave": 3}, deadline_s=20)
        assert not caught.value.overdue
        process = await made.start(BOUNDS)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ProcessLostError, match="by SIGKILL"):
            await process.ask({"echo": "x" * (1 << 20)}, deadline_s=20)


@in_loop
async def test_a_process_nobody_ends_ends_itself() -> None:
    async with limited(deadline_s=0.0) as process:
        with pytest.raises(ProcessLostError, match="by SIGALRM|by SIGXCPU"):
            await process.ask({"power": 9}, deadline_s=60)


@in_loop
async def test_its_session_gives_way_and_comes_back() -> None:
    async with limited() as process:
        session = Path(f"/proc/{process.pid}/autogroup")
        if not session.exists():
            pytest.skip("sessions share nothing here")
        for nice in (19, 5):
            process.compute_less(nice)
            async with asyncio.timeout(10):
                while not session.read_text().endswith(f" {nice}\n"):
                    await asyncio.sleep(0.01)
        await process.end()
        process.compute_less(7)


@in_loop
async def test_a_module_that_does_not_start_says_why() -> None:
    with pytest.raises(LoraxError, match="No module named"):
        await Nursery("lorax_router.no_such_module").start(BOUNDS)


@in_loop
async def test_processes_of_one_nursery_are_bounded_each_by_its_own() -> None:
    async with nursery() as made:
        small, large = [
            await made.start(replace(BOUNDS, memory_bytes=size << 20)) for size in (16, 256)
        ]
        question = {"echo": "x" * (32 << 20)}
        assert (await small.ask(question, deadline_s=60)).get("memory") == ""
        assert (await large.ask(question, deadline_s=60))["value"] == question["echo"]


@in_loop
async def test_when_a_nursery_is_lost_its_processes_are_and_the_next_start_makes_another() -> None:
    async with nursery() as made:
        process = await made.start(BOUNDS)
        parent = psutil.Process(process.pid).parent()
        assert parent is not None
        parent.kill()
        with pytest.raises(ProcessLostError) as caught:
            await process.ask({"power": 9}, deadline_s=60)
        # So that whoever asked it asks another one.
        assert caught.value.killed
        another = await made.start(BOUNDS)
        assert (await another.ask({"echo": 1}, deadline_s=60))["value"] == 1


@in_loop
async def test_one_whose_start_is_given_up_is_gone() -> None:
    async with nursery() as made:
        process = await made.start(BOUNDS)
        parent = psutil.Process(process.pid).parent()
        assert parent is not None
        for num_turns in range(12):
            task = asyncio.create_task(made.start(BOUNDS))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            if not task.cancel():
                # It was quick.
                await (await task).end()
                continue
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: [each.pid for each in parent.children()] == [process.pid])
        assert (await process.ask({"echo": 1}, deadline_s=60))["value"] == 1


@in_loop
async def test_all_can_be_started_at_once() -> None:
    async with nursery() as made:
        started = await asyncio.gather(*(made.start(BOUNDS) for _ in range(8)))
        answers = await asyncio.gather(
            *(each.ask({"echo": place}, deadline_s=60) for place, each in enumerate(started))
        )
        assert [answer["value"] for answer in answers] == list(range(8))
        assert len({each.pid for each in started}) == 8


@pytest.mark.parametrize(
    "command",
    [
        ["constraints.check_process", "no-such-tokenizer"],
        ["prompts.render_process"],
        ["prompts.encode_process", "1000"],
    ],
)
@in_loop
async def test_what_nurseries_load_starts_no_thread(command: list[str]) -> None:
    """Locks that another thread holds in the moment of a fork are held for ever in the fork."""
    made = Nursery(f"lorax_router.service.{command[0]}", *command[1:])
    process = await made.start(BOUNDS)
    parent = psutil.Process(process.pid).parent()
    assert parent is not None
    assert parent.num_threads() == 1
    await made.close()


@pytest.mark.parametrize("question", [{"power": 9}, {}])
def test_none_is_left_when_the_router_is_killed(question: dict[str, int]) -> None:
    """Neither one that computes nor one that waits."""
    code = (
        f"import asyncio\nfrom {MODULE} import BOUNDS, MODULE, Nursery\n"
        "async def run():\n"
        "    process = await Nursery(MODULE).start(BOUNDS)\n"
        f"    task = asyncio.ensure_future(process.ask({question}, deadline_s=60))\n"
        "    await asyncio.sleep(0)\n"
        "    print(process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(run())\n"
    )
    router = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert router.stdout is not None
    process = psutil.Process(int(router.stdout.readline()))
    router.send_signal(signal.SIGKILL)
    router.wait()
    router.stdout.close()
    process.wait(timeout=10)
