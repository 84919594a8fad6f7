"""Tiny models that are served quantized, and copies of them that hold the dequantized weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.helpers.family_rows import FamilyRows
from transformers import AutoModelForCausalLM

from lorax_contract.config import Quantize, ShardConfig
from lorax_shard.linear.quantized.formats import (
    QuantizedWeight,
    to_bfloat16,
    to_fp8,
    to_int4,
    to_int8,
)
from lorax_shard.linear.quantized.install import quantize_each
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.loader import load_paged_model

_MAKERS: dict[Quantize, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int8": to_int8,
    "bfloat16": to_bfloat16,
    "fp8": to_fp8,
    "int4": to_int4,
}


def dequantized_copy(folder: Path, name: Quantize = "int8") -> Path:
    """Return a folder that holds the weights that quantizing makes of a model's."""
    target = Path(shutil.copytree(folder, folder.with_name("dequantized")))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    make = _MAKERS[name]
    keeps_head = name in ("fp8", "int4")
    quantize_each(
        model,
        lambda target: None if keeps_head and target.path == "lm_head" else make(target.weight),
    )
    model.save_pretrained(target)
    return target


def load(folder: Path, **values: Any) -> HFPagedModel:
    """Load a model as a shard of one rank does."""
    return load_paged_model(
        ShardConfig(model_dir=str(folder), model_id="tiny", shard_uris=["unix:///none"], **values)
    )


class QuantizedRows(FamilyRows):
    """Serves a model quantized; what it is compared with has the dequantized weights."""

    quantize: Quantize = "int8"

    def _load(self) -> HFPagedModel:
        original, self.path = self.path, dequantized_copy(self.path, self.quantize)
        self.config = ShardConfig(
            model_dir=str(original),
            model_id="tiny",
            shard_uris=["unix:///none"],
            quantize=self.quantize,
        )
        return load_paged_model(self.config)


class NarrowRows(QuantizedRows):
    """As ``QuantizedRows``, with weights in bfloat16."""

    quantize: Quantize = "bfloat16"
