"""Every option decides something, and everything that a person may decide has an option."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import pytest

from lorax_contract.config import RouterConfig, ShardConfig
from lorax_launcher.facts import DeviceFacts, GpuFacts
from lorax_launcher.flags import OPTION_GROUPS
from lorax_launcher.options import LauncherOptions
from lorax_launcher.resolve import LaunchPlan, resolve

GPU = GpuFacts("H200", 140 * 2**30)
FACTS = DeviceFacts(
    num_cores=8, memory_bytes=16 * 2**30, gpus=(GPU, GPU), torch_has_cuda=True, cache_dir="/cache"
)
DEFAULTS = LauncherOptions()
OPTIONS = {option.name: option for group in OPTION_GROUPS.values() for option in group}
# Read by the launcher itself.
NOT_FOR_CHILDREN = {"json_output", "download_only"}
# What an option needs beside it to mean anything, and values that cannot be guessed.
VALUES: dict[str, Any] = {"num_shard": 3, "default_adapter_source": "s3",
                          "preloaded_adapter_source": "s3", "hostname": "10.0.0.7", "sharded": False,
                          "preloaded_adapter_ids": ("org/a",), "source": "local",
                          "adapter_source": "local", "device": "cpu",
                          "lora_modules": ("poet=org/a",), "lora_adapters": "poet=/a",
                          "watermark_gamma": 0.25, "batching": "decode",
                          "api_key": ("a-long-key",),
                          "admin_api_key": ("an-admin-key",),
                          "metrics_api_key": ("a-scrape-key",), "restarts": 0,
                          "otlp_endpoint": "http://collector:4317"}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "revision": {"model_id": "org/name"},
    "merge_adapter_weights": {"adapter_id": "org/poet"},
    "max_input_length": {"max_total_tokens": 100},
    "master_port": {"master_addr": "10.0.0.1"},
    "memory_wiggle_room": {"kv_memory_fraction": None},
    "adapter_local_root": {"adapter_source": "local"},
    "quantize": {"device": "cpu"},
    "ssl_keyfile": {"ssl_certfile": "chain.pem"},
}
# Made by the launcher from the machine and the prepared model, or for tests only.
DECIDED = {
    ShardConfig: {
        "ready_fd", "lifeline", "model_dir", "tokenizer_dir", "model_id", "rank", "s3_endpoint",
        "merge_adapter_dir", "batch_invariant", "epoch", "ranks_on_device", "was_probed",
        "shard_tls_dir",
    },
    RouterConfig: {"ready_fd", "lifeline", "model_id", "tokenizer_dir", "epoch", "shard_tls_dir"},
}  # fmt: skip


def plan_of(**options: Any) -> LaunchPlan:
    return resolve(LauncherOptions(**options), FACTS, "/run/lorax")


def other_value(name: str) -> Any:
    """A value that the option takes and that is not its default."""
    if name in VALUES:
        return VALUES[name]
    kind, default = OPTIONS[name].type, getattr(DEFAULTS, name)
    if isinstance(default, bool):
        return not default
    if isinstance(kind, click.Choice):
        return next(choice for choice in kind.choices if choice != default)
    if isinstance(kind, click.types.FloatRange):
        return (default or 0.0) / 2 + 0.25
    if isinstance(kind, click.types.IntParamType):
        return (default or 0) + 7
    return ("x",) if OPTIONS[name].multiple else "x"


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - NOT_FOR_CHILDREN - {"show_env"}))
def test_every_option_reaches_what_is_started(name: str) -> None:
    beside = BESIDE.get(name, {})
    assert plan_of(**{**beside, name: other_value(name)}) != plan_of(**beside)


@pytest.mark.parametrize("kind", [ShardConfig, RouterConfig])
def test_every_field_of_a_configuration_has_an_option(kind: type) -> None:
    def values(plan: LaunchPlan) -> dict[str, Any]:
        return dataclasses.asdict(plan.shards[0] if kind is ShardConfig else plan.router)

    reached: set[str] = set()
    for name in set(OPTIONS) - {"show_env"}:
        beside = BESIDE.get(name, {})
        before, after = plan_of(**beside), plan_of(**{**beside, name: other_value(name)})
        reached |= {key for key, value in values(after).items() if values(before)[key] != value}
    fields = {field.name for field in dataclasses.fields(kind)}
    # The model's name and revision are the preparation's to report.
    assert fields - reached - DECIDED[kind] - {"revision"} == set()


def test_options_left_alone_are_the_defaults_of_the_contract() -> None:
    facts = DeviceFacts(num_cores=8, memory_bytes=2**34, threads_preset=True, cache_dir="/c")
    plan = resolve(DEFAULTS, facts, "/run/lorax")
    router = RouterConfig(model_id="", tokenizer_dir="", shard_uri=plan.router.shard_uri)
    # The launcher has a private folder for the socket, and one beside the store; the router has none.
    assert plan.router.admin_uds == "/run/lorax/admin"
    assert plan.router.adapter_registry == "/c/adapters/servers/3000-default.sqlite3"
    own = {"admin_uds": None, "adapter_registry": ""}
    told = dataclasses.replace(
        plan.router, lifeline=False, shard_wait_s=0.0, shard_return_s=0.0, **own
    )
    assert told == router
    (first,) = plan.shards
    shard = ShardConfig(
        model_dir="", model_id="", shard_uris=first.shard_uris, adapter_store_dir="/c/adapters",
        lifeline=True,
    )  # fmt: skip
    differ = {
        field.name
        for field in dataclasses.fields(ShardConfig)
        if getattr(first, field.name) != getattr(shard, field.name)
    }
    # In bytes here, in decimal gigabytes there; and the launcher waits less long.
    assert differ == {"adapter_store_bytes", "adapter_host_bytes", "start_timeout_s"}


@pytest.mark.parametrize("name", sorted(NOT_FOR_CHILDREN))
def test_what_the_launcher_reads_itself_changes_no_child(name: str) -> None:
    assert plan_of(**{name: True}) == plan_of()
