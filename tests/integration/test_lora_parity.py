"""Mixed batches of adapters and base rows through the paged model, against PEFT one by one.

Each family computes one batch whose rows use every option at once, so that options are
tested beside each other, not alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.paged_runner import RELATIVE_TOLERANCE, PagedRunner, stock_logits
from tests.helpers.peft_adapters import host_adapter, peft_logits, peft_model
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.lora import registry
from lorax_shard.lora.model import LoraModel, install
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

CPU = torch.device("cpu")

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Linears, some of them, embedding and head of each family.
FAMILIES = {
    "llama": (_LLAMA, ["q_proj", "down_proj"], "embed_tokens", "lm_head"),
    "qwen2": (_LLAMA, ["v_proj", "up_proj"], "embed_tokens", "lm_head"),
    "gemma2": (_LLAMA, ["k_proj", "gate_proj", "o_proj"], "embed_tokens", "lm_head"),
    "gpt2": (["c_attn", "c_proj", "c_fc"], ["c_attn"], "wte", "lm_head"),
    "mixtral": (_ATTENTION, ["q_proj", "o_proj"], "embed_tokens", "lm_head"),
}
TIED = {f"{family}-tied": FAMILIES[family] for family in ("llama", "gemma2", "gpt2")}


def options(family: str) -> dict[str, dict[str, Any]]:
    """Return one PEFT configuration for each thing that an adapter can do."""
    linears, some, embedding, head = {**FAMILIES, **TIED}[family]
    conv = {"fan_in_fan_out": family.startswith("gpt2")}
    plain = {"target_modules": linears, **conv}
    return {
        "plain": {**plain, "r": 8, "lora_alpha": 16},
        "few modules, odd rank": {"target_modules": some, "r": 3, "lora_alpha": 7, **conv},
        "rslora, patterns": {
            **plain,
            "r": 5,
            "use_rslora": True,
            "rank_pattern": {some[0]: 13},
            "alpha_pattern": {some[0]: 3},
        },
        "one layer": {**plain, "r": 64, "layers_to_transform": [1]},
        "dora": {**plain, "r": 4, "use_dora": True},
        "dora with bias": {**plain, "r": 2, "use_dora": True, "bias": "lora_only"},
        "bias": {**plain, "r": 2, "bias": "all"},
        "embedding and head": {"target_modules": [*some, embedding, head], "r": 4, **conv},
        "embedding and head, dora": {
            "target_modules": [embedding, head], "r": 6, "use_dora": True, **conv,
        },
        "modules to save": {**plain, "r": 2, "modules_to_save": [embedding, head]},
        "trainable tokens": {
            **plain, "r": 2, "trainable_token_indices": {embedding: [17, 3, VOCAB_SIZE - 1]},
        },
        "grown": {**plain, "r": 2, "grow": 9},
        "grown, embedding": {"target_modules": [*some, embedding], "r": 2, "grow": 2, **conv},
    }  # fmt: skip


class Mixed:
    """A tiny model, an adapter for each option, rows that use them, and what PEFT makes of them."""

    def __init__(self, name: str, path: Path) -> None:
        family, _, tied = name.partition("-")
        self.path = make_tiny_model(family, path, tie_word_embeddings=bool(tied))
        draw = random.Random(5)
        self.rows: list[list[int]] = []
        self.slots: list[int | None] = []
        self.expected: list[torch.Tensor] = []
        self.adapters = []
        # Replaced and added tokens are among the ids.
        for slot, (label, values) in enumerate(options(name).items()):
            grow = values.pop("grow", 0)
            model = peft_model(self.path, seed=slot, grow=grow, **values)
            self.adapters.append(host_adapter(model, grown=bool(grow)))
            ids = [*range(VOCAB_SIZE, VOCAB_SIZE + grow), 3, 17]
            for length in (23, 9) if label == "plain" else (19,):
                row = ids + [draw.randrange(VOCAB_SIZE) for _ in range(length)]
                draw.shuffle(row)
                self._add(row, slot, peft_logits(model, [row])[0])
        for length in (1, 30):
            row = [draw.randrange(VOCAB_SIZE) for _ in range(length)]
            self._add(row, None, stock_logits(self.path, [row])[0])
        order = list(range(len(self.rows)))
        draw.shuffle(order)
        self.rows = [self.rows[i] for i in order]
        self.slots = [self.slots[i] for i in order]
        self.expected = [self.expected[i] for i in order]

    def _add(self, row: list[int], slot: int | None, expected: torch.Tensor) -> None:
        self.rows.append(row)
        self.slots.append(slot)
        self.expected.append(expected)

    def load(self, linear: str = "auto") -> HFPagedModel:
        config = ShardConfig(
            model_dir=str(self.path),
            model_id="tiny",
            shard_uris=["unix:///unused"],
            linear_backend=linear,
        )
        return load_paged_model(config)

    def serve(self, backend: str, linear: str = "auto") -> tuple[HFPagedModel, LoraModel]:
        paged = self.load(linear)
        lora = install(paged._model, backend, CPU, torch.float32)
        for slot, adapter in enumerate(self.adapters):
            lora.load(slot, adapter)
        return paged, lora


class AdapterRunner(PagedRunner):
    """Runs each row with its slot."""

    def __init__(
        self, paged: HFPagedModel, lora: LoraModel, rows: list[list[int]], slots: list[int | None]
    ) -> None:
        super().__init__(paged, rows, num_blocks=160)
        self.lora, self.slot_of_row = lora, slots

    def step(self, counts: dict[int, int]) -> None:
        order = sorted(counts, key=lambda row: counts[row] > 1)
        lens, slots = [counts[row] for row in order], [self.slot_of_row[row] for row in order]
        with self.lora.step(lens, slots):
            super().step(counts)


def ragged(runner: PagedRunner) -> None:
    """All rows whole, in one forward pass."""
    runner.step({row: len(ids) for row, ids in enumerate(runner.rows)})


def chunked(runner: PagedRunner) -> None:
    """Rows arrive two a step; prompt chunks and single tokens share each step."""
    draw = random.Random(11)
    for step in range(200):
        arrived = [row for row in range(len(runner.rows)) if row <= 2 * step]
        left = {row: len(runner.rows[row]) - runner.done[row] for row in arrived}
        counts = {row: min(n, draw.choice([1, 1, 2, 7, 16])) for row, n in left.items() if n > 0}
        if counts:
            runner.step(counts)


def worst(runner: PagedRunner, expected: list[torch.Tensor]) -> float:
    """Return the largest difference of any row, relative to the largest of its logits."""
    found = 0.0
    for row, logits in enumerate(expected):
        assert sorted(runner.logits[row]) == list(range(len(logits)))
        got = torch.stack([runner.logits[row][at][: logits.shape[1]] for at in range(len(logits))])
        found = max(found, float((got - logits).abs().max() / logits.abs().max()))
        for at in range(len(logits)):
            beyond = runner.logits[row][at][logits.shape[1] :]
            assert torch.all(beyond == float("-inf")), f"row {row} sees tokens of others"
    return found


@pytest.fixture(scope="module", params=[*FAMILIES, *TIED])
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=["torch", "cpu", "cpp"])
def served(
    request: pytest.FixtureRequest, mixed: Mixed
) -> Iterator[tuple[HFPagedModel, LoraModel]]:
    if reason := registry.BACKENDS.probe(request.param, CPU, torch.float32):
        pytest.skip(f"{request.param}: {reason}")
    return mixed.serve(request.param)


@pytest.mark.parametrize("schedule", [ragged, chunked])
def test_mixed_rows_equal_peft(
    served: tuple[HFPagedModel, LoraModel], mixed: Mixed, schedule: Callable[[PagedRunner], None]
) -> None:
    runner = AdapterRunner(*served, mixed.rows, mixed.slots)
    schedule(runner)
    assert worst(runner, mixed.expected) <= RELATIVE_TOLERANCE


def test_each_option_shows(mixed: Mixed) -> None:
    for row, slot, expected in zip(mixed.rows, mixed.slots, mixed.expected, strict=True):
        if slot is None or max(row) >= VOCAB_SIZE:
            continue
        base = stock_logits(mixed.path, [row])[0]
        difference = (expected[:, : base.shape[1]] - base).abs().max() / base.abs().max()
        assert difference > 100 * RELATIVE_TOLERANCE, list(options("llama"))[slot]


def test_a_wrong_slot_is_found(served: tuple[HFPagedModel, LoraModel], mixed: Mixed) -> None:
    rows = [
        row
        for row, slot in enumerate(mixed.slots)
        if slot is None or not served[1]._slots[slot].num_logits
    ]
    for wrong in (rows[0], rows[-1]):
        slots = list(mixed.slots)
        slots[wrong] = 1 if slots[wrong] == 0 else 0
        runner = AdapterRunner(*served, mixed.rows, slots)
        ragged(runner)
        assert worst(runner, mixed.expected) > 100 * RELATIVE_TOLERANCE
