"""Reads a model's weights by transformers, and says in words what is wrong with them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model import attention_hook
from lorax_shard.model.weights import check_weights, refuse_corrupt, weight_files

logger = logging.getLogger(__name__)


def load_weights(
    folder: Path, hf_config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Any:
    """Return the transformers model, attention plugged, every weight of it read from the folder's safetensors."""
    check_weights(weight_files(folder), dtype, device)
    attention_hook.register()
    with reading(folder, device):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=hf_config,
            dtype=dtype,
            attn_implementation=attention_hook.ATTENTION_NAME,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # Reported like missing ones, and refused with their names below.
            ignore_mismatched_sizes=True,
        )
        model = model.to(device).eval().requires_grad_(False)
    refuse_missing(folder, report)
    return model


@contextmanager
def reading(folder: Path, device: torch.device) -> Iterator[None]:
    """Turn what goes wrong while transformers reads weights into a StartupError."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise StartupError(
            f"{folder} does not fit in the memory of the {device.type}: {error}",
            ExitCode.OUT_OF_MEMORY,
        ) from error
    except SafetensorError as error:
        refuse_corrupt(folder, error)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, ImportError) as error:
        raise StartupError(
            f"transformers {transformers.__version__} cannot load {folder}: {error}",
            ExitCode.MODEL_UNSUPPORTED,
        ) from error


def refuse_missing(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse weights that are not in the files: transformers would fill them at random."""
    mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    wrong = sorted({*report["missing_keys"], *mismatched})
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise StartupError(
            f"{folder} lacks weights that its config asks for, or has them in another shape: {', '.join(wrong[:3])}{more}; "
            "fetch the model again",
            ExitCode.MODEL_CORRUPT,
        )
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning(
            "%d tensors of the model folder belong to no layer and are left out: %s",
            len(unexpected),
            ", ".join(unexpected[:3]),
        )
