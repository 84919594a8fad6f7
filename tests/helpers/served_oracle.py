"""Every option of PEFT at once: folders that PEFT saved, read, prepared and activated as the
shard does it, and rows whose logits PEFT alone has computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, stock_logits
from tests.helpers.peft_cases import CASES, EXTRA, FAMILIES, GROWN, GROWTH, TIED_CASES
from tests.helpers.peft_folders import load_adapter, logits_of, save_adapter
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_contract.adapters import AdapterContent
from lorax_contract.config import ShardConfig
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.engine.active_adapters import ActiveAdapters
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.store.store import AdapterStore

_BASE_ROWS = 3


class Row(NamedTuple):
    """A row of the batch and what PEFT makes of it."""

    label: str
    ids: list[int]
    handle: AdapterHandle | None
    expected: torch.Tensor


def cases_of(family: str, tied: bool) -> dict[str, tuple[dict[str, Any], int | None]]:
    """Return LoraConfig options by label, and to how many rows the vocabulary grows."""
    names = FAMILIES[family]
    chosen = TIED_CASES if tied else [*CASES]
    found = {label: (CASES[label](names), None) for label in chosen}
    found |= {label: (make(names), GROWN) for label, make in GROWTH.items()}
    if not tied:
        found |= {label: (make(names), None) for each, label, make in EXTRA if each == family}
    return found


class Oracle:
    """A tiny model and an adapter for each option, as files, and what PEFT makes of rows."""

    def __init__(self, family: str, tied: bool, root: Path) -> None:
        self.path = make_tiny_model(family, root / "model", tie_word_embeddings=tied)
        self.config = ShardConfig(
            model_dir=str(self.path),
            model_id="tiny",
            shard_uris=["unix:///unused"],
            adapters=True,
            adapter_store_dir=str(root / "store"),
        )
        self.folders: dict[AdapterHandle, Path] = {}
        self.rows: list[Row] = []
        draw = random.Random(17)
        for number, (label, (options, vocab)) in enumerate(cases_of(family, tied).items()):
            folder = save_adapter(
                self.path, root / f"saved-{number}", seed=number, rows=vocab, **options
            )
            handle = AdapterHandle(number + 1)
            self.folders[handle] = folder
            own = [VOCAB_SIZE, GROWN - 1] if vocab else []
            ids = _ids(draw, [40, 3, 7, 5, *own], 14)
            expected = logits_of(load_adapter(self.path, folder, rows=vocab), ids)
            self.rows.append(Row(label, ids, handle, expected))
        for length in range(1, 1 + _BASE_ROWS):
            ids = _ids(draw, [40, 3], 9 * length)
            self.rows.append(Row("base", ids, None, stock_logits(self.path, [ids])[0]))
        draw.shuffle(self.rows)


def _ids(draw: random.Random, wanted: list[int], more: int) -> list[int]:
    ids = wanted + [draw.randrange(VOCAB_SIZE) for _ in range(more)]
    draw.shuffle(ids)
    return ids


class Served:
    """A model in a shard's parts, with the adapters of an oracle in its slots."""

    def __init__(self, oracle: Oracle, paged: HFPagedModel) -> None:
        self.paged, self.rows = paged, oracle.rows
        assert paged.base is not None
        assert paged.lora is not None
        self._store = AdapterStore(Path(oracle.config.adapter_store_dir), max_bytes=1 << 30)
        self.lane = PrepareLane(
            HostCache(self._store, host_bytes=1 << 30), paged.lora, dtype=torch.float32
        )
        self.active = ActiveAdapters(
            self.lane, paged.lora, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({0})
        )
        for handle, folder in oracle.folders.items():
            self.prepare(folder, handle)
            self.active.activate(handle)

    def prepare(self, folder: Path, handle: AdapterHandle) -> None:
        """Bring a folder through the store to the lane."""
        assert self.paged.base is not None
        part = put_adapter(self._store, folder, self.paged.base)
        self.lane.prepare(handle, AdapterContent(parts=(part,)))

    def slot(self, row: Row) -> int | None:
        """Return the slot that a row computes in."""
        return None if row.handle is None else self.active[row.handle].slot


class Runner(PagedRunner):
    """Runs each row with its slot, by the call that the engine makes."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.paged, [row.ids for row in served.rows], num_blocks=1200)
        self._slots_of = [served.slot(row) for row in served.rows]

    def slots(self, order: list[int]) -> list[int | None]:
        return [self._slots_of[row] for row in order]


def whole(runner: PagedRunner) -> None:
    """All rows in one forward pass."""
    runner.step({row: len(ids) for row, ids in enumerate(runner.rows)})


def chunked(runner: PagedRunner) -> None:
    """Rows arrive four a step; prompt chunks and single tokens share each step."""
    draw = random.Random(11)
    for step in range(300):
        arrived = range(min(len(runner.rows), 4 * step))
        left = {row: len(runner.rows[row]) - runner.done[row] for row in arrived}
        counts = {row: min(n, draw.choice([1, 1, 2, 7])) for row, n in left.items() if n > 0}
        if counts:
            runner.step(counts)


def compare(rows: list[Row], runner: PagedRunner) -> float:
    """Fail unless all logits of the runner are PEFT's; return the largest difference."""
    worst: dict[str, float] = {}
    wrong: dict[str, float] = {}
    for row, got in zip(rows, runner.logits, strict=True):
        assert sorted(got) == list(range(len(row.ids)))
        width = row.expected.shape[1]
        logits = torch.stack([got[at][:width] for at in range(len(row.ids))])
        assert all(torch.all(each[width:] == float("-inf")) for each in got.values())
        difference = float((logits - row.expected).abs().max())
        worst[row.label] = difference
        # Written so that a NaN is wrong too.
        if not difference <= RELATIVE_TOLERANCE * float(row.expected.abs().max()):
            wrong[row.label] = difference
    assert not wrong
    return max(worst.values())
