"""What starts LoRAX starts this server, if it asks for no more than LoRAX's defaults."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from lorax_contract.exit_codes import ExitCode
from lorax_launcher import cli
from lorax_launcher.flags import SWITCH
from lorax_launcher.options import LauncherOptions

pytestmark = pytest.mark.usefixtures("no_launch")

# LoRAX's flags that have a default, with it; those whose default is "not given" are left out.
LORAX_DEFAULTS = (
    ("--source", "hub"), ("--adapter-source", "hub"), ("--max-active-adapters", "1024"),
    ("--adapter-cycle-time-s", "2"), ("--adapter-memory-fraction", "0.1"),
    ("--compile-max-batch-size", "128"), ("--compile-max-rank", "64"),
    ("--compile-batch-size", "32"), ("--speculative-tokens", "0"),
    ("--speculation-max-batch-size", "32"), ("--backend", "fa2"), ("--prefix-caching", "false"), ("--chunked-prefill", "false"),
    ("--eager-prefill", "true"), ("--validation-workers", "2"),
    ("--max-concurrent-requests", "1024"), ("--max-best-of", "2"), ("--max-stop-sequences", "4"),
    ("--waiting-served-ratio", "1.2"), ("--max-waiting-tokens", "20"),
    ("--cuda-memory-fraction", "1.0"), ("--memory-wiggle-room", "0.9"), ("--hostname", "0.0.0.0"),
    ("-p", "3000"), ("--port", "3000"), ("--shard-uds-path", "/tmp/lorax-server"),
    ("--master-addr", "localhost"), ("--master-port", "29500"), ("--watermark-gamma", "0.5"),
    ("--watermark-delta", "2.0"), ("--watermark-delta", "2"), ("--compile",), ("--sharded", "false"),
    ("--num-shard", "1"), ("--cors-allow-credentials", "true"), ("--cors-allow-credentials", "false"),
)  # fmt: skip
# As its chart passes them, the switch with the empty value of its table.
CHART = (
    "--model-id", "mistralai/Mistral-7B-Instruct-v0.1", "--max-input-length", "512",
    "--max-total-tokens", "1024", "--max-batch-total-tokens", "4096",
    "--max-batch-prefill-tokens", "2048", "--eager-prefill", "false", "--compile",
)  # fmt: skip


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(cli.main, list(arguments))


@pytest.mark.parametrize("arguments", LORAX_DEFAULTS, ids=" ".join)
def test_lorax_s_own_defaults_start(
    arguments: tuple[str, ...], no_launch: list[LauncherOptions]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert len(no_launch) == 1


@pytest.mark.parametrize("more", [(), ("",), ("true",), ("--port", "8000")])
def test_the_arguments_of_lorax_s_chart_start(
    more: tuple[str, ...], no_launch: list[LauncherOptions]
) -> None:
    result = run(*CHART, *more, PORT="8000", HUGGING_FACE_HUB_TOKEN="", HOSTNAME="lorax-7d9f")
    assert result.exit_code == 0, result.output
    (options,) = no_launch
    assert (options.port, options.max_batch_total_tokens) == (8000, 4096)


@pytest.mark.parametrize("value", ["fa3", "129", "flashinfer"])
@pytest.mark.parametrize("flag", ["--backend", "--compile-batch-size"])
def test_more_than_the_defaults_is_still_refused(flag: str, value: str) -> None:
    assert run(flag, value).exit_code == ExitCode.USAGE


def test_a_default_of_lorax_that_does_nothing_is_said() -> None:
    (line,) = run("--backend", "fa2").output.splitlines()
    assert "WARNING" in line
    assert "--backend has no effect: its choices are other ones here" in line
    assert run("--speculative-tokens", "0").output == ""


@pytest.mark.parametrize("option", [o for o in cli.main.params if o.type is SWITCH], ids=str)
@pytest.mark.parametrize("value", [(), ("",), ("true",), ("false",)])
def test_a_switch_takes_an_empty_value_and_no_other_option_s(
    option: object, value: tuple[str, ...], no_launch: list[LauncherOptions]
) -> None:
    flag = next(name for name in option.opts if name.startswith("--"))  # type: ignore[attr-defined]
    bare, given = run(flag, "--port", "5"), run(flag, *value, "--port", "5")
    if value == ("false",):
        assert given.exit_code == 0
        assert no_launch[-1] == LauncherOptions(port=5)
    else:
        assert given.exit_code == bare.exit_code
        assert no_launch[:1] == no_launch[1:]


def test_a_switch_takes_no_other_word() -> None:
    assert run("--json-output", "maybe").exit_code == ExitCode.USAGE


# --- variables that others set, too ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "level", "is_whole"),
    [
        ("WARN", "warning", True),
        ("warn", "warning", True),
        ("trace", "debug", True),
        ("Off", "critical", True),
        ("error", "error", True),
        ("", "info", True),
        ("info,lorax_router=debug", "info", False),
        ("lorax_router=debug,warn", "warning", False),
        ("lorax_router=debug", "info", False),
        ("loud", "info", False),
    ],
)
def test_log_levels_in_lorax_s_words(
    text: str, level: str, is_whole: bool, no_launch: list[LauncherOptions]
) -> None:
    result = run(LOG_LEVEL=text)
    assert result.exit_code == 0
    assert no_launch == [LauncherOptions(log_level=level)]
    assert ("is not used as a whole" in result.output) is not is_whole


@pytest.mark.parametrize("level", ["WARN", "trace", "off", "info"])
def test_the_flag_knows_them_too_and_wins(level: str, no_launch: list[LauncherOptions]) -> None:
    known = {"WARN": "warning", "trace": "debug", "off": "critical", "info": "info"}[level]
    result = run("--log-level", level, LOG_LEVEL="nonsense")
    assert no_launch == [LauncherOptions(log_level=known)]
    assert result.output == ""
    assert run("--log-level", "loud").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("arguments", "text", "as_json"),
    [
        ((), "json", True),
        ((), "JSON", True),
        ((), "text", False),
        ((), "", False),
        (("--json-output",), "text", True),
    ],
)
def test_the_log_s_format(
    arguments: tuple[str, ...], text: str, as_json: bool, no_launch: list[LauncherOptions]
) -> None:
    assert run(*arguments, LOG_FORMAT=text).output == ""
    assert no_launch == [LauncherOptions(json_output=as_json)]


def test_an_unknown_format_is_said_and_does_not_matter(no_launch: list[LauncherOptions]) -> None:
    assert "LOG_FORMAT 'fancy' is not used" in run(LOG_FORMAT="fancy").output
    assert no_launch == [LauncherOptions()]
    (line,) = run("--json-output", LOG_LEVEL="a=b").output.splitlines()
    assert json.loads(line)["level"] == "warning"


@pytest.mark.parametrize(
    ("arguments", "hostname", "expected", "is_said"),
    [
        ((), "a-container-4711", LauncherOptions().hostname, True),
        ((), "10.0.0.7", "10.0.0.7", False),
        ((), "::1", "::1", False),
        ((), "", LauncherOptions().hostname, False),
        (("--hostname", "0.0.0.0"), "10.0.0.7", "0.0.0.0", False),
        (("--hostname", "localhost"), "a-container-4711", "localhost", False),
    ],
)
def test_the_name_of_a_container_is_no_address_to_bind(
    arguments: tuple[str, ...],
    hostname: str,
    expected: str,
    is_said: bool,
    no_launch: list[LauncherOptions],
) -> None:
    result = run(*arguments, HOSTNAME=hostname)
    assert result.exit_code == 0
    assert no_launch[0].hostname == expected
    assert ("it is no IP address" in result.output) is is_said
