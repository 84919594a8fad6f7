"""transformers' ``generate`` in static, left-padded batches; with adapters PEFT's mixed batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(work: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Load the stock model in float32, and all adapters under the names of their numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    if work["adapters"]:
        from peft import PeftModel

        first, *others = map(Path, work["adapters"])
        model = PeftModel.from_pretrained(model, first, adapter_name="0")
        for number, folder in enumerate(others, 1):
            model.load_adapter(folder, adapter_name=str(number))
    model.eval()
    size = work["batch_size"]

    def answer(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        start, answers = time.perf_counter(), []
        for first in range(0, len(requests), size):
            batch = requests[first : first + size]
            tokens = generate(model, batch, mixed=bool(work["adapters"]))
            # A static batch answers once all of it has ended.
            now = time.perf_counter() - start
            answers += [{"token_ids": ids, "times_s": [now] * len(ids)} for ids in tokens]
        return answers

    return answer


def generate(model: Any, batch: list[dict[str, Any]], *, mixed: bool) -> list[list[int]]:
    """Generate as long as the batch's longest answer; return the wanted tokens of each."""
    import torch

    rows = [request["prompt_ids"] for request in batch]
    lengths = [request["max_tokens"] for request in batch]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    adapters = [request["adapter"] for request in batch]
    names = ["__base__" if adapter is None else str(adapter) for adapter in adapters]
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0,
            min_new_tokens=max(lengths), max_new_tokens=max(lengths),
            **({"adapter_names": names} if mixed else {}),
        )  # fmt: skip
    return [row[width : width + num].tolist() for row, num in zip(output, lengths)]
