"""Runs a workload in vLLM, in an environment of its own: JSON lines in, JSON lines out.

    <- {"model": ..., "adapters": [folder, ...], "max_rank": 16, "prompts": [[id, ...], ...],
        "lengths": [...]}
    -> {"ready": true}
    <- {"run": true}
    -> {"tokens": [[id, ...], ...], "seconds": 1.0}

Imports nothing of this project. Request i uses adapter i modulo their number.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def make_engine(work: dict[str, Any]) -> Any:
    """Return the engine, with a place for each adapter."""
    from vllm import LLM  # type: ignore[import-not-found,unused-ignore]

    num = len(work["adapters"])
    lora = {
        "enable_lora": True,
        "max_loras": num,
        "max_cpu_loras": num,
        "max_lora_rank": work["max_rank"],
    }
    return LLM(
        model=work["model"],
        dtype="float32",
        enforce_eager=work["eager"],
        max_model_len=1024,
        max_num_seqs=len(work["prompts"]),
        enable_prefix_caching=False,
        disable_log_stats=True,
        **(lora if num else {}),
    )


def run(engine: Any, work: dict[str, Any]) -> tuple[list[list[int]], float]:
    """Answer all requests, submitted at once; return their tokens and the seconds."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found,unused-ignore]

    adapters = [
        LoRARequest(f"adapter-{number}", number + 1, folder)
        for number, folder in enumerate(work["adapters"])
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in work["lengths"]
    ]
    start = time.perf_counter()
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids in work["prompts"]],
        params,
        use_tqdm=False,
        lora_request=[adapters[i % len(adapters)] for i in range(len(params))]
        if adapters
        else None,
    )
    seconds = time.perf_counter() - start
    return [list(answer.outputs[0].token_ids) for answer in answers], seconds


def main() -> None:
    """Serve commands until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    work = json.loads(sys.stdin.readline())
    engine = make_engine(work)
    print(json.dumps({"ready": True}), file=answers)
    for _ in sys.stdin:
        tokens, seconds = run(engine, work)
        print(json.dumps({"tokens": tokens, "seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
