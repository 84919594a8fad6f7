"""Programs that actors run: what is read of them, and that they end with whoever started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lorax_launcher.children import Child
from lorax_launcher.placing.ingress import IngressKeeper, ingress_options
from lorax_launcher.placing.programs import ChildProgram
from lorax_launcher.placing.server import GroupServer, link_host, load_in, server_options
from lorax_launcher.placing.stores import store_folder
from lorax_launcher.placing.tied import tied
from lorax_launcher.placing.values import GroupLoad, GroupSpec, GroupState, IngressSpec

SPEC = GroupSpec(options=("--num-blocks", "9"), store_dir="~/x", ingress_host="10.0.0.1")


def module(folder: Path, text: str) -> dict[str, str]:
    """A module `played`; what its environment needs."""
    (folder / "played.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_records_are_heard_and_what_went_wrong_is_kept(tmp_path: Path) -> None:
    environment = module(
        tmp_path,
        'print(\'{"message": "here", "level": "info", "port": 7}\')\n'
        'print(\'{"message": "no memory", "level": "error"}\')\n'
        "raise SystemExit(3)\n",
    )
    heard: list[object] = []
    program = ChildProgram(
        "played", [], lambda record: heard.append(record["message"]), environment
    )
    assert asyncio.run(program.run()) == 3
    assert heard == ["here", "no memory"]
    assert program.wrong == "no memory"


def test_one_is_told_to_end(tmp_path: Path) -> None:
    environment = module(
        tmp_path, 'import time\nprint(\'{"message": "up"}\', flush=True)\ntime.sleep(60)'
    )

    async def scene() -> int:
        program = ChildProgram("played", [], lambda record: program.end(), environment)
        return await program.run()

    assert asyncio.run(asyncio.wait_for(scene(), 30)) == -signal.SIGTERM


def test_how_a_child_ended_that_a_signal_ends_at_once_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Who waits for the child wakes late, as on full cores.
    wait = asyncio.ThreadedChildWatcher._do_waitpid

    def wait_late(*arguments: Any) -> None:
        time.sleep(0.5)
        wait(*arguments)

    monkeypatch.setattr(asyncio.ThreadedChildWatcher, "_do_waitpid", wait_late)
    kill = os.kill

    def kill_and_see(pid: int, number: int) -> None:
        kill(pid, number)
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)

    monkeypatch.setattr(os, "kill", kill_and_see)

    async def one() -> int:
        words = [sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"]
        said = asyncio.Event()
        child = await Child.start("one", lambda _: words, on_line=lambda *_: said.set())
        await said.wait()
        child.terminate()
        code = await child.exited
        await child.close()
        return code

    assert asyncio.run(asyncio.wait_for(one(), 60)) == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends it")
def test_a_program_ends_with_whoever_started_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
    code = (
        "import subprocess, sys, time\n"
        "from lorax_launcher.placing.tied import tied\n"
        f"child = subprocess.Popen(tied({words!r}), stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(20)
    assert not child.is_running()


def test_one_whose_parent_is_gone_already_does_not_begin() -> None:
    words = tied([sys.executable, "-c", "raise SystemExit(0)"])
    assert subprocess.run(words, check=False).returncode == 0
    words[3] = "1"
    assert subprocess.run(words, check=False).returncode == 1


def test_links_between_machines_need_certificates() -> None:
    assert link_host(SPEC, "10.0.0.1") == link_host(SPEC, "127.0.0.1") == "127.0.0.1"
    assert link_host(SPEC, "10.0.0.2") == ""
    secured = GroupSpec(options=(), store_dir="x", ingress_host="10.0.0.1", tls_dir="/tls")
    assert link_host(secured, "10.0.0.2") == "10.0.0.2"
    server = GroupServer(SPEC, "node", "10.0.0.2")
    asyncio.run(server.run())
    assert server.report.state is GroupState.ENDED
    assert "--tls-dir" in server.report.error


def test_what_an_operator_gives_a_server_comes_last() -> None:
    words = server_options(SPEC, "127.0.0.1", Path("/s/1"))
    assert words[-2:] == ["--num-blocks", "9"]
    assert words[words.index("--ingress-uri") + 1] == "127.0.0.1:0"
    assert words[words.index("--adapter-store-dir") + 1] == "/s/1/adapters"
    secured = GroupSpec(options=(), store_dir="x", tls_dir="/tls")
    words = server_options(secured, "fd00::2", Path("/s/1"))
    assert words[words.index("--ingress-uri") + 1] == "[fd00::2]:0"
    assert words[words.index("--ingress-tls-dir") + 1] == "/tls"


def test_a_server_says_where_it_is() -> None:
    server = GroupServer(SPEC, "node", "10.0.0.1")
    server._take({"message": "ingresses attach", "uri": "127.0.0.1:0", "port": 4321})
    assert server.report.state is GroupState.STARTING
    server._take({"event": "ready", "uri": "unix:/run/shard-0"})
    assert server.report.state is GroupState.STARTING
    server._take({"event": "ready", "url": "http://127.0.0.1:1", "metrics": "http://127.0.0.1:2"})
    assert server.report.state is GroupState.READY
    assert server.report.uri == "127.0.0.1:4321"
    assert server.report.metrics == "http://127.0.0.1:2"
    server.drain()
    assert server.report.state is GroupState.DRAINING


def test_load_is_read_from_metrics() -> None:
    text = (
        "# TYPE lorax_queue_length gauge\nlorax_queue_length 3.0\nlorax_requests_running 5.0\n"
        'lorax_kv_usage_ratio 0.25\nlorax_request_count_total{method="a b",x="y"} 7.0\n'
    )
    assert load_in(text) == GroupLoad(num_running=5, num_queued=3, kv_in_use=0.25)
    assert load_in("") == GroupLoad()


def test_each_server_of_a_machine_has_a_store_of_its_own(tmp_path: Path) -> None:
    with store_folder(tmp_path) as first:
        with store_folder(tmp_path) as second:
            assert first != second
        with store_folder(tmp_path) as again:
            assert again == second
    with store_folder(tmp_path) as heir:
        assert heir == first


def test_the_file_of_places_is_what_the_ingress_reads() -> None:
    keeper = IngressKeeper(IngressSpec(hostname="127.0.0.1", port=0))
    keeper.tell({"b": "h:2", "a": "h:1"})
    assert keeper._places.read_text() == "a=h:1\nb=h:2\n"
    modified = keeper._places.stat().st_mtime_ns
    time.sleep(0.01)
    keeper.tell({"a": "h:1", "b": "h:2"})
    assert keeper._places.stat().st_mtime_ns == modified
    spec = IngressSpec(hostname="::", port=8000, tls_dir="/tls", options=("--wait-s=5",))
    words = ingress_options(spec, keeper._places)
    keeper.close()
    assert f"file:{keeper._places}" in words
    assert words[-3:] == ["--tls-dir", "/tls", "--wait-s=5"]


def test_ingresses_of_one_service_share_a_port_and_have_one_each_for_metrics() -> None:
    spec = IngressSpec(hostname="::", port=8000, number=2, options=("--metrics-port=9",))
    words = ingress_options(spec, Path("places"))
    assert words[-4:] == ["--share-port", "--metrics-port", "0", "--metrics-port=9"]
    keeper = IngressKeeper(spec)
    keeper._take({"event": "ready", "url": "http://h:8000", "metrics": "http://h:1/metrics"})
    assert (keeper.url, keeper.metrics) == ("http://h:8000", "http://h:1/metrics")
    keeper.close()
