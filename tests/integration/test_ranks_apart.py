"""Two ranks with stores of their own, as on two machines: one has what the other cannot reach."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.certificates import Authority
from tests.helpers.in_loop import in_loop
from tests.helpers.peft_folders import greedy_tokens, load_adapter, load_model, save_adapter
from tests.helpers.plans import make_spec
from tests.helpers.server import free_ports
from tests.helpers.shard_process import ShardProcess
from tests.helpers.shard_rows import ShardRows
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.adapters import (
    AdapterContent,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
)
from lorax_contract.step import AdapterHandle, RequestId, WarmupSpec
from lorax_proto.mutual_tls import MutualTls
from lorax_router.shards.group import ShardGroup
from lorax_shard.store.store import AdapterStore

BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 4, 128, 10
PROMPT = [5, 9, 17, 23, 40]
HANDLE = AdapterHandle(1)


@dataclass
class Apart:
    """A group over two stores, and folders of adapters of which only rank 0 has any."""

    group: ShardGroup
    roots: list[Path]
    stores: list[AdapterStore]

    async def fetch(self, name: str, *, refresh: bool = False) -> FetchedAdapter:
        query = AdapterQuery(ref=AdapterRef.of("local", name), refresh=refresh)
        return await self.group.fetch_adapter(query)


def start(rank: int, folder: Path, model_dir: Path, uris: list[str], **settings: Any) -> Any:
    """Start a rank in a folder that stands for its machine."""
    (folder / "adapters").mkdir(parents=True)
    return ShardProcess(
        folder, model_dir, rank=rank, world_size=2, shard_uris=uris, num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE, adapter_store_dir=str(folder / "store"),
        adapter_local_roots=[str(folder / "adapters")], **settings,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def apart(tmp_path: Path, model_dir: Path) -> AsyncIterator[Apart]:
    authority = Authority("ours")
    tls = str(authority.write(tmp_path / "tls", "shards"))
    *ports, meeting = free_ports(3)
    uris = [f"127.0.0.1:{port}" for port in ports]
    settings = {"shard_tls_dir": tls, "rendezvous": f"tcp://127.0.0.1:{meeting}"}
    folders = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        # Each waits for the other before it is ready.
        with ThreadPoolExecutor(2) as starts:
            begun = [
                starts.submit(start, rank, folders[rank], model_dir, uris, **settings)
                for rank in range(2)
            ]
        for each in begun:
            stack.enter_context(each.result())
        group = await ShardGroup.connect(uris[0], tls=MutualTls.read(tls))
        await group.warmup(
            WarmupSpec(max_input_length=64, max_total_tokens=96, max_step_tokens=64, max_rows=8)
        )
        try:
            yield Apart(
                group,
                [folder / "adapters" for folder in folders],
                [AdapterStore(folder / "store", max_bytes=1 << 30) for folder in folders],
            )
        finally:
            await group.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


@in_loop
async def test_a_folder_that_only_rank_0_has_serves_both(tmp_path: Path, model_dir: Path) -> None:
    async with apart(tmp_path, model_dir) as world:
        names = ["q_proj", "o_proj", "down_proj"]
        folder = save_adapter(
            model_dir, world.roots[0] / "poet", r=5, target_modules=names, use_dora=True
        )
        fetched = await world.fetch("poet")
        await world.group.prepare_adapter(HANDLE, AdapterContent(parts=(fetched.part,)))
        rows = ShardRows(
            world.group, itertools.count(1), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE
        )
        specs = {"prompt": PROMPT, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        rows.add(make_spec(1, adapter=HANDLE, **specs), make_spec(2, **specs))
        await rows.run(16, activate=[HANDLE])
        tuned = greedy_tokens(load_adapter(model_dir, folder), PROMPT, NEW_TOKENS)
        base = greedy_tokens(load_model(model_dir), PROMPT, NEW_TOKENS)
        assert tuned != base
        assert [rows.rows[RequestId(each)].output for each in (1, 2)] == [tuned, base]
        for store in world.stores:
            assert [entry.digest for entry in store.entries()] == [fetched.part.store_digest]
            store.check()

        # Whatever another folder of this name has on rank 1's machine is not asked for.
        save_adapter(model_dir, world.roots[1] / "poet", seed=7, r=2, target_modules=names)
        assert (await world.fetch("poet", refresh=True)).part == fetched.part
        assert [len(store.entries()) for store in world.stores] == [1, 1]

        # One whose files leave rank 1's disk comes again.
        await rows.step(deactivate=[HANDLE])
        await world.group.release_adapter(HANDLE)
        shutil.rmtree(world.stores[1].root / "entries" / fetched.part.store_digest)
        assert (await world.fetch("poet", refresh=True)).part == fetched.part
        world.stores[1].check()

        with pytest.raises(AdapterUnavailableError, match="poetess") as raised:
            await world.fetch("poetess")
        assert raised.value.reason is Reason.NOT_FOUND
