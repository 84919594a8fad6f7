"""What drawing costs beside a greedy decode step, on the embedded default model.

Each round runs a greedy step and then draws from logits that the model gave for as many rows of
real text, with each setting in turn, so that all share what the machine has to give. Processor
time, on one thread: of steps the median, of draws the best. ``rows`` is the specification, which
draws row by row (and is what a CPU without a compiler does); it is slow and measured thrice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from tests.helpers.default_model import default_model_dir

from lorax_bench.steps.engine import DecodingRows, make_engine
from lorax_contract.step import SamplingParams
from lorax_shard.engine.engine import Engine
from lorax_shard.sampling.kernel import DrawKernel
from lorax_shard.sampling.masks import NO_MASKS, Masks
from lorax_shard.sampling.reference import sample_each
from lorax_shard.sampling.sampled import Draws
from lorax_shard.sampling.sampler import Sampler, SamplesRows, best_method
from lorax_shard.sampling.scores import SamplerRow
from lorax_shard.sampling.watermark import Watermark

ROOT = Path(__file__).parents[1]
ROWS = (1, 32, 256)
ROUNDS, SLOW_ROUNDS = 15, 3
CONTEXT = 100
_DRAWN = SamplingParams(do_sample=True, temperature=0.8)
SETTINGS = {
    "greedy": SamplingParams(),
    "temperature": _DRAWN,
    "top-p": replace(_DRAWN, top_p=0.95),
    "top-k, top-p, penalties": replace(
        _DRAWN, top_k=50, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2,
        presence_penalty=0.1,
    ),
}  # fmt: skip


class LastDraw:
    """Draws, and keeps what it drew from."""

    def __init__(self, method: SamplesRows) -> None:
        self._method = method
        self.logits = torch.empty(0)
        self.rows: Sequence[SamplerRow] = ()

    def __call__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplerRow],
        watermark: Watermark,
        masks: Masks = NO_MASKS,
    ) -> Draws:
        """Draw."""
        self.logits, self.rows = logits.clone(), rows
        return self._method(logits, rows, watermark, masks)


def real_text(engine_dir: Path) -> list[int]:
    """Return the tokens of this project's own pages."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(engine_dir / "tokenizer.json"))
    pages = sorted((ROOT / "docs").glob("*.md"))
    ids: list[int] = tokenizer.encode("\n".join(page.read_text() for page in pages)).ids
    return ids


class Line:
    """A row as the sampler sees it, with parameters of its own."""

    def __init__(self, row: SamplerRow, params: SamplingParams) -> None:
        self.params, self.edits = params, None
        self.token_ids = np.array(row.token_ids)
        self.num_prompt_tokens, self.num_tokens = row.num_prompt_tokens, row.num_tokens


def measure(engine: Engine, num_rows: int, text: list[int]) -> dict[str, Any]:
    """Return milliseconds: of a step, and of each setting by each method."""
    last = LastDraw(best_method(torch.device("cpu")))
    engine.computation.sampler = Sampler(engine.model.vocab_size, method=last)
    decode = DecodingRows(engine, num_rows, CONTEXT, text)
    # The first logits were those of prompts.
    decode()
    samplers = {
        name: Sampler(engine.model.vocab_size, method=method)
        for name, method in (("kernel", DrawKernel()), ("rows", sample_each))
    }
    step_ms: list[float] = []
    draw_ms: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(ROUNDS + 1):
        started = process_time()
        decode()
        step_ms.append((process_time() - started) * 1e3)
        for setting, params in SETTINGS.items():
            rows = [Line(row, replace(params, seed=at)) for at, row in enumerate(last.rows)]
            for name, sampler in samplers.items():
                if name == "rows" and number > SLOW_ROUNDS:
                    continue
                started = process_time()
                sampler.sample(last.logits, rows)
                draw_ms[setting][name].append((process_time() - started) * 1e3)
    # The first round warms up.
    return {
        "step_ms": statistics.median(step_ms[1:]),
        "draw_ms": {
            setting: {name: min(values[1:]) for name, values in by_name.items()}
            for setting, by_name in draw_ms.items()
        },
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = default_model_dir()
    engine, text = (
        make_engine(folder, context=CONTEXT, max_rows=256, max_tokens=256),
        real_text(folder),
    )
    figures = {}
    print("| rows | greedy step, ms | drawing | kernel, ms | of a step | row by row, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_rows in ROWS:
        figures[str(num_rows)] = found = measure(engine, num_rows, text)
        for setting, ms in found["draw_ms"].items():
            share = ms["kernel"] / found["step_ms"]
            print(
                f"| {num_rows} | {found['step_ms']:.1f} | {setting} | {ms['kernel']:.2f} "
                f"| {share:.1%} | {ms['rows']:.1f} |", flush=True,
            )  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
