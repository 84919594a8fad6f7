"""The load of ``serving`` by transformers' continuous batching, without adapters: it mixes none.

A stage of its own: somebody else's program may fail, and hang, alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.loads import (
    FULL,
    SMALL,
    LoadResult,
    RequestLoad,
    ServingSizes,
    add,
    begin,
    read_tokenizer,
    write_model,
)
from bench.gpu_check.models import device_of
from bench.gpu_check.report import SKIPPED, Report

# Needs nothing that is not there; with masks for it, graphs and overlapped batches are off.
_ATTENTION = "sdpa"


def run(report: Report, *, small: bool) -> None:
    """Serve the requests; what transformers cannot do here skips the stage in its words."""
    sizes, device = SMALL if small else FULL, device_of(small)
    load = sizes.load
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder) / "model", sizes, device)
        begin(report)
        report.note(f"transformers attends by {_ATTENTION} here, which takes masks: its CUDA graphs "
                    "and its overlapping of batches are off with it")  # fmt: skip
        try:
            result = generate(model_dir, load, sizes, device)
        except Exception as error:  # noqa: BLE001 - no fault of ours, whatever it is
            report.end(SKIPPED, f"{type(error).__name__}: {error}")
            return
    if result.num_tokens != load.num_requests * load.output_tokens:
        report.note(f"it made {result.num_tokens} tokens; the rate counts those")
    add(report, "transformers, continuous batching", load, result)


def generate(
    model_dir: Path, load: RequestLoad, sizes: ServingSizes, device: torch.device
) -> LoadResult:
    """Return what the second of two equal loads takes."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    tokenizer = read_tokenizer(model_dir)
    prompts = [tokenizer.encode(text).ids for text in load.texts(tokenizer)]
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation=_ATTENTION
    ).to(device)
    # On a CPU it would take nine tenths of the memory.
    limits = {} if device.type == "cuda" else {"num_blocks": 8, "max_batch_tokens": 64}

    def once() -> LoadResult:
        settings = GenerationConfig(
            max_new_tokens=load.output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        started = time.perf_counter()
        results = model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(**limits),
        )
        took = time.perf_counter() - started
        return LoadResult(took, sum(len(each.generated_tokens) for each in results.values()))

    once()
    return once()
