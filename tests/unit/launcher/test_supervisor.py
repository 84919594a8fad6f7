"""The supervisor over fake children that live, fail and die at every stage."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.fake_launcher import FACTS
from tests.helpers.launcher_stage import (
    WAIT_S,
    Stage,
    kill_children_of,
    stop,
    wait_for_end,
)

from lorax_contract.exit_codes import ExitCode
from lorax_contract.hub import TOKEN_VARIABLES
from lorax_contract.keys import (
    ADMIN_KEY_VARIABLES,
    API_KEY_VARIABLES,
    METRICS_KEY_VARIABLES,
    SSL_PASSWORD_VARIABLE,
    hash_of,
)
from lorax_launcher import supervisor as supervisor_module
from lorax_launcher.console import Console
from lorax_launcher.options import LauncherOptions
from lorax_launcher.resolve import resolve
from lorax_launcher.supervisor import Programs, Supervisor

LAUNCHER = Path(__file__).parents[2] / "helpers" / "fake_launcher.py"


def test_children_start_in_order_and_stop_router_first(stage: Stage) -> None:
    assert stage.run(when_ready=stop) == ExitCode.OK
    text = stage.output.getvalue()
    assert "Ready: tiny answers on http://localhost:3000" in text
    assert "curl http://localhost:3000/generate" in text
    assert text.index("router drained") < text.index("shard drained")


def test_ready_is_one_json_object_in_json_mode(stage: Stage) -> None:
    assert stage.run(on_line=('"event": "ready"', stop), json_output=True) == ExitCode.OK
    records = [json.loads(line) for line in stage.output.getvalue().splitlines()]
    (ready,) = [record for record in records if record.get("event") == "ready"]
    assert ready["url"] == "http://0.0.0.0:3000"
    assert {"shard-0", "router", "launcher"} <= {record["process"] for record in records}


def test_what_a_start_took_is_told_by_process_and_part(stage: Stage) -> None:
    assert stage.run(on_line=('"event": "ready"', stop), json_output=True) == ExitCode.OK
    records = [json.loads(line) for line in stage.output.getvalue().splitlines()]
    (ready,) = [record for record in records if record.get("event") == "ready"]
    prepare, shard, router = ready["start"]["processes"]
    assert [each["process"] for each in (prepare, shard, router)] == [
        "prepare",
        "shard-0",
        "router",
    ]
    assert prepare["until_s"] <= shard["from_s"] <= router["from_s"] <= router["until_s"]
    assert router["until_s"] <= ready["start"]["total_s"]
    for each in (shard, router):
        assert each["parts"]["listening"] == 0.25
        assert "starting Python" in each["parts"]


def test_people_see_what_a_start_took_as_a_table(stage: Stage) -> None:
    assert stage.run(on_line=("Ready:", stop)) == ExitCode.OK
    lines = stage.output.getvalue().splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:2] == ["process", "from"])
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == [
        "prepare",
        "shard-0",
        "router",
    ]
    assert lines[head + 2].endswith("listening 0.25")


def test_configurations_name_the_prepared_model(stage: Stage, tmp_path: Path) -> None:
    documents: dict[str, Any] = {}

    def read(supervisor: Supervisor) -> None:
        for role in ("shard", "router"):
            argv = stage.seen(role)["argv"]
            path = Path(argv[argv.index("--config") + 1])
            documents[role] = json.loads(path.read_text())
            assert path.parent.stat().st_mode & 0o077 == 0
        supervisor.request_stop()

    assert stage.run(when_ready=read) == ExitCode.OK
    assert documents["shard"]["model_dir"] == documents["router"]["tokenizer_dir"] == str(tmp_path)
    assert documents["router"]["shard_uri"] == documents["shard"]["shard_uris"][0]
    # The first group of shards that this launcher started.
    assert documents["router"]["epoch"] == documents["shard"]["epoch"] == 1


@pytest.mark.parametrize("variable", TOKEN_VARIABLES)
@pytest.mark.parametrize("options", [{}, {"adapter_id": "org/poet"}])
def test_tokens_travel_in_the_environment_only_and_where_they_are_needed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, variable: str, options: dict[str, Any]
) -> None:
    monkeypatch.setenv(variable, "hf_secret")
    assert stage.run(when_ready=stop, **options) == ExitCode.OK
    for role in ("prepare", "shard", "router"):
        seen = stage.seen(role)
        is_needed = role != "router" or bool(options)
        assert seen["environment"].get(variable) == ("hf_secret" if is_needed else None)
        assert "hf_secret" not in " ".join(seen["argv"])
    assert "hf_secret" not in stage.output.getvalue()


def test_no_child_is_given_a_key_and_only_the_router_a_password(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, password = "sk-the-secret-itself", "correct horse"
    for name in (*API_KEY_VARIABLES, *ADMIN_KEY_VARIABLES, *METRICS_KEY_VARIABLES):
        monkeypatch.setenv(name, key)
    monkeypatch.setenv(SSL_PASSWORD_VARIABLE, password)
    configs: list[str] = []

    def read(supervisor: Supervisor) -> None:
        for role in ("shard", "router"):
            argv = stage.seen(role)["argv"]
            configs.append(Path(argv[argv.index("--config") + 1]).read_text())
        supervisor.request_stop()

    assert stage.run(when_ready=read, api_key=(key,)) == ExitCode.OK
    for role in ("prepare", "shard", "router"):
        seen = stage.seen(role)
        assert key not in json.dumps(seen)
        assert (password in json.dumps(seen["environment"])) == (role == "router")
        assert password not in " ".join(seen["argv"])
    assert not any(key in config or password in config for config in configs)
    assert hash_of(key) in configs[1]
    assert key not in stage.output.getvalue()
    assert "with a key" in stage.output.getvalue()
    assert "Bearer $LORAX_API_KEY" in stage.output.getvalue()


def test_download_only_prepares_and_ends(stage: Stage) -> None:
    assert stage.run(download_only=True) == ExitCode.OK
    assert stage.started("prepare")
    assert not stage.started("shard")
    assert str(stage.folder) in stage.last_line


@pytest.mark.parametrize("role", ["prepare", "shard", "router"])
@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ({"kind": "fail", "code": 32, "message": "w.safetensors is cut short"}, 32, "cut short"),
        ({"kind": "fail", "code": 32}, 32, "Fetch the model again"),
        ({"kind": "fail", "code": 99}, ExitCode.CHILD_DIED, "exit code 99"),
        ({"kind": "fail", "code": 0}, ExitCode.CHILD_NOT_READY, "could not start"),
        ({"kind": "killed"}, ExitCode.CHILD_DIED, "SIGKILL"),
    ],
)
def test_a_child_that_does_not_start(
    stage: Stage, role: str, behaviour: dict[str, Any], code: int, words: str
) -> None:
    stage.plan_behaviour(**{role: behaviour})
    assert stage.run() == code
    assert words in stage.last_line
    assert role in stage.last_line


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ("what():  std::bad_alloc", ExitCode.OUT_OF_MEMORY, "for lack of memory"),
        ("pthread_create failed", ExitCode.CHILD_DIED, "SIGABRT, its last words: pthread_create"),
    ],
)
def test_the_last_words_of_a_child_that_aborts_are_passed_on(
    stage: Stage, words: str, code: int, told: str
) -> None:
    stage.plan_behaviour(shard={"kind": "abort", "words": words})
    assert stage.run() == code
    assert told in stage.last_line
    assert words in stage.last_line


def test_a_setting_that_a_child_refuses_is_named_as_its_flag(stage: Stage) -> None:
    message = "max_total_tokens: 200 does not fit"
    stage.plan_behaviour(router={"kind": "fail", "code": 3, "message": message})
    assert stage.run() == ExitCode.BAD_CONFIG
    assert "--max-total-tokens: 200 does not fit" in stage.last_line


@pytest.mark.parametrize("role", ["shard", "router"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGUSR1])
def test_a_child_that_dies_while_serving(stage: Stage, role: str, signum: int) -> None:
    code = stage.run(when_ready=lambda _: os.kill(stage.pid(role), signum))
    assert code == ExitCode.CHILD_DIED
    assert role in stage.last_line
    other = "router" if role == "shard" else "shard"
    assert f"{other} drained" in stage.output.getvalue()


def test_a_shard_that_dies_while_the_router_starts(stage: Stage) -> None:
    stage.plan_behaviour(router={"kind": "unready"})
    code = stage.run(on_line=("loading for ever", kill_children_of(stage, "shard")))
    assert code == ExitCode.CHILD_DIED
    assert "shard-0 was killed" in stage.last_line


@pytest.mark.parametrize(("role", "child"), [("shard", "shard-0"), ("router", "router")])
def test_a_child_that_hangs_at_its_start_is_noticed(stage: Stage, role: str, child: str) -> None:
    stage.plan_behaviour(**{role: {"kind": "unready"}})
    assert stage.run(start_timeout_s=2.0) == ExitCode.CHILD_NOT_READY
    assert f"{child} was not ready within 2 s" in stage.last_line
    assert "--start-timeout" in stage.last_line


def test_the_router_starts_while_the_shard_loads(stage: Stage) -> None:
    stage.plan_behaviour(shard={"kind": "unready"}, router={"kind": "serve", "lines": ["here"]})
    assert stage.run(on_line=("here", stop)) == ExitCode.INTERRUPTED


def test_a_dead_shard_is_blamed_for_the_router_that_misses_it(stage: Stage) -> None:
    unreachable = {"kind": "fail", "code": 60, "message": "no shard answers"}
    stage.plan_behaviour(router=unreachable)
    code = stage.run(on_line=("no shard answers", kill_children_of(stage, "shard")))
    assert code == ExitCode.CHILD_DIED
    assert "shard-0 was killed" in stage.last_line


@pytest.mark.parametrize("role", ["prepare", "shard", "router"])
def test_a_signal_before_it_is_ready(stage: Stage, role: str) -> None:
    stage.plan_behaviour(**{role: {"kind": "unready"}})
    assert stage.run(on_line=("loading for ever", stop)) == ExitCode.INTERRUPTED


@pytest.mark.parametrize("role", ["prepare", "shard", "router"])
def test_a_report_that_cannot_be_read(
    stage: Stage, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_S", 0.3)
    stage.plan_behaviour(**{role: {"kind": "garbage"}})
    assert stage.run() == ExitCode.CHILD_NOT_READY
    assert "reported nothing" in stage.last_line


def test_a_router_that_does_not_drain_is_killed_after_its_grace(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "GRACE_MARGIN_S", 0.1)
    stage.plan_behaviour(router={"kind": "stuck"})
    assert stage.run(when_ready=stop, grace_period_s=0.1) == ExitCode.OK
    assert "shard drained" in stage.output.getvalue()


def test_a_child_that_stands_still_is_woken_to_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the test waits: only a child that hears the signal ends in time.
    monkeypatch.setattr(supervisor_module, "STOP_S", 1000.0)

    def freeze(supervisor: Supervisor) -> None:
        os.kill(stage.pid("shard"), signal.SIGSTOP)
        supervisor.request_stop()

    assert stage.run(when_ready=freeze) == ExitCode.OK


def test_a_second_interrupt_ends_everything_at_once(stage: Stage) -> None:
    def interrupt_twice(supervisor: Supervisor) -> None:
        supervisor.request_stop(signal.SIGINT)
        supervisor.request_stop(signal.SIGINT)

    stage.plan_behaviour(router={"kind": "stuck"}, shard={"kind": "stuck"})
    assert stage.run(when_ready=interrupt_twice, grace_period_s=3600.0) == ExitCode.OK


def test_a_second_interrupt_cuts_the_draining_short(stage: Stage) -> None:
    def interrupt_later(supervisor: Supervisor) -> None:
        supervisor.request_stop(signal.SIGINT)
        asyncio.get_running_loop().call_later(0.1, supervisor.request_stop, signal.SIGINT)

    stage.plan_behaviour(router={"kind": "stuck"})
    assert stage.run(when_ready=interrupt_later, grace_period_s=3600.0) == ExitCode.OK


def test_what_a_child_started_ends_with_it(stage: Stage) -> None:
    stage.plan_behaviour(shard={"kind": "grandchild"})
    assert stage.run(when_ready=kill_children_of(stage, "shard")) == ExitCode.CHILD_DIED
    wait_for_end(stage.pid("grandchild"))


def test_output_of_children_is_passed_on(stage: Stage) -> None:
    long = "x" * 3_000_000
    stage.plan_behaviour(shard={"kind": "serve", "lines": ["a warning from C", long]})
    assert stage.run(when_ready=stop) == ExitCode.OK
    text = stage.output.getvalue()
    assert text.count("shard-0 | a warning from C") == 2
    assert text.count("x") >= 2 * len(long)


def test_a_program_that_is_missing(stage: Stage, tmp_path: Path) -> None:
    programs = Programs(shard=(str(tmp_path / "absent"),), router=("true",))

    async def main() -> int:
        plan = resolve(LauncherOptions(), FACTS, str(tmp_path))
        return await Supervisor(plan, programs, Console(stage.output), tmp_path).run()

    assert asyncio.run(main()) == ExitCode.CHILD_NOT_READY
    assert "install" in stage.last_line


def start_launcher() -> subprocess.Popen[str]:
    """Start the launcher program in a session of its own and return it when it is ready."""
    process = subprocess.Popen(
        [sys.executable, str(LAUNCHER)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(LAUNCHER.parents[2])},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ready:"):
            return process
    raise AssertionError("the launcher ended before it was ready")


def finish(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    process.stdout.read()
    process.stdout.close()
    return process.wait(WAIT_S)


def test_children_end_when_the_launcher_is_killed(stage: Stage) -> None:
    launcher = start_launcher()
    launcher.kill()
    for role in ("shard", "router"):
        wait_for_end(stage.pid(role))
    assert finish(launcher) == -signal.SIGKILL


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_stop_it_in_order_and_leave_nothing_behind(stage: Stage, signum: int) -> None:
    launcher = start_launcher()
    # The whole group gets it, as from Ctrl-C: the children must not be in it.
    os.killpg(launcher.pid, signum)
    assert finish(launcher) == ExitCode.OK
    assert not Path((stage.folder / "run_dir").read_text()).exists()
