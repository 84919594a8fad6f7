"""One sampler for the batch: the same tokens, the right distribution, and what it costs.

``python -m tests.acceptance.engine.sampling`` runs these points alone.
"""

from __future__ import annotations

import sys

import torch
from bench.sampling import CONTEXT, LastDraw, real_text
from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench
from tests.acceptance.suites import run_suite
from tests.helpers.default_model import default_model_dir
from tests.helpers.mixes import random_rows
from tests.helpers.sampling_methods import method_of

from lorax_bench.steps.engine import DecodingRows, make_engine
from lorax_shard.sampling.sampler import Sampler

NUM_ROWS, NUM_MIXES = 256, 12
# Drawing beside the median greedy step, by rows.
MOST_SHARE = {"32": 0.05, "256": 0.10}


def point_suites() -> Result:
    """Random mixes by each way to draw, recorded tokens, batches and parts, one rank and three."""
    run = run_suite("tests/unit/sampling", "tests/integration/test_rank_engines.py")
    return Result(run.is_clean, f"{run.counts['passed']} tests passed")


def point_real_logits() -> Result:
    """Random mixes on logits of the default model, whole batches, parts and single rows."""
    folder = default_model_dir()
    engine = make_engine(folder, context=CONTEXT, max_rows=256, max_tokens=256)
    vocab_size = engine.model.vocab_size
    last = LastDraw(method_of("kernel"))
    engine.computation.sampler = Sampler(vocab_size, method=last)
    decode = DecodingRows(engine, NUM_ROWS, CONTEXT, real_text(folder))
    kernel, rows_alone = (
        Sampler(vocab_size, method=method_of(name)) for name in ("kernel", "rows")
    )
    tensors = Sampler(vocab_size, method=method_of("tensors"))
    num_drawn = wrong = 0
    for seed in range(NUM_MIXES):
        decode()
        logits, rows = last.logits[:, :vocab_size], random_rows(NUM_ROWS, vocab_size, seed)
        found = kernel.sample(logits, rows)
        expected = rows_alone.sample(logits, rows)
        pairs = [(found.ids, expected.ids)]
        pairs += [
            (kernel.sample(logits[part], rows[part]).ids, expected.ids[part])
            for part in (slice(0, 1), slice(5, 37), slice(37, 208), slice(255, 256))
        ]
        part = slice(16 * seed, 16 * seed + 16)
        pairs.append((tensors.sample(logits[part], rows[part]).ids, expected.ids[part]))
        for ours, theirs in pairs:
            num_drawn += len(ours)
            wrong += sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Result(not wrong, f"{num_drawn} draws of {NUM_MIXES * NUM_ROWS} mixes, {wrong} others")


def point_distribution() -> Result:
    """Draws of each parameter and of mixes against the softmax of the reference."""
    run = run_suite("tests/unit/sampling/test_sampler_distribution.py")
    figures = "; ".join(run.figures)
    return Result(run.is_clean, f"{figures}; {run.counts['passed']} tests passed")


def point_cost() -> Result:
    """Drawing by itself beside the median greedy step; processor time on one thread."""
    figures = run_bench("sampling")
    parts, is_ok = [], True
    for num_rows, most in MOST_SHARE.items():
        found = figures[num_rows]
        share = found["draw_ms"]["top-p"]["kernel"] / found["step_ms"]
        is_ok = is_ok and share <= most
        parts.append(f"{num_rows} rows {share:.1%} (at most {most:.0%})")
    return Result(is_ok, f"temperature 0.8, top-p 0.95: {', '.join(parts)}")


POINTS = [
    Point("3a", "every way to draw, any batch and any ranks: the same tokens", point_suites),
    Point("3b", "tokens of random mixes on real logits are the specification's", point_real_logits),
    Point("3c", "chi-square for each parameter and for mixes", point_distribution),
    Point("3d", "drawing costs little of a greedy step", point_cost),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
