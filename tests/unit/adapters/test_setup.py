"""A rank's adapter parts, made from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.in_loop import in_loop
from tests.helpers.lane_world import NotingPreparer
from tests.helpers.small_adapters import make_base, write
from tests.helpers.stored_adapters import put_adapter

from lorax_contract.adapters import (
    AdapterContent,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
)
from lorax_contract.config import ShardConfig
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters import setup
from lorax_shard.peft.context import make_context


def config(folder: Path, **values: Any) -> ShardConfig:
    settings = {"model_dir": "m", "model_id": "m", "shard_uris": ["unix:///0", "unix:///1"],
                "world_size": 2, "rendezvous": "unused", "adapter_store_dir": str(folder / "store"), **values}  # fmt: skip
    return ShardConfig(**settings)


def test_the_fetcher_is_told_what_the_shard_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://here:9")
    told = config(
        tmp_path, adapter_store_bytes=77, adapter_local_roots=["/a"], adapter_s3_roots=["s3://b"],
        s3_endpoint="http://s3:9", adapter_timeout_s=5.0, max_adapter_rank=16,
    )  # fmt: skip
    context = make_context(make_base(), setup.limits_of(told))
    made = setup.fetch_setup(told, context)
    assert (made.store_dir, made.store_max_bytes) == (told.adapter_store_dir, 77)
    assert made.process.deadline_s == 5.0
    assert made.sources.local_roots == ("/a",)
    assert (made.sources.s3_roots, made.sources.s3_endpoint) == (("s3://b",), "http://s3:9")
    assert made.sources.hub_endpoint == "http://here:9"
    assert made.verify.context == context
    assert setup.limits_of(told).max_rank == 16


@pytest.mark.parametrize(
    ("device", "dtype", "low_rank"),
    [
        ("cpu", torch.float32, torch.float32),
        ("cpu", torch.bfloat16, torch.float32),
        ("cuda", torch.bfloat16, torch.bfloat16),
    ],
)
def test_low_rank_parts_are_exact_on_a_cpu_and_small_on_a_gpu(
    tmp_path: Path, device: str, dtype: torch.dtype, low_rank: torch.dtype
) -> None:
    told = config(tmp_path, device=device)
    store, preparer = setup.make_store(told), NotingPreparer()
    part = put_adapter(store, write(tmp_path / "adapter"), make_base())
    lane = setup.make_prepare_lane(told, setup.make_host_cache(told, store), preparer, dtype)
    lane.prepare(AdapterHandle(1), AdapterContent(parts=(part,)))
    assert {delta.a.dtype for delta in preparer.made[0].modules.values()} == {low_rank}


def test_host_copies_have_the_budget_that_the_shard_is_told(tmp_path: Path) -> None:
    told = config(tmp_path, adapter_host_bytes=1)
    store = setup.make_store(told)
    part = put_adapter(store, write(tmp_path / "adapter"), make_base())
    host = setup.make_host_cache(told, store)
    assert host.get(part).nbytes > 1
    assert host.sizes() == {}


@in_loop
async def test_rank_0_fetches_for_its_host(tmp_path: Path) -> None:
    """Who is reached by TCP may have a host of its own."""
    uris = ["127.0.0.1:1", "127.0.0.1:2"]
    for rank, has_host in ((0, False), (1, False), (1, True)):
        told = config(tmp_path, rank=rank, **({"shard_uris": uris} if has_host else {}))
        store = setup.make_store(told)
        host = setup.make_host_cache(told, store)
        lane = setup.make_prepare_lane(told, host, NotingPreparer(), torch.float32)
        rank_adapters = setup.make_rank_adapters(told, store, host, lane, make_base())
        words = "takes no local adapters" if rank == 0 or has_host else "rank 0 fetches"
        with pytest.raises(AdapterUnavailableError, match=words):
            await rank_adapters.fetch(AdapterQuery(ref=AdapterRef.of("local", "x")))
        await rank_adapters.close()
