"""The options of adapters: what shards, router and preparation are told of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from lorax_launcher.facts import DeviceFacts, s3_endpoint
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.resolve import LaunchPlan, PrepareReport, resolve

FACTS = DeviceFacts(num_cores=2, memory_bytes=8 * 2**30, cache_dir="/cache")


def plan_of(facts: DeviceFacts = FACTS, **options: Any) -> LaunchPlan:
    return resolve(LauncherOptions(**options), facts, "/run/lorax")


def test_adapters_are_kept_in_the_cache_unless_another_folder_is_named() -> None:
    assert plan_of().shards[0].adapter_store_dir == "/cache/adapters"
    assert plan_of(cache_dir="/other").shards[0].adapter_store_dir == "/other/adapters"


def test_sizes_are_told_in_bytes() -> None:
    (shard,) = plan_of(adapter_host_memory_gb=0.5, adapter_store_gb=1.5).shards
    assert (shard.adapter_host_bytes, shard.adapter_store_bytes) == (500_000_000, 1_500_000_000)
    assert plan_of(adapter_store_gb=1e-12).shards[0].adapter_store_bytes == 1


def test_one_source_stands_for_all_that_are_not_named() -> None:
    router = plan_of(adapter_source="s3", preloaded_adapter_ids=("b/x", "b/y")).router
    assert router.default_adapter_source == router.preloaded_adapter_source == "s3"
    assert router.preloaded_adapter_ids == ["b/x", "b/y"]
    router = plan_of(adapter_source="s3", default_adapter_source="hub").router
    assert (router.default_adapter_source, router.preloaded_adapter_source) == ("hub", "s3")


def test_relative_roots_are_made_absolute() -> None:
    (root,) = plan_of(adapter_local_root=("some/folder",)).shards[0].adapter_local_roots
    assert root.startswith("/")
    assert root.endswith("/some/folder")


def test_a_folder_that_the_operator_names_needs_no_root_of_its_own() -> None:
    def roots(**options: Any) -> list[str]:
        return plan_of(**options).shards[0].adapter_local_roots

    assert roots(adapter_id="/a/poet", adapter_source="local") == ["/a/poet"]
    assert roots(
        adapter_local_root=("/r",), adapter_id="/a/poet", adapter_source="local",
        preloaded_adapter_ids=("/b/x",),
    ) == ["/r", "/a/poet", "/b/x"]  # fmt: skip
    # Below a root, or of another source: no folder of the working directory is meant.
    assert roots(adapter_id="poet", adapter_source="local") == []
    assert roots(adapter_id="/a/poet", preloaded_adapter_ids=("/b/x",)) == []


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, None),
        ({"S3_ENDPOINT_URL": "http://here:9"}, "http://here:9"),
        ({"R2_ACCOUNT_ID": "me"}, "https://me.r2.cloudflarestorage.com"),
    ],
)
def test_where_s3_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], endpoint: str | None
) -> None:
    for name in ("S3_ENDPOINT_URL", "R2_ACCOUNT_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    facts = dataclasses.replace(FACTS, s3_endpoint=s3_endpoint())
    assert plan_of(facts).shards[0].s3_endpoint == endpoint


@pytest.mark.parametrize(
    "option", ["adapter_source", "default_adapter_source", "preloaded_adapter_source"]
)
def test_predibase_is_refused_in_words(option: str) -> None:
    with pytest.raises(UsageError, match="pbase is refused: adapters of Predibase"):
        plan_of(**{option: "pbase"})


# --- --merge-adapter-weights -------------------------------------------------------------

MERGED: dict[str, Any] = {
    "merge_adapter_weights": True, "adapter_id": "/a/poet", "adapter_source": "local",
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"merge_adapter_weights": True}, "--merge-adapter-weights needs --adapter-id"),
        ({**MERGED, "preloaded_adapter_ids": ("x",)}, "leave one of the two out"),
    ],
)
def test_merging_asks_for_one_adapter(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of(**options)


def test_a_merged_adapter_is_fetched_by_the_preparation() -> None:
    facts = dataclasses.replace(FACTS, s3_endpoint="http://here:9")
    plan = plan_of(
        facts, **MERGED, adapter_local_root=("/r",), adapter_s3_root=("s3://b",),
        adapter_store_gb=2.0, adapter_timeout_s=5.0,
    )  # fmt: skip
    pairs = set(itertools.pairwise(plan.prepare_args))
    assert {
        ("--adapter-id", "/a/poet"), ("--adapter-source", "local"),
        ("--adapter-store-dir", "/cache/adapters"), ("--adapter-store-bytes", "2000000000"),
        ("--adapter-timeout-s", "5.0"), ("--adapter-local-root", "/r"),
        ("--adapter-local-root", "/a/poet"), ("--adapter-s3-root", "s3://b"),
        ("--s3-endpoint", "http://here:9"),
    } <= pairs  # fmt: skip
    assert "--adapter-id" not in plan_of(adapter_id="org/poet").prepare_args


def test_a_merged_adapter_reaches_the_shard_and_shuts_others_out() -> None:
    plan = plan_of(**MERGED)
    model = PrepareReport("served", "/m", "/t", None, adapter_dir="/store/entry")
    (shard,) = plan.with_model(model).shards
    assert shard.merge_adapter_dir == "/store/entry"
    assert not shard.adapters
    assert plan.router.adapter_id is None
    assert "--merge-adapter-weights" in (plan.router.adapter_refusal or "")
    without = plan_of(adapter_id="org/poet").with_model(PrepareReport("served", "/m", "/t", None))
    assert without.shards[0].merge_adapter_dir is None
    assert without.router.adapter_refusal is None
