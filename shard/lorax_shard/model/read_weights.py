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
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.model import attention_hook, relative_positions
from lorax_shard.model.damage import refuse_corrupt
from lorax_shard.model.families import generates, is_encoder
from lorax_shard.model.heads import kind_of, stock_class
from lorax_shard.model.stored import CodedWeights, find_codes, open_weights
from lorax_shard.model.weights import check_weights, weight_files
from lorax_shard.parallel.slices import RankSlice

logger = logging.getLogger(__name__)


def load_weights(
    folder: Path, hf_config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Any:
    """Return the transformers model, attention plugged, every weight of it read from the folder's safetensors."""
    files = weight_files(folder)
    coded = find_codes(folder)
    check_weights(files, dtype, device, coded=coded)
    attention_hook.register()
    with reading(folder, device):
        options = {
            "config": hf_config,
            "dtype": dtype,
            "attn_implementation": attention_hook.ATTENTION_NAME,
            "output_loading_info": True,
            # Reported like missing ones, and refused with their names below.
            "ignore_mismatched_sizes": True,
        }
        if coded.tensors:
            model, report = _decode(folder, hf_config, coded, options)
        else:
            stock: Any = transformers.AutoModelForCausalLM
            if not generates(hf_config):
                kind = kind_of(hf_config)
                stock = transformers.AutoModel if kind is None else stock_class(kind, hf_config)
            model, report = stock.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                **options,
            )
        model = model.to(device).eval().requires_grad_(False)
        relative_positions.plug(model)
    if is_encoder(hf_config):
        leave_out_pooler(model, report)
    refuse_missing(folder, report)
    return model


def leave_out_pooler(model: Any, report: Mapping[str, Any]) -> None:
    """Leave out what an encoder has for heads, where its checkpoint was saved without it."""
    missing = {key for key in report["missing_keys"] if key.split(".")[0] == "pooler"}
    # One that a class with a head has of its own is no part of that.
    if missing and model is model.base_model and hasattr(model, "pooler"):
        model.pooler = None
        report["missing_keys"].difference_update(missing)


def _decode(
    folder: Path, hf_config: Any, coded: CodedWeights, options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Let transformers load weights that are decoded when it asks for them."""
    classes: Any = MODEL_FOR_CAUSAL_LM_MAPPING if generates(hf_config) else MODEL_MAPPING
    if type(hf_config) not in classes:
        raise StartupError(
            f"{folder} cannot be served: it is quantized and brings code of its own, and codes are "
            "decoded for models of transformers' own code only; serve the model that it was made from",
            ExitCode.MODEL_UNSUPPORTED,
        )
    files = open_weights(folder, coded)
    state = {key: RankSlice(file, key) for key, file in files.items()}
    model, report = classes[type(hf_config)].from_pretrained(None, state_dict=state, **options)
    add_generation_config(model, folder)
    return model, report


def add_generation_config(model: Any, folder: Path) -> None:
    """Give a model that was not loaded from its folder by name the folder's generation config."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


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
