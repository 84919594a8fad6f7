"""Options and facts in, configurations out."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from lorax_contract.config import RouterConfig, ShardConfig
from lorax_contract.hub import TOKEN_VARIABLES
from lorax_contract.keys import hash_of
from lorax_launcher.facts import DeviceFacts, GpuFacts
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.resolve import LaunchPlan, PrepareReport, resolve

CPU = DeviceFacts(num_cores=8, memory_bytes=16 * 2**30)
GPU = GpuFacts("H200", 140 * 2**30)
ONE_GPU = dataclasses.replace(CPU, gpus=(GPU,), torch_has_cuda=True)


def plan_of(facts: DeviceFacts = CPU, **options: Any) -> LaunchPlan:
    return resolve(LauncherOptions(**options), facts, "/run/lorax")


@pytest.mark.parametrize(
    ("facts", "asked", "device", "kv_fraction"),
    [
        (CPU, "auto", "cpu", 0.5),
        (CPU, "cpu", "cpu", 0.5),
        (ONE_GPU, "auto", "cuda", 0.9),
        (ONE_GPU, "cuda", "cuda", 0.9),
        (ONE_GPU, "cpu", "cpu", 0.5),
        (dataclasses.replace(ONE_GPU, torch_has_cuda=False), "auto", "cpu", 0.5),
    ],
)
def test_device(facts: DeviceFacts, asked: str, device: str, kv_fraction: float) -> None:
    (shard,) = plan_of(facts, device=asked).shards
    assert (shard.device, shard.kv_memory_fraction) == (device, kv_fraction)


def test_swap_space_is_on_where_host_memory_is_another() -> None:
    assert plan_of(CPU).shards[0].swap_bytes == 0
    assert plan_of(ONE_GPU).shards[0].swap_bytes == 4 << 30
    assert plan_of(CPU, swap_space=0.5).shards[0].swap_bytes == 1 << 29
    assert plan_of(ONE_GPU, swap_space=0.0).shards[0].swap_bytes == 0


@pytest.mark.parametrize(
    ("facts", "threads"),
    [
        (CPU, 8),
        (dataclasses.replace(CPU, threads_preset=True), None),
        (ONE_GPU, None),
    ],
)
def test_threads(facts: DeviceFacts, threads: int | None) -> None:
    assert plan_of(facts).shards[0].num_threads == threads


def test_a_narrow_kv_cache_brings_a_backend_that_reads_it() -> None:
    (shard,) = plan_of(kv_cache_dtype="fp8_e4m3").shards
    assert (shard.kv_cache_dtype, shard.attention_backend) == ("fp8_e4m3", "sdpa")
    (shard,) = plan_of(ONE_GPU, kv_cache_dtype="fp8_e4m3").shards
    assert shard.attention_backend == "triton"
    (shard,) = plan_of(kv_cache_dtype="fp8_e4m3", attention_backend="torch").shards
    assert shard.attention_backend == "torch"
    assert plan_of().shards[0].attention_backend == "auto"


def test_a_gpu_may_be_taken_in_part() -> None:
    (shard,) = plan_of(ONE_GPU, cuda_memory_fraction=0.4).shards
    assert (shard.cuda_memory_fraction, shard.kv_memory_fraction) == (0.4, 0.9)
    assert plan_of().shards[0].cuda_memory_fraction == 1.0


def test_options_without_effect_are_named_when_given() -> None:
    assert plan_of().warnings == ()
    given = {"waiting_served_ratio": 2.0, "max_waiting_tokens": 3}
    warnings = plan_of(**given).warnings
    assert [each.split()[0] for each in warnings] == [
        "--waiting-served-ratio", "--max-waiting-tokens",
    ]  # fmt: skip
    assert plan_of(**given, scheduling_policy="lorax").warnings == ()
    assert plan_of(max_waiting_tokens=3, batching="decode").warnings == ()
    assert plan_of(max_waiting_tokens=3, eager_prefill=False).warnings == ()


@pytest.mark.parametrize(
    ("given", "batching"),
    [
        ({}, "mixed"),
        ({"batching": "decode"}, "decode"),
        ({"eager_prefill": True}, "prefill"),
        ({"eager_prefill": False}, "decode"),
        ({"eager_prefill": True, "batching": "prefill"}, "prefill"),
    ],
)
def test_lorax_names_two_of_the_batchings(given: dict[str, Any], batching: str) -> None:
    assert plan_of(**given).router.batching == batching


def test_two_batchings_at_once_are_refused() -> None:
    words = "--eager-prefill true is --batching prefill, and --batching mixed was given"
    with pytest.raises(UsageError, match=words):
        plan_of(eager_prefill=True, batching="mixed")


def test_what_a_step_may_take_reaches_the_router() -> None:
    given = {"max_batch_kv_read": 7000, "max_partial_prompts": 3, "target_itl_ms": 40.5,
             "max_batch_size": 9, "max_waiting_tokens": 5, "waiting_served_ratio": 0.5}  # fmt: skip
    router = plan_of(**given, scheduling_policy="lorax").router
    assert {name: getattr(router, name) for name in given} == given


def test_two_sizes_of_the_kv_cache_get_a_word() -> None:
    (warning,) = plan_of(num_blocks=300, max_batch_total_tokens=4096).warnings
    assert "--max-batch-total-tokens 4096 has no effect: --num-blocks 300 is 4800 tokens" in warning
    assert plan_of(num_blocks=256, max_batch_total_tokens=4096).warnings == ()
    assert plan_of(num_blocks=300).warnings == ()


def test_all_children_share_one_cache_folder() -> None:
    assert dict(plan_of(cache_dir="/c").environment)["LORAX_CACHE"] == "/c"
    assert "LORAX_CACHE" not in dict(plan_of().environment)


def test_lists_survive_the_json_document() -> None:
    router = plan_of(cors_allow_origin=("https://a", "https://b")).router
    assert RouterConfig.from_json(router.to_json()).cors_allow_origin == ["https://a", "https://b"]


def test_children_end_with_the_launcher() -> None:
    plan = plan_of()
    assert plan.router.lifeline
    assert all(shard.lifeline for shard in plan.shards)
    assert "--lifeline" in plan.prepare_args


def test_router_and_shard_meet_at_a_private_socket_or_at_the_one_asked_for() -> None:
    plan = plan_of()
    assert plan.router.shard_uri == plan.shards[0].shard_uris[0] == "unix:/run/lorax/shard-0"
    assert plan_of(shard_uds_path="/tmp/s").router.shard_uri == "unix:/tmp/s-0"


def test_prepare_gets_what_names_the_model() -> None:
    args = plan_of(
        model_id="org/name", revision="abc", cache_dir="/c", trust_remote_code=True
    ).prepare_args
    pairs = set(itertools.pairwise(args))
    assert {("--model-id", "org/name"), ("--revision", "abc"), ("--cache-dir", "/c")} <= pairs
    assert "--trust-remote-code" in args
    assert "--model-id" not in plan_of().prepare_args


def test_kernels_of_a_cpu_are_compiled_beside_the_model_only_where_it_computes() -> None:
    assert "--compile-kernels" in plan_of().prepare_args
    assert "--compile-kernels" not in plan_of(ONE_GPU).prepare_args


def test_the_hub_cache_goes_to_the_children_as_a_variable() -> None:
    assert plan_of(huggingface_hub_cache="/h").environment == (("HF_HUB_CACHE", "/h"),)


def test_the_prepared_model_is_filled_in() -> None:
    plan = plan_of().with_model(PrepareReport("served", "/m", "/t", "sha"))
    (shard,) = plan.shards
    assert (shard.model_id, shard.model_dir, shard.revision) == ("served", "/m", "sha")
    assert (plan.router.model_id, plan.router.tokenizer_dir) == ("served", "/t")
    assert ShardConfig.from_json(shard.to_json()) == shard


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, (False, 256, None)),
        ({"eager": True}, (True, 256, None)),
        ({"compile_max_batch_size": 64, "compile_max_rank": 16}, (False, 64, 16)),
    ],
)
def test_lorax_s_flags_say_what_graphs_have_room_for(
    options: dict[str, Any], graphs: tuple[bool, int, int | None]
) -> None:
    (shard,) = plan_of(**options, max_active_adapters=7).shards
    assert graphs == (shard.eager, shard.graph_max_rows, shard.graph_max_rank)
    assert shard.max_active_adapters == 7


@pytest.mark.parametrize(
    ("options", "backends"),
    [
        ({}, ("auto", "auto", "auto", "auto")),
        ({"disable_custom_kernels": True}, ("sdpa", "torch", "torch", "cpu")),
        ({"disable_sgmv": True}, ("auto", "auto", "auto", "cpu")),
        (
            {"disable_custom_kernels": True, "attention_backend": "torch", "lora_backend": "torch"},
            ("torch", "torch", "torch", "torch"),
        ),
        (
            {"disable_custom_kernels": True, "kv_cache_dtype": "fp8_e4m3"},
            ("sdpa", "torch", "torch", "cpu"),
        ),
        (
            {"disable_custom_kernels": True, "elementwise_backend": "cpp"},
            ("sdpa", "torch", "cpp", "cpu"),
        ),
    ],
)
def test_lorax_s_switches_against_custom_kernels_choose_torch_s_own(
    options: dict[str, Any], backends: tuple[str, str, str, str]
) -> None:
    (shard,) = plan_of(**options).shards
    assert backends == (
        shard.attention_backend,
        shard.linear_backend,
        shard.elementwise_backend,
        shard.lora_backend,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharded": True}, "say how many shards with --num-shard"),
        ({"sharded": True, "num_shard": 1}, "--sharded true needs --num-shard above 1"),
        ({"sharded": False, "num_shard": 2}, "contradict"),
        ({"num_shard": 0}, "--num-shard"),
        ({"source": "s3"}, "--source s3 needs --model-id"),
        ({"source": "s3", "model_id": "s3://b/m", "revision": "1"}, "have no revisions"),
        ({"revision": "abc"}, "--revision needs --model-id"),
        ({"model_id": "a@b", "revision": "c"}, "names a revision already"),
        ({"device": "cuda"}, "no GPU is visible"),
        ({"kv_memory_fraction": 0.5, "memory_wiggle_room": 0.6}, "same share"),
        ({"cuda_memory_fraction": 0.5}, "on the CPU; lower --kv-memory-fraction"),
        ({"max_total_tokens": 100, "max_batch_total_tokens": 50}, "can never fit"),
        ({"max_total_tokens": 100, "max_input_length": 100}, "--max-input-length"),
        ({"max_batch_size": 0}, "--max-batch-size"),
        ({"shard_uds_path": "/" + "x" * 120}, "--shard-uds-path: .* longer path"),
        ({"admin_uds_path": "/" + "x" * 120}, "--admin-uds-path: .* longer path"),
        ({"admin_port": 3000}, "must differ"),
        ({"cors_allow_origin": ("*",), "cors_allow_credentials": True}, "any page could act"),
    ],
)
def test_impossible_options_are_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of(**options)


def test_strangers_are_let_in_only_where_that_is_asked_for() -> None:
    router = plan_of().router
    assert router.hostname == "127.0.0.1"
    assert router.cors_allow_origin == []
    assert (router.admin_uds, router.admin_port) == ("/run/lorax/admin", None)
    assert plan_of(hostname="0.0.0.0").router.hostname == "0.0.0.0"
    assert plan_of(admin_uds_path="here").router.admin_uds == str(Path("here").absolute())


def test_cors_without_an_origin_gets_a_word() -> None:
    (warning,) = plan_of(cors_allow_credentials=True).warnings
    assert warning == "--cors-allow-credentials has no effect without --cors-allow-origin"
    assert plan_of(cors_allow_credentials=True, cors_allow_origin=("https://a",)).warnings == ()


@pytest.mark.parametrize("options", [{"num_shard": 1}, {"sharded": False}])
def test_one_shard_may_be_asked_for(options: dict[str, Any]) -> None:
    assert len(plan_of(**options).shards) == 1


def test_a_cpu_build_of_torch_is_named_as_the_reason() -> None:
    facts = dataclasses.replace(ONE_GPU, torch_has_cuda=False)
    with pytest.raises(UsageError, match="CPU build"):
        plan_of(facts, device="cuda")
    assert any("unused" in note for note in plan_of(facts).notes)


TWO_GPUS = dataclasses.replace(
    ONE_GPU,
    gpus=(dataclasses.replace(GPU, handle="GPU-a"), dataclasses.replace(GPU, handle="3")),
)


def test_unused_gpus_are_noted() -> None:
    plan = plan_of(TWO_GPUS, num_shard=1)
    assert any("one is used" in note for note in plan.notes)
    assert plan.shard_environments == ((("CUDA_VISIBLE_DEVICES", "GPU-a"),),)


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"num_shard": 2}])
def test_each_visible_gpu_gets_a_rank_of_its_own(options: dict[str, Any]) -> None:
    plan = plan_of(TWO_GPUS, **options)
    assert [shard.rank for shard in plan.shards] == [0, 1]
    assert {shard.world_size for shard in plan.shards} == {2}
    assert {shard.ranks_on_device for shard in plan.shards} == {1}
    assert [dict(each) for each in plan.shard_environments] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-a"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]


def test_more_ranks_than_gpus_share_them() -> None:
    plan = plan_of(TWO_GPUS, num_shard=4)
    assert {shard.ranks_on_device for shard in plan.shards} == {2}
    assert dict(plan.shard_environments[2])["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    assert any("share a GPU" in note for note in plan.notes)


def test_ranks_on_a_cpu_share_it() -> None:
    facts = dataclasses.replace(CPU, num_cores=8)
    plan = plan_of(facts, num_shard=3)
    assert [shard.num_threads for shard in plan.shards] == [2, 2, 2]
    assert {shard.ranks_on_device for shard in plan.shards} == {3}
    assert {shard.rendezvous for shard in plan.shards} == {"file:///run/lorax/rendezvous"}
    assert all(shard.shard_uris == plan.shards[0].shard_uris for shard in plan.shards)
    assert len(set(plan.shards[0].shard_uris)) == 3
    assert set(plan.shard_environments) == {(("GLOO_SOCKET_IFNAME", "lo"),)}
    chosen = dataclasses.replace(facts, gloo_preset=True)
    assert set(plan_of(chosen, num_shard=2).shard_environments) == {()}


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"master_addr": "10.0.0.1"}, "tcp://10.0.0.1:29500"),
        ({"master_port": 5}, "tcp://localhost:5"),
        ({"master_addr": "fe80::1", "master_port": 7}, "tcp://[fe80::1]:7"),
    ],
)
def test_ranks_meet_where_they_are_told(options: dict[str, Any], place: str) -> None:
    plan = plan_of(num_shard=2, shard_timeout_s=7.0, **options)
    assert {(shard.rendezvous, shard.group_timeout_s) for shard in plan.shards} == {(place, 7.0)}


@pytest.mark.parametrize(
    ("options", "needs_token"),
    [
        ({}, False),
        ({"adapter_id": "org/poet"}, True),
        ({"adapter_id": "org/poet", "merge_adapter_weights": True}, False),
        ({"adapter_id": "poet", "adapter_source": "local"}, False),
        ({"preloaded_adapter_ids": ("org/poet",)}, True),
        ({"preloaded_adapter_ids": ("x",), "preloaded_adapter_source": "s3"}, False),
    ],
)
def test_the_router_gets_the_hub_token_only_for_adapters_that_it_loads_itself(
    options: dict[str, Any], needs_token: bool
) -> None:
    withheld = plan_of(**options).withheld_from_router
    assert (set(TOKEN_VARIABLES) <= set(withheld)) == (not needs_token)


def test_what_opens_buckets_is_for_the_shards_alone() -> None:
    plan = plan_of()
    opening = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    assert opening <= set(plan.withheld_from_router)
    assert not opening & set(plan.withheld_from_shards)


@pytest.mark.parametrize("flag", ["api_key", "admin_api_key", "metrics_api_key"])
def test_a_key_goes_no_further_than_the_launcher(flag: str) -> None:
    key = "sk-the-secret-itself"
    plan = plan_of(**{flag: (f"{key},sk-another-one", key)})
    assert key not in repr(plan)
    assert key not in plan.router.to_json() + "".join(each.to_json() for each in plan.shards)
    assert hash_of(key) in plan.router.to_json()
    assert key not in repr(LauncherOptions(**{flag: (key,)}))
    for withheld in (plan.withheld_from_router, plan.withheld_from_shards):
        assert {"LORAX_API_KEY", "API_KEY", "ADMIN_API_KEY", "METRICS_API_KEY"} <= set(withheld)
    assert "LORAX_SSL_KEYFILE_PASSWORD" in plan.withheld_from_shards
    assert "LORAX_SSL_KEYFILE_PASSWORD" not in plan.withheld_from_router


def test_a_bad_key_is_refused_by_its_place() -> None:
    with pytest.raises(UsageError, match="--api-key: key 2 is too short") as caught:
        plan_of(api_key=("long-enough-key,short",))
    assert "short," not in str(caught.value)
    assert "long-enough" not in str(caught.value)
