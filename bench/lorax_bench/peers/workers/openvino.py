"""OpenVINO GenAI's pipeline with continuous batching: all in float32, no prefix cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def load(work: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Compile the exported model."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = work["cache_gib"]
    scheduler.max_num_seqs = work["max_requests"]
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        work["model"], scheduler, "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    )  # fmt: skip

    def config(max_tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        return config

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        handles = [
            pipeline.add_request(
                number,
                openvino.Tensor(np.array([request["prompt_ids"]], dtype=np.int64)),
                config(request["max_tokens"]),
            )
            for number, request in enumerate(requests)
        ]
        answers: list[dict[str, Any]] = [{"token_ids": [], "times_s": []} for _ in handles]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - start
            for handle, held in zip(handles, answers):
                while handle.can_read():
                    for output in handle.read().values():
                        held["token_ids"] += output.generated_ids
                        held["times_s"] += [now] * len(output.generated_ids)
        return answers

    return answer
