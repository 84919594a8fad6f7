"""Logs of events: what was planned is planned again, or it is said where not."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner
from tests.helpers.logged_core import RandomWork, small_settings

from lorax_contract.config import BATCHINGS, SCHEDULING_POLICIES
from lorax_contract.step import AdapterHandle
from lorax_router.core import admission
from lorax_router.core.settings import CoreSettings
from lorax_router.event_log.form import EventLogError
from lorax_router.event_log.recording import Event, recorded_scheduler
from lorax_router.event_log.replay import replay
from lorax_router.event_log.writer import EventLogWriter
from lorax_router.simulator.cli import main

BYTES = 1 << 30


def write_log(
    path: Path, policy: str = "fair", seed: int = 0, num: int = 1500, **limits: Any
) -> CoreSettings:
    """Have a scheduler work, and log it."""
    settings = replace(small_settings(policy), **limits)
    writer = EventLogWriter(path, settings, max_bytes=BYTES)
    RandomWork(recorded_scheduler(settings, writer), settings, seed).run(num)
    writer.close()
    return settings


def lines_of(path: Path) -> list[dict]:
    """Return what a log holds."""
    return [orjson.loads(line) for line in gzip.open(path)]


def rewrite(path: Path, lines: list[dict]) -> None:
    """Put other lines into a log."""
    path.write_bytes(gzip.compress(b"".join(orjson.dumps(line) + b"\n" for line in lines)))


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_all_plans_come_again(tmp_path: Path, policy: str, seed: int) -> None:
    """Whatever happened: rows that gave way, adapters that failed, shards that were lost."""
    path = tmp_path / "events"
    write_log(path, policy, seed)
    replayed = replay(path)
    assert replayed.difference == ""
    assert replayed.end == "closed"
    assert replayed.num_plans > 200
    calls = {line.get("call") for line in lines_of(path)}
    assert {
        "submit", "cancel", "plan", "apply", "adapter_orders", "adapter_event", "shards_lost",
        "adapters.add", "adapters.want", "adapters.pin", "adapters.unpin", "adapters.retire",
    } <= calls  # fmt: skip


@pytest.mark.parametrize("batching", BATCHINGS)
def test_all_plans_come_again_where_what_steps_took_decides_them(
    tmp_path: Path, batching: str
) -> None:
    path = tmp_path / "events"
    write_log(path, batching=batching, target_itl_s=0.002, max_kv_read=200, max_partial_prompts=2)
    replayed = replay(path)
    assert replayed.difference == ""
    assert replayed.num_plans > 200


@pytest.mark.parametrize("seed", ["1", "2", "random"])
def test_plans_do_not_depend_on_how_a_process_hashes(tmp_path: Path, seed: str) -> None:
    """The same log in another process, by the command."""
    path = tmp_path / "events"
    write_log(path)
    done = subprocess.run(
        [sys.executable, "-m", "lorax_router.simulator.cli", "--replay", str(path)],
        env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all as they were" in done.stdout


def test_a_plan_that_is_another_is_found_and_told(tmp_path: Path) -> None:
    """By its step, the column and the entry."""
    path = tmp_path / "events"
    write_log(path)
    lines = lines_of(path)
    plans = [line for line in lines if line.get("call") == "plan" and line.get("result")]
    plan = next(line for line in plans[100:] if len(line["result"]["num_tokens"]) > 1)
    plan["result"]["num_tokens"][1] += 7
    number = plan["result"]["num_tokens"][1]
    rewrite(path, lines)
    difference = replay(path).difference
    assert f"step {plan['result']['seq']}" in difference
    assert f"num_tokens: entry 1: {number} in the log, {number - 7} here" in difference
    result = CliRunner().invoke(main, ["--replay", str(path)])
    assert result.exit_code == 1 and "the replay differs in event" in result.output


def test_a_core_that_decides_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is what a log is for."""
    path = tmp_path / "events"
    write_log(path)
    monkeypatch.setattr(admission, "MAX_LOOKAHEAD", 0)
    difference = replay(path).difference
    assert "in the log" in difference and "here" in difference


def test_an_input_that_was_not_recorded_is_missed(tmp_path: Path) -> None:
    """Each kind of input changes plans: without its lines they do not come again."""
    path = tmp_path / "events"
    write_log(path)
    lines = lines_of(path)
    for call in ("submit", "cancel", "adapter_event", "shards_lost", "adapters.retire"):
        rewrite(path, [line for line in lines if line.get("call") != call])
        assert replay(path).difference, call


def test_the_log_of_a_killed_process_is_replayed_as_far_as_it_is_whole(tmp_path: Path) -> None:
    """Wherever it is torn."""
    path = tmp_path / "events"
    write_log(path, num=300)
    whole = path.read_bytes()
    num_whole = replay(path).num_events
    for length in range(len(whole) // 2, len(whole) - 1, 997):
        path.write_bytes(whole[:length])
        replayed = replay(path)
        assert (replayed.difference, replayed.end) == ("", None)
        assert replayed.num_events <= num_whole
    assert "torn" in CliRunner().invoke(main, ["--replay", str(path)]).output


def test_a_log_of_another_version_is_refused_in_words(tmp_path: Path) -> None:
    """It names both versions and the program that can read it."""
    path = tmp_path / "events"
    write_log(path, num=10)
    header, *events = lines_of(path)
    rewrite(path, [header | {"version": 99, "program": "lorax-py 9.9"}, *events])
    with pytest.raises(EventLogError, match=r"version 99 .* version 1.* lorax-py 9\.9"):
        replay(path)
    settings = header["settings"] | {"unheard_of": 1}
    rewrite(path, [header | {"settings": settings}, *events])
    with pytest.raises(EventLogError, match="unheard_of"):
        replay(path)
    rewrite(path, [header, {"call": "unheard_of", "given": {}}])
    assert "this version does not know it" in replay(path).difference


@pytest.mark.parametrize(
    "content", [b"", b"no gzip", gzip.compress(b"no JSON\n"), gzip.compress(b"{}\n")]
)
def test_what_is_no_log_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    """Not by a stack of calls."""
    path = tmp_path / "events"
    path.write_bytes(content)
    result = CliRunner().invoke(main, ["--replay", str(path)])
    assert result.exit_code == 1 and "is no log that --record-events wrote" in result.output


def test_a_log_ends_at_its_limit_and_says_so(tmp_path: Path) -> None:
    """The server goes on without it."""
    path = tmp_path / "events"
    settings = small_settings("fair")
    writer = EventLogWriter(path, settings, max_bytes=5000)
    work = RandomWork(recorded_scheduler(settings, writer), settings, 0)
    work.run(2000)
    writer.close()
    assert path.stat().st_size < 50_000
    replayed = replay(path)
    assert replayed.difference == "" and "size" in str(replayed.end)
    work.run(100)


def test_a_log_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    """A value of an unknown type ends it, as a full disk does."""
    settings = small_settings("fair")
    writer = EventLogWriter(tmp_path / "events", settings, max_bytes=BYTES)
    writer.put(Event("plan", {"now": 1j}, None, "", []))
    writer.close()
    RandomWork(recorded_scheduler(settings, writer), settings, 0).run(50)


def test_the_log_before_is_kept_and_only_its_user_reads_it(tmp_path: Path) -> None:
    """A router that is started anew after a failure does not take the trace of it away."""
    path = tmp_path / "events"
    write_log(path, num=10)
    first = path.read_bytes()
    write_log(path, num=20)
    assert (tmp_path / "events.1").read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_of_the_core_changes_behind_the_log() -> None:
    """What stands before the scheduler refuses what it could not note."""
    settings = small_settings("fair")

    class Sink(list):
        put = list.append

    sink = Sink()
    scheduler = recorded_scheduler(settings, sink)
    with pytest.raises(AttributeError, match="log"):
        scheduler.max_rows = 1
    with pytest.raises(AttributeError, match="log"):
        scheduler.adapters.cycle_time_s = 1.0
    scheduler.adapters.add(AdapterHandle(1), 1)
    assert AdapterHandle(1) in scheduler.adapters and scheduler.adapters[AdapterHandle(1)].nbytes
    scheduler.stats()
    scheduler.check()
    scheduler.adapters.capacity()
    assert [event.call for event in sink] == ["adapters.add"]
