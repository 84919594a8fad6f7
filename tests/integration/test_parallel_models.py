"""Sharded models compute what the whole model computes, and read their own part only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tests.helpers.family_rows import FamilyRows
from tests.helpers.paged_runner import PagedRunner, check_logits
from tests.helpers.rank_models import read_parts
from tests.helpers.schedules import ragged
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.model.rank_model import meet
from lorax_shard.parallel.load import LoadedRank, load_rank
from lorax_shard.parallel.local import connect
from lorax_shard.parallel.partition import CannotSplitError
from lorax_shard.parallel.slices import RankSlice, open_files

FAMILIES = ("llama", "gemma2", "gpt2", "mixtral")
TOLERANCE = 1e-4
IDS = torch.tensor([[5, 40, 3, 81, 7, 7, 120, 64, 9, 3, 2]])


def load(folder: Path, rank: int, world_size: int) -> LoadedRank:
    config = transformers.AutoConfig.from_pretrained(folder)
    return load_rank(
        open_files(folder),
        config,
        rank=rank,
        world_size=world_size,
        dtype=torch.float32,
        attention="eager",
    )


def logits(folder: Path, world_size: int) -> list[torch.Tensor]:
    # Building models is not safe in threads; computing is.
    loaded = [load(folder, rank, world_size) for rank in range(world_size)]
    for each in loaded:
        assert not any(each.report.values())

    def work(group: ThreadGroup) -> torch.Tensor:
        part = loaded[group.rank]
        connect(part.model, part.plan, group)
        with torch.inference_mode():
            return part.model(IDS, use_cache=False).logits

    return run_ranks(world_size, work)


# More families, with adapters, are in test_families.
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_ranks_gives_the_logits_of_one(
    family: str, tied: bool, tmp_path: Path
) -> None:
    folder = make_tiny_model(family, tmp_path, tie_word_embeddings=tied)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.inference_mode():
        expected = stock.eval()(IDS, use_cache=False).logits
    for world_size in (2, 3, 4):
        for got in logits(folder, world_size):
            difference = (got - expected).abs().max()
            assert difference <= TOLERANCE * expected.abs().max()


def test_a_rank_reads_no_more_than_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model("llama", tmp_path)
    read: dict[str, int] = {}
    plain = RankSlice.__getitem__

    def counted(self: RankSlice, index: object) -> torch.Tensor:
        tensor = plain(self, index)
        read[self._key] = read.get(self._key, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(RankSlice, "__getitem__", counted)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    sizes = {name: tensor.numel() for name, tensor in whole.state_dict().items()}
    load(folder, 0, 2)
    split = [name for name in sizes if "proj" in name or "embed" in name or "lm_head" in name]
    assert split
    for name in split:
        assert read[name] < 0.7 * sizes[name], name


def test_more_ranks_than_heads_are_refused_in_words(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    with pytest.raises(CannotSplitError, match="cannot be spread over 7 ranks"):
        load(folder, 0, 7)


def test_an_adapter_replaces_norms_over_all_heads(tmp_path: Path) -> None:
    folder = make_tiny_model("olmo2", tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    config = ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///unused"])
    parts = read_parts(config, 4)
    modules = {}
    for name in ("model.layers.0.self_attn.q_norm", "model.layers.1.self_attn.k_norm"):
        norm = stock.get_submodule(name)
        values = torch.linspace(-1.0, 2.0, len(norm.weight))
        norm.weight.data.copy_(values)
        modules[name] = ModuleDelta(weight=values)
    adapter = HostAdapter(digest="norms", modules=modules)
    rows = [IDS[0].tolist(), IDS[0].tolist()[:5]]
    with torch.inference_mode():
        expected = [stock.eval()(torch.tensor([row]), use_cache=False).logits[0] for row in rows]

    def work(group: ThreadGroup) -> None:
        paged = parts[group.rank].paged
        assert paged.lora is not None
        paged.lora.load(0, adapter)
        meet(parts[group.rank], group)
        runner = SlottedRunner(paged, rows, num_blocks=16)
        runner.step({0: 4, 1: 3})
        runner.step({0: 7, 1: 2})
        check_logits(runner, expected)

    run_ranks(4, work)


def test_adapters_need_no_collective_of_their_own(tmp_path: Path) -> None:
    rows = FamilyRows("llama", tmp_path)
    parts = read_parts(rows.config, 2)

    def work(group: ThreadGroup) -> list[int]:
        paged = parts[group.rank].paged
        assert paged.lora is not None
        paged.lora.load(0, rows.adapters[0])
        meet(parts[group.rank], group)
        counts = []
        for runner_of in (PagedRunner, SlottedRunner):
            runner = runner_of(paged, rows.rows, num_blocks=64)
            before = group.num_collectives
            ragged(runner)
            counts.append(group.num_collectives - before)
        return counts

    layers = 2
    for base, adapted in run_ranks(2, work):
        # Two sums a layer, one for the embedding, and the logits put together.
        assert base == adapted == 2 * layers + 2


class SlottedRunner(PagedRunner):
    """Computes all rows with the adapter in slot 0."""

    def slots(self, order: list[int]) -> list[int | None]:
        return [0 for _ in order]
