"""An adapter that becomes part of the weights: PEFT's own merge, before anything is plugged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lorax_contract.errors import LoraxError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.adapters.host_base import describe
from lorax_shard.adapters.peft_files import Limits
from lorax_shard.adapters.peft_format import examine

logger = logging.getLogger(__name__)


def merge_adapter(model: Any, folder: Path) -> None:
    """Merge the adapter of a folder into the model's weights, in place; StartupError in words.

    The folder is checked as for serving first: PEFT itself loads much without a word that it
    then does not compute. An adapter that adds tokens is refused, as the model's tokenizer
    and vocabulary would have to grow with it.
    """
    try:
        adapter = examine(folder, describe(model), Limits()).adapter
    except LoraxError as error:
        raise _unusable(error.public) from error
    if adapter.vocab_size:
        raise _unusable("it adds tokens; serve it with --adapter-id alone, or merge it offline")
    from peft import PeftModel

    try:
        wrapped = PeftModel.from_pretrained(model, folder)
        wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, AttributeError) as error:
        raise _unusable(f"PEFT cannot merge it: {error}") from error
    model.requires_grad_(False)
    logger.info("the adapter in %s is part of the weights now", folder)


def _unusable(reason: str) -> StartupError:
    return StartupError(
        f"--merge-adapter-weights: the adapter cannot be merged: {reason}",
        ExitCode.ADAPTER_UNUSABLE,
    )
