"""What becomes of each name that --quantize takes."""

from __future__ import annotations

import dataclasses

import pytest

from lorax_contract.config import ConfigError, ShardConfig
from lorax_launcher.facts import DeviceFacts, GpuFacts
from lorax_launcher.options import LauncherOptions, UsageError
from lorax_launcher.quantize import CHOICES
from lorax_launcher.resolve import LaunchPlan, resolve

CPU = DeviceFacts(num_cores=8, memory_bytes=16 * 2**30)
GPU = dataclasses.replace(CPU, gpus=(GpuFacts("H200", 140 * 2**30),), torch_has_cuda=True)
# LoRAX 0.12's names.
LORAX = (
    "awq", "bitsandbytes", "bitsandbytes-fp4", "bitsandbytes-nf4", "eetq", "exl2", "fp8", "fp8-kv",
    "gptq", "hqq-2bit", "hqq-3bit", "hqq-4bit",
)  # fmt: skip


def plan_of(facts: DeviceFacts = CPU, **options: object) -> LaunchPlan:
    return resolve(LauncherOptions(**options), facts, "/run/lorax")  # type: ignore[arg-type]


def test_every_name_of_lorax_is_served_or_refused_by_name_with_what_to_do() -> None:
    assert set(LORAX) < set(CHOICES)
    for name in LORAX:
        for facts in (CPU, GPU):
            try:
                plan = plan_of(facts, quantize=name)
            except UsageError as error:
                text = str(error)
                assert f"--quantize {name} " in text
                assert any(
                    word in text for word in ("use ", "serve ", "leave ", "--kv-cache-dtype")
                )
            else:
                served = plan.shards[0].quantize
                assert served in (("none", "int8") if facts is CPU else ("none", "int4", "fp8"))
                if served == "none":
                    assert name in ("gptq", "awq")
                    assert any(f"--quantize {name} changes nothing" in note for note in plan.notes)
                elif served != name:
                    text = f"--quantize {name} is served as {served}"
                    assert any(text in note for note in plan.notes)


def test_int8_is_served_on_a_cpu() -> None:
    assert plan_of(quantize="int8").shards[0].quantize == "int8"
    assert plan_of().shards[0].quantize == "none"
    with pytest.raises(UsageError, match="computed on CPUs; use --quantize int4"):
        plan_of(GPU, quantize="int8")
    assert plan_of(GPU, quantize="int8", device="cpu").shards[0].quantize == "int8"


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_a_gpu_has_formats_of_its_own(name: str) -> None:
    assert plan_of(GPU, quantize=name).shards[0].quantize == name
    with pytest.raises(UsageError, match="use --quantize int8"):
        plan_of(quantize=name)
    with pytest.raises(UsageError, match="rows are bfloat16 beside it; leave --dtype float16 out"):
        plan_of(GPU, quantize=name, dtype="float16")


def test_several_shards_on_a_cpu_quantize_each_its_part() -> None:
    plan = plan_of(quantize="int8", num_shard=2)
    assert [shard.quantize for shard in plan.shards] == ["int8", "int8"]


def test_a_shard_that_would_not_quantize_takes_no_order_to() -> None:
    with pytest.raises(ConfigError, match="ranks on CPUs compute in int8"):
        ShardConfig(
            model_dir="m", model_id="m", shard_uris=["unix:///a"], quantize="int8", device="cuda"
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "bfloat16"}, "leave --dtype bfloat16 out"),
        ({"linear_backend": "onednn"}, "leave --linear-backend out"),
        ({"disable_custom_kernels": True}, "leave --disable-custom-kernels out"),
    ],
)
def test_what_contradicts_it_is_named(options: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        plan_of(quantize="int8", **options)
