"""What the process that verifies adapters must be told: the base model, limits."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.digest import FORMAT
from lorax_shard.peft.files import AdapterLimits, sha256_of


def make_context(
    base: BaseDescription,
    limits: AdapterLimits,
    model_id: str = "",
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Return what ``verify`` must be told, as JSON has it.

    ``model_id`` is what the base model is called, ``tokenizer`` its tokenizer.json: what
    adapters say and bring is compared with them, if they are given.
    """
    told = {} if tokenizer is None else {"path": str(tokenizer), "sha256": sha256_of(tokenizer)}
    return {
        "tokenizer": json.dumps(told),
        "base": base.to_json(),
        "limits": json.dumps(dataclasses.asdict(limits)),
        "model_id": model_id,
        # A verdict holds for the form that came with it.
        "format": str(FORMAT),
    }


def read_context(context: Mapping[str, Any]) -> tuple[BaseDescription, AdapterLimits, str]:
    """Return what ``make_context`` was given."""
    limits = AdapterLimits(**json.loads(context["limits"]))
    return _base(context["base"]), limits, context["model_id"]


# A process verifies against one base: it is read once, and forks of the process have it.
@functools.lru_cache(maxsize=1)
def _base(text: str) -> BaseDescription:
    return BaseDescription.from_json(text)


def base_tokenizer(context: Mapping[str, Any]) -> Path | None:
    """Return where the base's tokenizer.json is, if that was told."""
    path = json.loads(context["tokenizer"]).get("path")
    return None if path is None else Path(path)
