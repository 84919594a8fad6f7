"""Workers of peers: asked by lines, held still between turns, ended with all they started."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorax_bench.peers.worker_peer import PeerFailed, WorkerPeer, check_at_once
from lorax_bench.requests import BenchRequest, Workload

# Answers with the prompt's first ids, one token each 0.5 s by its own clock; prints in between.
ECHO = """
import os, subprocess, sys
def load(work):
    print("a library's banner")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(work["pids"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    def answer(requests):
        print("a library's progress")
        if work.get("dies"):
            sys.exit("out of memory, says the library")
        short = work.get("short", 0)
        return [
            {"token_ids": each["prompt_ids"][: each["max_tokens"] - short],
             "times_s": [0.5 * (n + 1) for n in range(each["max_tokens"] - short)]}
            for each in requests
        ]
    return answer
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    path = tmp_path / "echo.py"
    path.write_text(ECHO)
    return str(path)


def peer(tmp_path: Path, worker: str, **work: object) -> WorkerPeer:
    return WorkerPeer(Path(sys.executable), worker, {"pids": str(tmp_path / "pids"), **work})


def processes(tmp_path: Path) -> list[int]:
    return [int(each) for each in (tmp_path / "pids").read_text().split()]


def become(pid: int, state: str) -> None:
    """Wait until a process is in this state or gone; signals arrive when the system has time."""
    while psutil.pid_exists(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == state:
                return
        time.sleep(0.01)
    assert state == psutil.STATUS_ZOMBIE


def load(**values: object) -> Workload:
    requests = tuple(
        BenchRequest(prompt_ids=(7, 8, 9, number), max_tokens=2, **values)  # type: ignore[arg-type]
        for number in range(3)
    )
    return Workload(name="test", requests=requests)


def test_answers_become_what_a_client_sees(tmp_path: Path, worker: str) -> None:
    with peer(tmp_path, worker) as asked:
        for _ in range(2):
            records = asked.run(load())
            assert [record.token_ids for record in records] == [[7, 8]] * 3
            assert [record.ttft_s for record in records] == [0.5] * 3
            assert [record.prompt_tokens for record in records] == [4] * 3
            assert not any(record.error for record in records)


def test_missing_tokens_are_an_error(tmp_path: Path, worker: str) -> None:
    with peer(tmp_path, worker, short=1) as asked:
        assert [record.error for record in asked.run(load())] == ["1 of 2 tokens came"] * 3


def test_a_worker_has_the_processor_in_its_turn_alone(tmp_path: Path, worker: str) -> None:
    with peer(tmp_path, worker) as asked:
        asked.run(load())
        for pid in processes(tmp_path):
            become(pid, psutil.STATUS_STOPPED)


def test_what_a_worker_started_ends_with_it(tmp_path: Path, worker: str) -> None:
    with peer(tmp_path, worker) as asked:
        asked.run(load())
    own, child = processes(tmp_path)
    assert not psutil.pid_exists(own)
    # Whoever inherits the child may not have buried it.
    become(child, psutil.STATUS_ZOMBIE)


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path: Path, worker: str) -> None:
    with (
        peer(tmp_path, worker, dies=True) as asked,
        pytest.raises(PeerFailed, match="out of memory, says the library"),
    ):
        asked.run(load())


def test_a_worker_that_cannot_load_is_told(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def load(work):\n    raise RuntimeError('no such model')\n")
    with pytest.raises(PeerFailed, match="no such model"), peer(tmp_path, str(path)):
        pass


@pytest.mark.parametrize(
    ("values", "words"), [({"at_s": 1.0}, "over time"), ({"temperature": 0.5}, "draws tokens")]
)
def test_libraries_are_given_all_at_once_and_greedily(values: dict[str, float], words: str) -> None:
    check_at_once(load())
    with pytest.raises(ValueError, match=words):
        check_at_once(load(**values))


def test_workers_import_nothing_of_this_project() -> None:
    folder = Path("bench/lorax_bench/peers/workers")
    files = list((Path(__file__).parents[3] / folder).glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert "import lorax" not in path.read_text(), path.name
        assert "from lorax" not in path.read_text(), path.name
