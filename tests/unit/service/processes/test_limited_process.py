"""Limited processes: asked, ended, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.limited_process import MODULE, start

from lorax_contract.errors import LoraxError
from lorax_router.service.processes.limited_process import LimitedProcess, ProcessLostError


@pytest.fixture(autouse=True)
def _module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())


@in_loop
async def test_questions_and_bytes_go_in_and_answers_come_out() -> None:
    process = await start()
    for value in ({"a": [1, None, "ü\n\x00\ud800"]}, "x" * (3 << 20)):
        answer = await process.ask({"echo": value}, [b"\x00" * 70_000, b""], deadline_s=20)
        assert answer == {"value": value, "blobs_seen": [70_000, 0], "blobs": []}
    await process.end()


@in_loop
async def test_a_question_that_there_is_no_memory_for_is_answered_so_and_is_the_last() -> None:
    process = await start()
    assert await process.ask({"echo": "x" * (90 << 20)}, deadline_s=60) == {
        "memory": "", "blobs": []
    }  # fmt: skip
    with pytest.raises(ProcessLostError):
        await process.ask({"echo": 1}, deadline_s=60)
    await process.end()


@in_loop
async def test_what_libraries_print_is_no_answer_and_fills_no_pipe() -> None:
    process = await start()
    assert await process.ask({"print": 1 << 20}, deadline_s=20) == {"blobs": []}
    await process.end()


@in_loop
async def test_secrets_of_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "API_KEY"):
        monkeypatch.setenv(name, "secret")
    process = await start()
    names = (await process.ask({"environment": 1}, deadline_s=20))["value"]
    await process.end()
    assert "PATH" in names
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "API_KEY"} & set(names)


@in_loop
async def test_it_has_pipes_and_no_sockets() -> None:
    process = await start()
    files = (await process.ask({"files": 1}, deadline_s=20))["value"]
    await process.end()
    assert not [name for name in files if "socket" in name]


@in_loop
async def test_a_late_answer_ends_the_process() -> None:
    process = await start()
    with pytest.raises(ProcessLostError) as caught:
        await process.ask({"power": 9}, deadline_s=0.2)
    assert caught.value.overdue
    assert not psutil.pid_exists(process.pid)


@in_loop
async def test_a_caller_that_leaves_ends_the_process() -> None:
    process = await start()
    task = asyncio.create_task(process.ask({"power": 9}, deadline_s=60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not psutil.pid_exists(process.pid))


@in_loop
async def test_how_it_ended_is_told() -> None:
    process = await start()
    with pytest.raises(ProcessLostError, match="with code 3") as caught:
        await process.ask({"leave": 3}, deadline_s=20)
    assert not caught.value.overdue
    process = await start()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ProcessLostError, match="by SIGKILL"):
        await process.ask({"echo": "x" * (1 << 20)}, deadline_s=20)


@in_loop
async def test_a_process_nobody_ends_ends_itself() -> None:
    process = await start(deadline_s=0.0)
    with pytest.raises(ProcessLostError, match="by SIGALRM|by SIGXCPU"):
        await process.ask({"power": 9}, deadline_s=60)


@in_loop
async def test_its_session_gives_way_and_comes_back() -> None:
    process = await start()
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
        await LimitedProcess.start("lorax_router.no_such_module")


@pytest.mark.parametrize("question", [{"power": 9}, {}])
def test_none_is_left_when_the_router_is_killed(question: dict[str, int]) -> None:
    """Neither one that computes nor one that waits."""
    code = (
        f"import asyncio\nfrom {MODULE} import start\n"
        "async def run():\n"
        "    process = await start()\n"
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
