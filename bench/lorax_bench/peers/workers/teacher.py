"""Judges answers by the stock model: each token given those before it, in one pass a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def load(work: dict[str, Any]) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Load the stock model in float32.

    A request is ``prompt_ids``, ``token_ids`` (an answer to judge) and ``reference_ids`` (its own
    answer in a padded batch). An answer has the gaps of all tokens that are not the model's choice,
    and the largest difference that rounding alone makes between a step and one pass.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32).eval()

    def logits(prompt_ids: list[int], token_ids: list[int]) -> Any:
        known = torch.tensor([prompt_ids + token_ids[:-1]])
        with torch.inference_mode():
            return model(known, logits_to_keep=len(token_ids), use_cache=False).logits[0]

    def stepped(requests: list[dict[str, Any]]) -> Any:
        """The logits of the padded batch, by steps over its cache: requests x steps x vocabulary."""
        rows = [request["prompt_ids"] for request in requests]
        width = max(map(len, rows))
        num = max(len(request["reference_ids"]) for request in requests)
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
                attention_mask=torch.tensor(
                    [[0] * (width - len(row)) + [1] * len(row) for row in rows]
                ),
                do_sample=False, pad_token_id=0, min_new_tokens=num, max_new_tokens=num,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        return output.sequences[:, width:], torch.stack(output.logits, dim=1)

    def judge(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        tokens, steps = stepped(requests)
        answers = []
        for request, row, seen in zip(requests, tokens, steps):
            num = len(request["reference_ids"])
            in_one_pass = logits(request["prompt_ids"], row[:num].tolist())
            taught = logits(request["prompt_ids"], request["token_ids"])
            chosen = torch.tensor(request["token_ids"])[:, None]
            gaps = taught.max(dim=1).values - taught.gather(1, chosen)[:, 0]
            answers.append(
                {
                    "gaps": [float(gap) for gap in gaps if gap > 0],
                    "difference": float((seen[:num] - in_one_pass).abs().max()),
                }
            )
        return answers

    return judge
