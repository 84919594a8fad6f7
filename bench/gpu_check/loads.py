"""The requests of the end-to-end stages, the model they are sent to, and what they took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.gpu_check.models import LLAMA_1B, TINY, LlamaShape, llama_config
from bench.gpu_check.report import Report
from tests.helpers.tiny_models import make_tokenizer
from tokenizers import Tokenizer

# Those that a tokenizer knows as one token each make the prompts.
_TEXT = (
    "the quick brown fox jumps over lazy dog while many small adapters share one base model a "
    "request names it wants and server answers with tokens of that"
)
_COLUMNS = (
    "system", "load", "adapters", "seconds", "output tokens/s", "queue, ms: p50", "p95",
    "forward pass, ms: p50", "p95", "step, ms: p50", "p95", "not in the shard, %",
)  # fmt: skip


class RequestLoad(NamedTuple):
    """Requests that are all sent at once: request i asks for adapter i modulo their number."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    adapters: tuple[str, ...] = ()
    is_sampled: bool = False

    @property
    def label(self) -> str:
        """What is sent, for a table."""
        how = "sampled" if self.is_sampled else "greedy"
        return f"{self.num_requests} x {self.prompt_tokens} in, {self.output_tokens} out, {how}"

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        """Return prompts of exactly as many tokens; they differ from their first ones on."""
        words = [word for word in _TEXT.split() if len(tokenizer.encode(f" {word}").ids) == 1]
        texts = []
        for number in range(self.num_requests):
            # Numbers with digits of words: no two requests share a beginning.
            digits = [number // len(words) ** place % len(words) for place in range(3)]
            chosen = [*digits, *range(self.prompt_tokens)][: self.prompt_tokens]
            texts.append("".join(f" {words[each % len(words)]}" for each in chosen))
        lengths = {len(tokenizer.encode(text).ids) for text in texts}
        if lengths != {self.prompt_tokens}:
            raise RuntimeError(f"prompts of {sorted(lengths)} tokens for {self.prompt_tokens}")
        return texts

    def parameters(self, number: int) -> dict[str, Any]:
        """Return what request ``number`` asks for."""
        asked: dict[str, Any] = {"max_new_tokens": self.output_tokens, "ignore_eos_token": True}
        if self.adapters:
            asked["adapter_id"] = self.adapters[number % len(self.adapters)]
        if self.is_sampled:
            asked |= {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": number}
        return asked


class LoadResult(NamedTuple):
    """What a load took."""

    seconds: float
    num_tokens: int
    # Seconds that each request waited for its first step; of each step in the shard, the forward
    # pass and all. Empty where they cannot be seen.
    queue_s: tuple[float, ...] = ()
    forward_s: tuple[float, ...] = ()
    step_s: tuple[float, ...] = ()

    @property
    def tokens_s(self) -> float:
        """Output tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def router_share(self) -> float | None:
        """The share of the time in which the shard computed nothing."""
        return 1 - sum(self.step_s) / self.seconds if self.step_s else None


class ServingSizes(NamedTuple):
    """What the stage serves."""

    shape: LlamaShape
    dtype: str
    num_adapters: int
    load: RequestLoad
    # Drawing takes the host milliseconds a row: fewer of them, beside as many greedy ones.
    sampled: RequestLoad


FULL = ServingSizes(
    LLAMA_1B, "bfloat16", 16, RequestLoad(128, 256, 128),
    RequestLoad(32, 256, 32, is_sampled=True),
)  # fmt: skip
SMALL = ServingSizes(
    TINY, "float32", 2, RequestLoad(3, 12, 5), RequestLoad(2, 12, 4, is_sampled=True)
)


def begin(report: Report) -> None:
    """Begin the table of loads."""
    report.table("Requests that are sent at once", _COLUMNS)


def write_model(path: Path, sizes: ServingSizes, device: torch.device) -> Path:
    """Save a random model made on the device, with a small tokenizer."""
    from transformers import AutoModelForCausalLM

    path.mkdir(parents=True)
    make_tokenizer(path)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            llama_config(sizes.shape), dtype=getattr(torch, sizes.dtype)
        )
    model.save_pretrained(path)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    config = json.loads((path / "config.json").read_text())
    assert "head_dim" in config, "adapters are written by the config"
    return path


def add(report: Report, system: str, load: RequestLoad, result: LoadResult) -> None:
    """Add a line to the table."""
    share = result.router_share
    report.row(
        system, load.label, len(load.adapters), result.seconds, result.tokens_s,
        *_percentiles_ms(result.queue_s), *_percentiles_ms(result.forward_s),
        *_percentiles_ms(result.step_s), None if share is None else 100 * share,
    )  # fmt: skip


def _percentiles_ms(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the median and the 95th of a hundred."""
    if not values:
        return None, None
    ordered = sorted(values)
    p50, p95 = (ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 95))
    return p50 * 1e3, p95 * 1e3


def read_tokenizer(model_dir: Path) -> Tokenizer:
    """Return a model's tokenizer."""
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def checked(load: RequestLoad, counts: Sequence[int], took: float) -> LoadResult:
    """Return what a load took, if every request got all of its tokens."""
    short = [count for count in counts if count != load.output_tokens]
    if short:
        raise RuntimeError(
            f"{len(short)} of {load.num_requests} requests got other than {load.output_tokens} "
            f"tokens: {sorted(set(short))}"
        )
    return LoadResult(took, sum(counts))
