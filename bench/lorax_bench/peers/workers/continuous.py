"""transformers' own continuous batching, over its paged attention by SDPA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PAGE, BLOCKS, BATCH_TOKENS = 32, 2048, 512


def load(work: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Load the stock model in float32 and start its manager, which keeps a thread."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        work["model"], dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    manager = model.init_continuous_batching(
        # No token ends an answer.
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=BLOCKS, max_batch_tokens=BATCH_TOKENS,
            allow_block_sharing=False, use_cuda_graph=False,
        ),
    )  # fmt: skip
    manager.start()

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        answers: dict[str, dict[str, Any]] = {}
        for request in requests:
            name = manager.add_request(
                request["prompt_ids"], max_new_tokens=request["max_tokens"], streaming=True,
                eos_token_id=-1,
            )  # fmt: skip
            answers[name] = {"token_ids": [], "times_s": []}
        num_open = len(answers)
        while num_open:
            result = manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(
                    f"continuous batching failed: {getattr(result, 'error', result)}"
                )
            now, held = time.perf_counter() - start, answers[result.request_id]
            new = list(result.generated_tokens)[len(held["token_ids"]) :]
            held["token_ids"] += new
            held["times_s"] += [now] * len(new)
            num_open -= result.is_finished()
        return list(answers.values())

    return answer
