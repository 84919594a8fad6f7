"""Adapters with names on the command line: vLLM's flag, TGI's flag, what a path means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from lorax_contract.hub import TOKEN_VARIABLES
from lorax_launcher import cli
from lorax_launcher.facts import DeviceFacts
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.resolve import LaunchPlan, resolve

FACTS = DeviceFacts(num_cores=2, memory_bytes=8 * 2**30, cache_dir="/cache")


def plan_of(**options: Any) -> LaunchPlan:
    return resolve(LauncherOptions(**options), FACTS, "/run/lorax")


def aliases_of(*modules: str, **options: Any) -> list[str]:
    return plan_of(lora_modules=modules, **options).router.adapter_aliases


@pytest.mark.parametrize(
    ("module", "alias"),
    [
        ("poet=/adapters/poet", "poet=local:/adapters/poet"),
        ("poet=org/poet@v1", "poet=hub:org/poet@v1"),
        ("poet=hub:org/poet", "poet=hub:org/poet"),
        ("poet=local:poet", "poet=local:poet"),
        ("poet=s3://bucket/poet", "poet=s3:s3://bucket/poet"),
        ("poet=/a=b", "poet=local:/a=b"),
        ('{"name": "poet", "path": "/p"}', "poet=local:/p"),
        ('{"name": "poet", "path": "/p", "base_model_name": null}', "poet=local:/p"),
    ],
)
def test_a_module_is_a_name_and_a_path(module: str, alias: str) -> None:
    assert aliases_of(module) == [alias]


def test_an_id_is_of_the_default_source() -> None:
    assert aliases_of("poet=x", adapter_source="local") == ["poet=local:x"]
    assert aliases_of("poet=x", default_adapter_source="s3") == ["poet=s3:x"]


def test_a_folder_that_is_there_is_meant_whatever_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo" / "poet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = f"{tmp_path}/demo/poet"
    for path in ("demo/poet", "./demo/poet", "demo/../demo/poet", "~/demo/poet"):
        plan = plan_of(lora_modules=(f"poet={path}",))
        assert plan.router.adapter_aliases == [f"poet=local:{folder}"]
        # Who names a folder allows it.
        assert plan.shards[0].adapter_local_roots == [folder]
    assert aliases_of("poet=demo/bard") == ["poet=hub:demo/bard"]


def test_tgi_s_flag_is_a_list_in_one_value() -> None:
    plan = plan_of(lora_adapters="org/poet, bard=/b,mine=org/x@v1,", lora_modules=("a=org/a",))
    assert plan.router.adapter_aliases == [
        "a=hub:org/a", "org/poet=hub:org/poet", "bard=local:/b", "mine=hub:org/x@v1",
    ]  # fmt: skip
    assert plan.shards[0].adapter_local_roots == ["/b"]
    # The router loads them by itself, with the server's token.
    assert not set(TOKEN_VARIABLES) & set(plan.withheld_from_router)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_modules": ("/adapters/poet",)}, "has no name: give it as name=path"),
        ({"lora_modules": ("poet=",)}, "lacks a name or a path"),
        ({"lora_modules": ("=/p",)}, "lacks a name or a path"),
        ({"lora_modules": ("{poet",)}, "is not valid JSON"),
        ({"lora_modules": ('{"name": "poet"}',)}, "lacks a name or a path"),
        ({"lora_modules": ('{"name": "x", "path": "/p", "rank": 3}',)}, "unknown keys: rank"),
        ({"lora_modules": ("a=/x", "a=/y")}, "two adapters have the name a"),
        ({"lora_modules": ("a=/x",), "lora_adapters": "a=/y"}, "two adapters have the name a"),
        ({"lora_modules": ("a=org/x@v1@\x00",)}, "control characters"),
        (
            {"lora_modules": ("a=/x",), "merge_adapter_weights": True, "adapter_id": "org/y"},
            "leave one of the two out",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of(**options)


def test_another_base_than_the_served_one_has_no_effect_which_is_said() -> None:
    def warnings(base: str, **options: Any) -> tuple[str, ...]:
        module = f'{{"name": "poet", "path": "/p", "base_model_name": "{base}"}}'
        return plan_of(lora_modules=(module,), **options).warnings

    assert warnings("org/base", model_id="org/base") == ()
    assert warnings("shown", served_model_name=("shown",)) == ()
    (warning,) = warnings("org/other", model_id="org/base")
    assert "org/other of --lora-modules poet has no effect" in warning


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner(env=environment).invoke(cli.main, list(arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lora-modules", "a=/a", "--lora-modules", "b=/b"),
        ("--lora-modules", "a=/a", "b=/b"),
        ("--port", "5", "--lora-modules", "a=/a", "b=/b", "--json-output"),
        ("--lora-modules=a=/a", "--lora-modules", "b=/b"),
    ],
)
def test_several_may_follow_the_flag_as_vllm_has_it(
    arguments: tuple[str, ...], no_launch: list[LauncherOptions]
) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert no_launch[0].lora_modules == ("a=/a", "b=/b")


def test_names_of_the_base_may_follow_their_flag(no_launch: list[LauncherOptions]) -> None:
    assert run("--served-model-name", "gpt-4o", "mine", "--port", "5").exit_code == 0
    assert no_launch[0].served_model_name == ("gpt-4o", "mine")
    assert plan_of(served_model_name=("gpt-4o",)).router.served_model_names == ["gpt-4o"]


def test_variables_say_the_same(no_launch: list[LauncherOptions]) -> None:
    assert run(LORA_ADAPTERS="org/a,b=/b", LORA_MODULES="c=/c d=/d").exit_code == 0
    (options,) = no_launch
    assert options.lora_adapters == "org/a,b=/b"
    assert options.lora_modules == ("c=/c", "d=/d")


def test_what_follows_another_flag_is_no_value_of_it(no_launch: list[LauncherOptions]) -> None:
    assert run("--lora-modules", "a=/a", "--port", "5", "b=/b").exit_code == 2
    assert no_launch == []
