"""An adapter that becomes part of the weights: PEFT's own merge, before anything is plugged."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from lorax_contract.errors import LoraxError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.adapter_files import WEIGHTS_FILE
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.model.describe import describe
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.errors import listing
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.read import examine

logger = logging.getLogger(__name__)

# Linears of experts as other releases and trainers have them.
_EXPERT = re.compile(r"\.experts\.(\d+|w[123]|gate_proj|up_proj|down_proj)\.")
# Where PEFT's wrappers of a module hold the module itself.
_INNER = ("base_layer", "original_module")


def merge_adapter(model: Any, folder: Path) -> None:
    """Merge the adapter of a folder into the model's weights, in place; StartupError in words.

    The folder is checked as for serving first: PEFT itself loads much without a word that it
    then does not compute. An adapter that adds tokens is refused, as the model's tokenizer
    and vocabulary would have to grow with it.
    """
    base = describe(model)
    try:
        adapter = examine(folder, base, AdapterLimits()).adapter
    except LoraxError as error:
        raise _unusable(error.public) from error
    except OSError as error:
        raise _unusable(f"its files cannot be read ({error.strerror}); start again") from error
    if not (folder / WEIGHTS_FILE).is_file():
        raise _unusable("mlx-lm saved it, and PEFT merges its own only; serve it with --adapter-id")
    if adapter.vocab_size:
        raise _unusable("it adds tokens; serve it with --adapter-id alone, or merge it offline")
    if adapter.invocation_ids:
        raise _unusable(
            "it acts on a part of a prompt only (alora_invocation_tokens), and merged weights act "
            "on all of it; serve it with --adapter-id"
        )
    if names_experts(folder / WEIGHTS_FILE):
        raise _unusable(
            "it has weights for linears of each expert, as older releases of transformers had "
            "them, and PEFT converts a part of those only; serve it with --adapter-id"
        )
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # PEFT warns of tied weights, which are seen to here.
            warnings.simplefilter("ignore")
            wrapped = PeftModel.from_pretrained(model, folder, torch_device=str(model.device))
            if left_out := _left_out(wrapped, adapter):
                raise _unusable(
                    f"PEFT leaves out what it has for {listing(left_out)}; serve it with --adapter-id"
                )
            if _changes_tied_weight(adapter, base):
                _untie(model)
            wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, AttributeError) as error:
        raise _unusable(f"PEFT cannot merge it: {error}") from error
    model.requires_grad_(False)
    logger.info("the adapter in %s is part of the weights now", folder)


def names_experts(path: Path) -> bool:
    """Return whether a file has weights for linears of experts."""
    with safe_open(path, framework="pt") as file:
        return any(_EXPERT.search(key) for key in file.keys())  # noqa: SIM118


def _left_out(wrapped: Any, adapter: HostAdapter) -> list[str]:
    """Return the modules with a low-rank part in the adapter that have none in PEFT's model."""
    found = {
        name.replace(".base_layer", "")
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    # Parameters of experts have the name of their module before their own.
    return [
        name
        for name, delta in adapter.modules.items()
        if delta.a is not None and found.isdisjoint((name, name.rpartition(".")[0]))
    ]


def _changes_tied_weight(adapter: HostAdapter, base: BaseDescription) -> bool:
    tied = {name for group in base.tied for name in group}
    return not tied.isdisjoint(adapter.modules)


def _untie(model: Any) -> None:
    """Give the head a weight of its own: a change of the one is none of the other.

    Comes after PEFT's wrapping, which applies some changes to both where they are tied.
    """
    head, embedding = (
        _innermost(module)
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _innermost(module: Any) -> Any:
    for name in _INNER:
        inner = getattr(module, name, None)
        if isinstance(inner, nn.Module):
            return _innermost(inner)
    return module


def _unusable(reason: str) -> StartupError:
    return StartupError(
        f"--merge-adapter-weights: the adapter cannot be merged: {reason}",
        ExitCode.ADAPTER_UNUSABLE,
    )
