"""The command line: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from lorax_contract.exit_codes import ExitCode
from lorax_launcher import cli
from lorax_launcher.console import Console
from lorax_launcher.flags import OPTION_GROUPS
from lorax_launcher.migration import LORAX_FLAGS
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.refused import REFUSED_OPTIONS, REFUSED_VARIABLES, Refused

pytestmark = pytest.mark.usefixtures("no_launch")

# A flag without a value that asks for what happens anyway is never refused.
ALWAYS_REFUSED = [
    o for o in REFUSED_OPTIONS if not o.is_switch or "true" not in (*o.granted, *o.defaults)
]


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.main, list(arguments))


def words_of(option: Refused) -> tuple[str, ...]:
    return (option.flag,) if option.is_switch else (option.flag, "x-given-x")


def test_every_option_of_lorax_is_known() -> None:
    known = {name for option in cli.main.params for name in option.opts}
    assert set(LORAX_FLAGS) - known == set()


@pytest.mark.parametrize("option", ALWAYS_REFUSED, ids=lambda option: option.flag)
def test_a_refused_flag_is_refused_with_its_reason(
    option: Refused, no_launch: list[LauncherOptions]
) -> None:
    result = run(*words_of(option))
    assert result.exit_code == ExitCode.USAGE
    assert option.flag in result.output
    assert option.reason in result.output
    assert not no_launch
    assert "x-given-x" not in result.output


@pytest.mark.parametrize("option", ALWAYS_REFUSED, ids=lambda option: option.flag)
def test_a_refused_variable_is_refused_too(option: Refused) -> None:
    value = "true" if option.is_switch else "x-given-x"
    result = run(**{option.envvar: value})
    assert result.exit_code == ExitCode.USAGE
    assert option.reason in result.output


@pytest.mark.parametrize("option", REFUSED_OPTIONS, ids=lambda option: option.flag)
def test_an_empty_variable_counts_as_not_given(
    option: Refused, no_launch: list[LauncherOptions]
) -> None:
    assert run(**{option.envvar: ""}).exit_code == 0
    assert len(no_launch) == 1


@pytest.mark.parametrize(
    "arguments",
    [(o.flag, value) for o in REFUSED_OPTIONS if not o.is_switch for value in o.granted]
    + [("--compile",)],
)
def test_asking_for_what_happens_anyway_is_granted(
    arguments: tuple[str, ...], no_launch: list[LauncherOptions]
) -> None:
    assert run(*arguments).exit_code == 0
    assert no_launch == [LauncherOptions()]


@pytest.mark.parametrize("variable", REFUSED_VARIABLES, ids=lambda variable: variable.name)
def test_variables_without_a_flag_are_refused(variable: object) -> None:
    name, reason = variable.name, variable.reason  # type: ignore[attr-defined]
    result = run(**{name: "x-given-x"})
    assert result.exit_code == ExitCode.USAGE
    assert reason in result.output
    assert "x-given-x" not in result.output


def test_options_reach_the_launch(no_launch: list[LauncherOptions]) -> None:
    arguments = ["-p", "3005", "--model-id", "org/m", "--grace-period", "3", "--eager-prefill"]
    result = run(*arguments, "false", "--cors-allow-origin", "a", "--cors-allow-origin", "b")
    assert result.exit_code == 0
    assert no_launch == [
        LauncherOptions(
            port=3005,
            model_id="org/m",
            grace_period_s=3.0,
            eager_prefill=False,
            cors_allow_origin=("a", "b"),
        )
    ]


def test_variables_reach_the_launch_and_the_command_line_wins(
    no_launch: list[LauncherOptions],
) -> None:
    assert run("--port", "1", PORT="2", MAX_BEST_OF="3", LORAX_CACHE="/c").exit_code == 0
    assert no_launch == [LauncherOptions(port=1, max_best_of=3, cache_dir="/c")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "70000"),
        ("--max-batch-size", "0"),
        ("--kv-memory-fraction", "0"),
        ("--memory-wiggle-room", "1.5"),
        ("--cuda-memory-fraction", "0"),
        ("--dtype", "int8"),
        ("--no-such-option",),
        ("stray",),
    ],
)
def test_values_out_of_bounds_are_usage_errors(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == ExitCode.USAGE


def test_env_prints_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("--env")
    assert result.exit_code == 0
    assert "python: " in result.output
    assert "torch: " in result.output
    assert "hf_secret" not in result.output


def test_a_usage_error_of_the_launch_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(options: LauncherOptions, console: Console, times: object) -> int:
        raise UsageError("--x is refused: because.")

    monkeypatch.setattr(cli, "launch", launch)
    result = run()
    assert result.exit_code == ExitCode.USAGE
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("named", "task"),
    [("embed", "embed"), ("embedding", "embed"), ("Feature-Extraction", "embed"), ("score", "rerank"),
     ("token-classification", "token-classify"), ("text-generation", "generate")],
)  # fmt: skip
def test_a_task_has_other_names(named: str, task: str, no_launch: list[LauncherOptions]) -> None:
    assert run("--task", named).exit_code == 0
    assert no_launch[-1].task == task


def test_a_task_that_nobody_knows_is_a_usage_error() -> None:
    result = run("--task", "transcription")
    assert result.exit_code == 2
    assert "token-classify" in result.output


def test_help_shows_what_is_served_with_its_variable() -> None:
    text = " ".join(run("--help").output.split())
    for group, options in OPTION_GROUPS.items():
        assert f"{group}:" in text
        for option in options:
            assert option.opts[-1] in text
    assert "MODEL_ID" in text
    assert "--weights-cache-override" not in text


def test_a_taken_port_is_noticed_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert cli.is_taken("127.0.0.1", port)
    assert not cli.is_taken("127.0.0.1", port)
    assert not cli.is_taken("no.such.host.invalid", port)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="lorax-absent"):
        cli.find_program("lorax-absent")


def test_the_command_starts_light() -> None:
    code = (
        "import sys, lorax_launcher.cli as c; "
        "bad = {'torch', 'transformers', 'grpc', 'numpy', 'rich'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_options_and_dataclass_name_the_same_things() -> None:
    named = {option.name for options in OPTION_GROUPS.values() for option in options}
    fields = set(LauncherOptions.__dataclass_fields__)
    assert named - fields == {"show_env"}
    assert fields - named == set()
    assert isinstance(cli.main, click.Command)


def test_adapters_may_be_listed_one_by_one_or_by_a_variable(
    no_launch: list[LauncherOptions],
) -> None:
    run("--preloaded-adapter-ids", "org/a", "--preloaded-adapter-ids", "/b", "--adapter-local-root",
        "/b")  # fmt: skip
    run(PRELOADED_ADAPTER_IDS="org/a /b", ADAPTER_LOCAL_ROOT="/b")
    one_by_one, by_variable = no_launch
    assert one_by_one.preloaded_adapter_ids == ("org/a", "/b")
    assert one_by_one.adapter_local_root == ("/b",)
    assert one_by_one == by_variable


def test_keys_come_from_flags_or_variables_and_are_in_no_output(
    no_launch: list[LauncherOptions],
) -> None:
    result = run("--api-key", "sk-of-a-flag", "--api-key", "sk-two,sk-three", API_KEY="sk-unused")
    assert result.exit_code == 0
    assert no_launch[-1].api_key == ("sk-of-a-flag", "sk-two,sk-three")
    for name in ("LORAX_API_KEY", "API_KEY"):
        assert run(**{name: "sk-one,sk-two"}).exit_code == 0
        assert no_launch[-1].api_key == ("sk-one,sk-two",)
    both = run(LORAX_API_KEY="sk-ours", API_KEY="sk-others", LORAX_ADMIN_API_KEY="sk-admin")
    assert (no_launch[-1].api_key, no_launch[-1].admin_api_key) == (("sk-ours",), ("sk-admin",))
    assert not any("sk-" in each.output for each in (result, both))
