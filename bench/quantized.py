"""What ``--quantize`` gains and costs on the embedded default model, on a CPU.

    python -m bench.quantized [--steps N] [--rounds N] [--tokens N] [--json FILE]

Decode steps of the whole engine, at 1 and 8 rows: each kind of weights takes its turn in every round
of one run, and a ratio is that of one round's tokens per second. Perplexity is that of a page of
docs/, in windows of 512 tokens. The greedy tokens of weights in a GGUF file's blocks are compared
with those of the same numbers in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tests.helpers.default_model import default_model_dir
from tests.helpers.paged_runner import PagedRunner
from tokenizers import Tokenizer
from torch.nn import functional

from lorax_bench.steps.engine import DecodingRows
from lorax_contract.config import ShardConfig
from lorax_contract.step import WarmupSpec
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.model.loader import load_paged_model

KINDS = ("none", "int8", "gguf")
_CONTEXT = 100
ROWS = (1, 8)
WINDOW = 512
TEXT = Path(__file__).parents[1] / "docs" / "adapters.md"


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = default_model_dir(with_blocks=True)
    engines = {kind: make_engine(folder, kind) for kind in KINDS}
    figures = {
        "speed": {rows: speed(engines, rows, arguments) for rows in ROWS},
        "weight_mb": {kind: each.model.weight_bytes / 1e6 for kind, each in engines.items()},
        "perplexity": perplexities(engines, folder, arguments.tokens),
    }
    print(json.dumps(figures, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures))


def make_engine(folder: Path, kind: str) -> Engine:
    """Load the model with one kind of weights, as a shard does."""
    config = ShardConfig.from_json(
        json.dumps(
            {
                "model_dir": str(folder), "model_id": "bench", "shard_uris": ["unix:/unused"],
                "quantize": kind,
            }
        )
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pool = PoolSettings(block_size=16, memory_fraction=0.5, num_blocks=512)
    graphs = GraphLimits.of(config, 0)
    engine = Engine(load_paged_model(config), tokenizer, pool, graphs=graphs)
    engine.warm_up(
        WarmupSpec(max_input_length=256, max_total_tokens=512, max_step_tokens=256, max_rows=8)
    )
    return engine


def speed(engines: dict[str, Engine], rows: int, arguments: Any) -> dict[str, dict[str, float]]:
    """Return tokens per second, and how many times those of float32, by kind of weights."""
    per_second: dict[str, list[float]] = {kind: [] for kind in engines}
    for turn in range(arguments.rounds):
        # Whoever comes first in a round comes last in the next.
        for kind in KINDS if turn % 2 else reversed(KINDS):
            decode = DecodingRows(engines[kind], rows, _CONTEXT)
            decode()
            started = time.perf_counter()
            for _ in range(arguments.steps):
                decode()
            seconds = time.perf_counter() - started
            per_second[kind].append(rows * arguments.steps / seconds)
    found = {}
    for kind, rates in per_second.items():
        ratios = [rate / plain for rate, plain in zip(rates, per_second["none"], strict=True)]
        found[kind] = {
            "tokens_per_s": round(statistics.median(rates), 1),
            "ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        }
    return found


@torch.inference_mode()
def perplexities(engines: dict[str, Engine], folder: Path, tokens: int) -> dict[str, Any]:
    """Return each kind's perplexity, how much worse it is than float32's, and equal choices."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids[: tokens + 1]
    sums = dict.fromkeys(engines, 0.0)
    differing = dict.fromkeys(engines, 0)
    for first in range(0, len(ids) - 1, WINDOW):
        window = ids[first : first + WINDOW + 1]
        wanted = torch.tensor(window[1:])
        choices = {}
        for kind, engine in engines.items():
            runner = PagedRunner(engine.model, [window[:-1]], num_blocks=33, block_size=16)
            runner.step({0: len(window) - 1})
            logits = torch.stack([runner.logits[0][at] for at in range(len(window) - 1)])
            sums[kind] += functional.cross_entropy(logits, wanted, reduction="sum").item()
            choices[kind] = logits.argmax(dim=-1)
            differing[kind] += int((choices[kind] != choices["none"]).sum())
    count = len(ids) - 1
    found: dict[str, Any] = {"tokens": count}
    for kind, total in sums.items():
        found[kind] = {
            "perplexity": round(math.exp(total / count), 4),
            "worse_percent": round((math.exp((total - sums["none"]) / count) - 1) * 100, 4),
            "other_choices": differing[kind],
        }
    return found


if __name__ == "__main__":
    main()
