"""What the process that verifies adapters must be told: the base model, limits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import FORMAT


def make_context(
    base: BaseDescription, limits: AdapterLimits, model_id: str = ""
) -> dict[str, Any]:
    """Return what ``verify`` must be told, as JSON has it.

    ``model_id`` is what the base model is called; empty: it is not compared.
    """
    return {
        "base": base.to_json(),
        "limits": json.dumps(dataclasses.asdict(limits)),
        "model_id": model_id,
        # A verdict holds for the form that came with it.
        "format": str(FORMAT),
    }


def read_context(context: Mapping[str, Any]) -> tuple[BaseDescription, AdapterLimits, str]:
    """Return what ``make_context`` was given."""
    limits = AdapterLimits(**json.loads(context["limits"]))
    return BaseDescription.from_json(context["base"]), limits, context["model_id"]
