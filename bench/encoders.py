"""How long passes of encoders take, family by family, with random weights of all-MiniLM-L6-v2's size.

Texts of some lengths alone, and texts of mixed lengths together, are computed by the model's own
code (``launched``), by its program, and by the program with each text's first token alone asked
for (``first``); by turns in one process, milliseconds, medians of all rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.acceptance.encoders.speed import mixed_lengths
from tests.helpers.encoder_models import ENCODERS, make_tiny_encoder
from tests.helpers.tiny_models import VOCAB_SIZE

from lorax_contract.config import ShardConfig
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.interface import GraphSettings, PassNumbers
from lorax_shard.model.launch import launched
from lorax_shard.model.loader import load_paged_model

POSITIONS = 512
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": POSITIONS + 2,
}
OWN_SHAPES: dict[str, dict[str, Any]] = {
    "distilbert": {
        "dim": 384, "hidden_dim": 1536, "n_layers": 6, "n_heads": 12,
        "max_position_embeddings": POSITIONS,
    },
    "deberta-v2": {"position_buckets": 256, "position_biased_input": False},
    # As many numbers of weights: its MLP has a gate.
    "modernbert": {"intermediate_size": 1024, "local_attention": 128},
}  # fmt: skip
ALONE, MOST_TOKENS = (5, 10, 40, 85), 1024


def loaded(family: str, folder: Path) -> HFPagedModel:
    """Return a model whose passes are programs where they can be."""
    shape = OWN_SHAPES["distilbert"] if family == "distilbert" else SHAPE
    make_tiny_encoder(family, folder, **{**shape, **OWN_SHAPES.get(family, {})})
    config = ShardConfig(model_id=family, model_dir=str(folder), shard_uris=["unix:///unused"])
    model = load_paged_model(config)
    model.allocate_cache(16, POSITIONS)
    model.capture_graphs(GraphSettings(max_rows=64, max_context=POSITIONS))
    return model


def pass_of(lens: Sequence[int]) -> PassNumbers:
    """Return a pass over texts of so many tokens."""
    num_tokens = sum(lens)
    return PassNumbers(
        input_ids=np.arange(num_tokens) * 31 % (VOCAB_SIZE - 9) + 9,
        positions=np.concatenate([np.arange(length) for length in lens]),
        kv_slots=np.zeros(num_tokens, dtype=np.int64),
        tables=np.zeros((len(lens), 1), dtype=np.int64),
        query_lens=list(lens),
        context_lens=list(lens),
        num_decode_rows=0,
        logit_rows=np.zeros(0, dtype=np.int64),
        slots=[None] * len(lens),
        slot_lens=list(lens),
    )


def together() -> list[int]:
    """Return the lengths of texts that come as one step."""
    lens = [len(text.split()) + 2 for text in mixed_lengths(64)]
    totals = np.cumsum(lens)
    return lens[: int(np.searchsorted(totals, MOST_TOKENS, side="right"))]


def ways(model: HFPagedModel, numbers: PassNumbers) -> dict[str, Callable[[], Any]]:
    """Return what is compared of a pass."""
    programs = model.graphs
    tokens = np.arange(len(numbers.input_ids))
    firsts = np.cumsum(numbers.query_lens) - numbers.query_lens

    def launch() -> torch.Tensor:
        with model.keeping_hidden() as kept:
            launched(model, numbers)
        return kept.states

    found: dict[str, Callable[[], Any]] = {"launched": launch}
    if programs is not None and programs.run_with_states(numbers, tokens) is not None:
        found["program"] = lambda: programs.run_with_states(numbers, tokens)
        found["first"] = lambda: programs.run_with_states(numbers, firsts)
    return found


def milliseconds(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return the median of each call, by turns for so long."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    until, order = time.perf_counter() + seconds, [*calls.items()]
    while time.perf_counter() < until or len(taken["launched"]) < 5:
        # Whoever comes second finds the weights nearer.
        order.reverse()
        for name, call in order:
            begun = time.perf_counter()
            call()
            taken[name].append(1e3 * (time.perf_counter() - begun))
    return {name: statistics.median(each) for name, each in taken.items()}


@torch.inference_mode()
def measure(family: str, seconds: float) -> None:
    """Print a line for each pass of a family."""
    with tempfile.TemporaryDirectory() as folder:
        model = loaded(family, Path(folder) / family)
        for lens in (*([each] for each in ALONE), together()):
            what = f"{lens[0]}" if len(lens) == 1 else f"{sum(lens)} in {len(lens)} texts"
            found = milliseconds(ways(model, pass_of(lens)), seconds)
            cells = (f"{found[name]:.2f}" if name in found else "" for name in COLUMNS)
            print(f"| {family} | {what} | {' | '.join(cells)} |", flush=True)


COLUMNS = ("launched", "program", "first")


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=sorted(ENCODERS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each pass")
    arguments = parser.parse_args()
    print(f"| family | tokens | {' | '.join(COLUMNS)} |")
    for family in arguments.families:
        measure(family, arguments.seconds)


if __name__ == "__main__":
    main()
