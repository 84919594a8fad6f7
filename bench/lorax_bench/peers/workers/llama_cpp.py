"""llama.cpp in float32: decodes of all requests and parts of prompts share its batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BATCH_TOKENS = 512


@dataclass(slots=True)
class Answering:
    """A request under way: what it is still to compute, and what came."""

    todo: list[int]
    wanted: int
    done: int = 0
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


def load(work: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Load the model, with a cache in float32 that all requests share."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(Path(work["model"], "model.gguf")).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = work["cache_tokens"], work["max_requests"]
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.n_threads = params.n_threads_batch = work["threads"]
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp made no context; its words are above")
    memory = llama_cpp.llama_get_memory(context)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def step(rows: list[Answering], start: float) -> None:
        batch.n_tokens = 0
        last: dict[int, int] = {}
        # Decodes first: a prompt waits rather than an answer.
        for number in sorted(range(len(rows)), key=lambda number: not rows[number].token_ids):
            row = rows[number]
            part = row.todo[: BATCH_TOKENS - batch.n_tokens]
            for token in part:
                place = batch.n_tokens
                batch.token[place], batch.pos[place] = token, row.done
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, number
                batch.logits[place] = 0
                batch.n_tokens, row.done = place + 1, row.done + 1
            row.todo = row.todo[len(part) :]
            if part and not row.todo:
                last[number] = batch.n_tokens - 1
                batch.logits[last[number]] = 1
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp could not compute a batch: code {code}")
        now = time.perf_counter() - start
        for number, place in last.items():
            logits = llama_cpp.llama_get_logits_ith(context, place)
            token = int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())
            row = rows[number]
            row.token_ids.append(token)
            row.times_s.append(now)
            if len(row.token_ids) < row.wanted:
                row.todo = [token]
            else:
                llama_cpp.llama_memory_seq_rm(memory, number, -1, -1)

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        rows = [Answering(request["prompt_ids"], request["max_tokens"]) for request in requests]
        while any(row.todo for row in rows):
            step(rows, start)
        return [{"token_ids": row.token_ids, "times_s": row.times_s} for row in rows]

    return answer
