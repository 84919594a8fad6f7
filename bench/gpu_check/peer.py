"""The load of ``serving`` by transformers' continuous batching, without adapters: it mixes none.

A stage of its own: somebody else's program may fail, and hang, alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench.gpu_check.models import device_of
from bench.gpu_check.report import SKIPPED, Report
from bench.gpu_check.requests import LoadResult, RequestLoad
from bench.gpu_check.serving import FULL, SMALL, ServingSizes, add, begin, write_model


def run(report: Report, *, small: bool) -> None:
    """Serve the requests; what transformers cannot do here skips the stage in its words."""
    sizes, device = SMALL if small else FULL, device_of(small)
    load = RequestLoad(sizes.num_requests, sizes.prompt_tokens, sizes.output_tokens)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model(Path(folder) / "model", sizes, device)
        begin(report, sizes)
        try:
            outcome = generate(model_dir, load, sizes, device)
        except Exception as error:  # noqa: BLE001 - no fault of ours, whatever it is
            report.end(SKIPPED, f"{type(error).__name__}: {error}")
            return
    if outcome.num_tokens != load.num_requests * load.output_tokens:
        report.note(f"it made {outcome.num_tokens} tokens; the rate counts those")
    add(report, "transformers, continuous batching", load, outcome)


def generate(
    model_dir: Path, load: RequestLoad, sizes: ServingSizes, device: torch.device
) -> LoadResult:
    """Return what the load takes once everything is warm."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids[: load.prompt_tokens] for text in load.texts()]
    dtype: torch.dtype = getattr(torch, sizes.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation="sdpa"
    ).to(device)
    # On a CPU it would take nine tenths of the memory.
    limits = {} if device.type == "cuda" else {"num_blocks": 8, "max_batch_tokens": 64}

    def once(num_tokens: int) -> LoadResult:
        settings = GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        started = time.perf_counter()
        results = model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(**limits),
        )
        took = time.perf_counter() - started
        return LoadResult(took, sum(len(each.generated_tokens) for each in results.values()))

    once(2)
    return once(load.output_tokens)
