"""Loads a model from a local folder and plugs paged attention and fast linears in."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from lorax_contract.config import ShardConfig, Task
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.start_clock import StartClock
from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend
from lorax_shard.attention.ragged import encoder_attention
from lorax_shard.codes.methods import refuse_quantized
from lorax_shard.linear.quantized.device import rows_unrounded
from lorax_shard.lora import model as lora
from lorax_shard.mixture.install import install as install_mixture
from lorax_shard.model import elementwise
from lorax_shard.model.damage import refuse_corrupt
from lorax_shard.model.dense import check_dense
from lorax_shard.model.describe import describe, describe_heads
from lorax_shard.model.encoder import paged_class
from lorax_shard.model.families import (
    ENCODER_FAMILIES,
    TESTED_FAMILIES,
    generates,
    is_causal,
    is_encoder,
    is_served,
    refusal,
)
from lorax_shard.model.heads import StockScores, kind_of, make_heads
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.limits import position_limit
from lorax_shard.model.merged import merge_adapter
from lorax_shard.model.probe import ModelProbe, survey_attention
from lorax_shard.model.quantized import install_linears, quantize_model, store_narrowly
from lorax_shard.model.rank_model import load_part
from lorax_shard.model.read_weights import load_weights
from lorax_shard.model.served_task import serve_as
from lorax_shard.model.vector_facts import longest_text, read_vector_facts
from lorax_shard.parallel.group import RankGroup
from lorax_shard.threads import one_thread

logger = logging.getLogger(__name__)

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_CONFIG_ERRORS = (StrictDataclassError, ValueError, KeyError, TypeError, OSError, AttributeError)


def load_paged_model(
    config: ShardConfig, group: RankGroup | None = None, clock: StartClock | None = None
) -> HFPagedModel:
    """Load, plug and probe the model of ``config``; every failure is a StartupError in words.

    With a ``group`` it is the rank's part of it, which computes together with the others. The
    ``clock`` is told what takes how long.
    """
    clock = clock or StartClock()
    started = time.perf_counter()
    folder, device = Path(config.model_dir), torch.device(config.device)
    hf_config = read_config(folder, trust_remote_code=config.trust_remote_code, task=config.task)
    config = store_narrowly(config)
    dtype = resolve_dtype(config.dtype, hf_config, device)
    if is_encoder(hf_config):
        _refuse_backends(config)
    elif config.attention_backend != "auto":
        # A backend that cannot run at all is refused before anything is read.
        registry.create(config.attention_backend, device, dtype)
    if group is None:
        paged = _load_whole(config, hf_config, dtype, device, clock)
    else:
        paged = load_part(config, hf_config, dtype, device, group)
        clock.ended("weights, probe")
    if paged.is_encoder and (longest := longest_text(folder)):
        paged.max_positions = min(longest, paged.max_positions or longest)
    _log_loaded(paged, config.model_id, time.perf_counter() - started)
    if reason := position_limit(hf_config.get_text_config()).reason:
        logger.warning(reason)
    return paged


def _load_whole(
    config: ShardConfig,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    clock: StartClock,
) -> HFPagedModel:
    folder, encoder = Path(config.model_dir), is_encoder(hf_config)
    model = load_weights(folder, hf_config, dtype, device, config.trust_remote_code)
    if config.merge_adapter_dir is not None:
        merge_adapter(model, Path(config.merge_adapter_dir))
    has_tokens = generates(hf_config)
    own = model if not has_tokens and kind_of(hf_config) is not None else None
    stock = None if own is None or config.was_probed else StockScores.of(own)
    if own is not None:
        model = own.base_model
    # Of the stock model: packed linears have no weights to describe.
    base = describe(model) if config.adapters else None
    quantized = quantize_model(model, config)
    clock.ended("weights")
    with one_thread():
        survey = survey_attention(model, encoder=encoder)
        layers = survey.layers(config.block_size)
        if encoder:
            backend: AttentionBackend = encoder_attention(device, dtype)
        else:
            backend = registry.create(config.attention_backend, device, dtype, layers)
        probe = ModelProbe(model, survey, backend, config.block_size, generates=has_tokens)
        if not config.was_probed:
            probe.record_stock()
    clock.ended("probe: transformers' own")
    paged = paged_class(hf_config)(model, survey, backend)
    install_linears(paged, model, config, quantized)
    install_mixture(model, device, dtype)
    clock.ended("linears packed")
    with one_thread():
        exchanged = elementwise.install(
            model, config.elementwise_backend, device, dtype, is_encoder=encoder
        )
    if own is not None or base is not None:
        paged.heads = make_heads(model, own)
    if stock is not None:
        stock.check(paged.heads, hf_config)
    if base is not None:
        paged.base = replace(base, is_backbone=not has_tokens, heads=describe_heads(paged.heads))
        outputs = [head.output_name for head in paged.heads.values()]
        paged.lora = lora.install(model, config.lora_backend, device, dtype, outputs=outputs)
        paged.lora_backend = paged.lora.backend
    clock.ended("elementwise work, adapters' places")
    # What fp8 makes of rows would hide what is looked for; its products were tried by themselves.
    with one_thread(), rows_unrounded():
        if not config.was_probed:
            probe.check(paged, exchanged)
    clock.ended("probe: as served")
    paged.elementwise_backend = exchanged.backend
    return paged


def _refuse_backends(config: ShardConfig) -> None:
    """Refuse to take another backend for an encoder than was named."""
    named = {"--attention-backend": config.attention_backend}
    if config.elementwise_backend not in ("cpp", "torch"):
        named["--elementwise-backend"] = config.elementwise_backend
    for option, name in named.items():
        if name != "auto":
            raise StartupError(
                f"{option} {name} computes decoders, and this model is an encoder; leave the option out",
                ExitCode.BACKEND_UNAVAILABLE,
            )


def read_config(folder: Path, *, trust_remote_code: bool, task: Task = "auto") -> Any:
    """Return the transformers config of a folder after checking that its model can be served.

    Raises StartupError: MODEL_NOT_FOUND, MODEL_CORRUPT or MODEL_UNSUPPORTED.
    """
    document = _config_document(folder)
    model_type = str(document.get("model_type"))
    remote = trust_remote_code and "auto_map" in document
    if not remote and model_type not in CONFIG_MAPPING:
        hint = "; it brings code of its own, see --trust-remote-code" * ("auto_map" in document)
        raise _unsupported(
            folder, f"its model type {model_type!r} is unknown to transformers{hint}"
        )
    architectures = document.get("architectures") or []
    encodes = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal(architectures)
    if not remote and not encodes and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise _unsupported(
            folder,
            f"{model_type!r} has neither a causal language model nor an encoder in transformers",
        )
    if architectures and not (encodes or is_served(model_type, architectures[0])):
        raise _unsupported(
            folder,
            f"{architectures[0]} is neither a causal language model nor an encoder, nor one of "
            "these with a classification head",
        )
    if quantized := refuse_quantized(folder, document):
        raise _unsupported(folder, quantized)
    try:
        hf_config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except _CONFIG_ERRORS as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise _unsupported(folder, f"transformers cannot read its config.json: {reason}") from error
    serve_as(hf_config, task, folder, is_remote=remote)
    if not remote and (unfit := refusal(hf_config)):
        raise _unsupported(folder, unfit)
    # What cannot be made of its vectors is refused before they are asked for.
    read_vector_facts(folder, is_encoder=is_encoder(hf_config))
    check_dense(folder, getattr(hf_config.get_text_config(), "hidden_size", 0))
    for each in (hf_config, hf_config.get_text_config()):
        # Codes are decoded here: transformers shall see weights like any others.
        vars(each).pop("quantization_config", None)
    return hf_config


def resolve_dtype(name: str, hf_config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; ``auto`` is float32 on a CPU, else the model's own."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        own = hf_config.get_text_config().dtype
        return own if own in _DTYPES.values() else torch.bfloat16
    if name not in _DTYPES:
        raise StartupError(
            f"dtype {name!r} is not known; choose auto, {', '.join(_DTYPES)}", ExitCode.USAGE
        )
    dtype: torch.dtype = _DTYPES[name]
    return dtype


def _config_document(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise StartupError(f"the model folder {folder} does not exist", ExitCode.MODEL_NOT_FOUND)
    if not path.is_file():
        raise StartupError(
            f"{folder} is no model folder: it has no config.json", ExitCode.MODEL_NOT_FOUND
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        refuse_corrupt(path, error)
    if not isinstance(document, dict):
        raise StartupError(f"{path} must hold one JSON object", ExitCode.MODEL_CORRUPT)
    return document


def _unsupported(folder: Path, reason: str) -> StartupError:
    return StartupError(f"{folder} cannot be served: {reason}", ExitCode.MODEL_UNSUPPORTED)


def _log_loaded(model: HFPagedModel, model_id: str, seconds: float) -> None:
    logger.info(
        "loaded %s (%s, %s): %.2f GB of weights, attention %s, linears %s, "
        "elementwise work %s, in %.1f s",
        model_id,
        model.model_type,
        str(model.dtype).removeprefix("torch."),
        model.weight_bytes / 1e9,
        model.attention_backend,
        model.linear_backend,
        model.elementwise_backend,
        seconds,
    )
    if model.model_type not in TESTED_FAMILIES | ENCODER_FAMILIES:
        logger.warning(
            "%s is not on the list of tested families; it is served because its load-time probe "
            "found the logits that transformers computes",
            model.model_type,
        )
