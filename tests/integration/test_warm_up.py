"""Warming up real models: the largest step, with adapters of the largest rank, on one rank or two."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.rank_models import read_parts
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import make_tiny_model
from tokenizers import Tokenizer

from lorax_contract.config import ShardConfig
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import MemoryPlan, PoolSettings
from lorax_shard.lora.model import LoraModel
from lorax_shard.model.rank_model import meet

SPEC = WarmupSpec(
    max_input_length=63, max_total_tokens=64, max_step_tokens=24, max_rows=6, max_blocks=20
)
POOL = PoolSettings(
    block_size=16, memory_fraction=0.5, adapter_fraction=0.1, max_adapter_rank=40,
    ranks_on_device=2,
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_ranks_warm_up_with_dummy_adapters(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(family, tmp_path)
    config = ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:x"])
    parts = read_parts(config, 2)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loads: list[int] = []
    load = LoraModel.load

    def noting(model: LoraModel, slot: int, adapter: object) -> None:
        loads.append(adapter.max_rank)  # type: ignore[attr-defined]
        load(model, slot, adapter)  # type: ignore[arg-type]

    monkeypatch.setattr(LoraModel, "load", noting)

    def work(group: ThreadGroup) -> MemoryPlan:
        part = parts[group.rank]
        meet(part, group)
        engine = Engine(part.paged, tokenizer, POOL, group=group)
        assert engine.warm_up(SPEC) == 20
        assert part.paged.lora is not None
        assert not part.paged.lora.slots
        return engine.memory

    for plan in run_ranks(2, work):
        items = dict(plan.items)
        assert items["kv_cache"] == 20 * plan.block_bytes
        assert items["weights"] > 0
        assert items["adapters"] == plan.adapter_bytes > 0
    assert loads == [40] * 4
