"""One tiny model of a family with two adapters, and what transformers and PEFT make of its rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.helpers.paged_runner import Fault, PagedRunner, check_logits, stock_logits
from tests.helpers.peft_adapters import peft_logits, peft_model
from tests.helpers.rank_models import read_parts
from tests.helpers.schedules import LENGTHS
from tests.helpers.thread_ranks import ThreadGroup, run_ranks
from tests.helpers.tiny_models import VOCAB_SIZE, make_tiny_model

from lorax_contract.config import ShardConfig
from lorax_shard.linear.backends import OneDnnBackend
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.rank_model import meet
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import read_adapter

ALL = "all-linear"
# For each tested family the modules of its first adapter, of rank 8, and of its second, of
# rank 4. Where PEFT's all-linear takes in experts or a router, the first names its linears.
_LLAMA = (ALL, ["q_proj", "v_proj", "down_proj"])
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LATENT = (
    ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    ["q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
)
TARGETS: dict[str, tuple[str | list[str], list[str]]] = {
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "glm4": (ALL, ["k_proj", "gate_up_proj"]),
    "gpt2": (ALL, ["c_attn", "c_fc"]),
    "gpt_bigcode": (ALL, ["c_attn", "c_fc"]),
    "gpt_neox": (ALL, ["query_key_value", "dense_4h_to_h"]),
    "gpt_oss": (ALL, ["q_proj", "o_proj"]),
    "granite": _LLAMA,
    "granitemoe": (_ATTENTION, ["q_proj", "o_proj"]),
    "llama": _LLAMA,
    "llama4_text": (
        r".*\.(self_attn|shared_expert)\.\w+_proj",
        ["q_proj", "v_proj", "shared_expert.down_proj"],
    ),
    "mistral": _LLAMA,
    "mixtral": (_ATTENTION, ["k_proj", "o_proj"]),
    "olmo2": _LLAMA,
    "olmoe": (_ATTENTION, ["q_proj", "v_proj"]),
    "opt": (ALL, ["q_proj", "out_proj", "fc2"]),
    "phi": (ALL, ["q_proj", "dense", "fc2"]),
    "phi3": (ALL, ["qkv_proj", "down_proj"]),
    "qwen2": _LLAMA,
    "qwen2_moe": (
        [*_ATTENTION, "shared_expert.gate_proj", "shared_expert.up_proj"],
        ["k_proj", "shared_expert.down_proj"],
    ),
    "qwen3": _LLAMA,
    "qwen3_moe": (_ATTENTION, ["q_proj", "v_proj"]),
    "smollm3": _LLAMA,
    "starcoder2": (ALL, ["v_proj", "c_fc"]),
}
# The slot of each row; None: the base model.
SLOTS = (0, 1, None, 0, 1, None)


class FamilyRows:
    """Loads a tiny model as the shard does, with adapters read from PEFT's own files.

    ``options`` are those of the adapters, by slot; as a rule there are two. ``slots`` are those
    of the rows.
    """

    def __init__(
        self,
        family: str,
        root: Path,
        *,
        elementwise: str = "auto",
        options: Sequence[Mapping[str, Any]] = (),
        slots: tuple[int | None, ...] = SLOTS,
        **overrides: Any,
    ) -> None:
        self._elementwise, self.slots = elementwise, slots
        self.path = make_tiny_model(family, root / "model", **overrides)
        draw, lengths = random.Random(3), itertools.islice(itertools.cycle(LENGTHS), len(slots))
        self.rows = [[draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in lengths]
        self.model = self._load()
        self.expected = stock_logits(self.path, self.rows)
        self.base = list(self.expected)
        self.adapters = [
            self._adapter(slot, root / f"adapter-{slot}", each)
            for slot, each in enumerate(options or _usual_options(family))
        ]

    def run(
        self,
        schedule: Any,
        fault: Fault = Fault.NONE,
        slots: tuple[int | None, ...] | None = None,
    ) -> float:
        """Compute the rows; raises LogitsDifferError when one is off.

        Returns the largest relative difference.
        """
        runner = _Runner(self.model, self.rows, slots or self.slots, fault)
        schedule(runner)
        return check_logits(runner, self.expected)

    def run_ranks(self, schedule: Any, world_size: int) -> float:
        """Compute the rows by ranks, as threads; as ``run`` otherwise."""
        parts = read_parts(self.config, world_size)

        def work(group: ThreadGroup) -> float:
            paged = parts[group.rank].paged
            assert paged.lora is not None
            for slot, adapter in enumerate(self.adapters):
                paged.lora.load(slot, adapter)
            meet(parts[group.rank], group)
            runner = _Runner(paged, self.rows, self.slots, Fault.NONE)
            schedule(runner)
            return check_logits(runner, self.expected)

        return max(run_ranks(world_size, work))

    def load_scaled(self, slot: int, of: int, factor: float) -> None:
        """Load an adapter once more, with another scaling."""
        modules = {
            name: dataclasses.replace(delta, scaling=delta.scaling * factor)
            for name, delta in self.adapters[of].modules.items()
        }
        assert self.model.lora is not None
        self.model.lora.load(slot, dataclasses.replace(self.adapters[of], modules=modules))

    def _load(self) -> HFPagedModel:
        cpu = torch.device("cpu")
        # Packed weights, whose siblings' outputs are columns of one tensor, where they can be.
        linears = "onednn" if OneDnnBackend.probe(cpu, torch.float32) is None else "auto"
        self.config = ShardConfig(
            model_dir=str(self.path),
            model_id="tiny",
            shard_uris=["unix:///unused"],
            linear_backend=linears,
            elementwise_backend=self._elementwise,
        )
        return load_paged_model(self.config)

    def _adapter(self, slot: int, folder: Path, options: Mapping[str, Any]) -> HostAdapter:
        tuned = self.tune(slot, folder, options)
        for row, wanted in enumerate(self.slots):
            if wanted == slot:
                self.expected[row] = peft_logits(tuned, [self.rows[row]])[0]
        assert self.model.base is not None
        assert self.model.lora is not None
        adapter = read_adapter(folder, self.model.base, AdapterLimits())
        self.model.lora.load(slot, adapter)
        return adapter

    def tune(self, slot: int, folder: Path, options: Mapping[str, Any]) -> Any:
        """Save an adapter to a folder; return the model that computes with it."""
        tuned = peft_model(self.path, seed=slot, **options)
        tuned.save_pretrained(folder)
        return tuned


def _usual_options(family: str) -> list[dict[str, Any]]:
    return [
        {"r": rank, "lora_alpha": rank + 3, "target_modules": modules}
        for modules, rank in zip(TARGETS[family], (8, 4), strict=True)
    ]


class _Runner(PagedRunner):
    """Computes each row with its own slot."""

    def __init__(
        self,
        model: HFPagedModel,
        rows: list[list[int]],
        slots: tuple[int | None, ...],
        fault: Fault,
    ) -> None:
        super().__init__(model, rows, num_blocks=11 * len(rows), fault=fault)
        self._slots_of = slots

    def slots(self, order: list[int]) -> list[int | None]:
        return [self._slots_of[row] for row in order]
