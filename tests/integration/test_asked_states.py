"""Vectors of a text's first or last token, which the last layer of an encoder computes alone.

Against transformers and PEFT; a fault planted on purpose is found by the comparison.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_models import ENCODERS
from tests.helpers.encoder_world import (
    MAX_ROWS,
    EncoderWorld,
    check_vectors,
    specs_of,
    whole_scheduler,
)

from lorax_contract.pooling import Pooling
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.graph_limits import GraphLimits
from lorax_shard.model.interface import IdArray, PassNumbers
from lorax_shard.model.loader import load_paged_model
from lorax_shard.model.programs import passes
from lorax_shard.model.programs.asked import AskedRows, asked_rows
from lorax_shard.model.programs.program import Program

# Passes of these are no programs, and of the other with adapters.
LAUNCHED = {"deberta"}
POOLINGS = {
    "first": (Pooling.FIRST,),
    "last": (Pooling.LAST,),
    # All tokens of some rows, one of others.
    "mixed": (Pooling.FIRST, Pooling.MEAN, Pooling.LAST, Pooling.MAX),
}


class Served(EncoderWorld):
    """A world whose engine is warm, and whose passes are programs wherever they can be."""

    def __init__(self, family: str, root: Path) -> None:
        low_rank: list[dict[str, Any]] = [
            {"target_modules": "all-linear", "r": rank, "lora_alpha": rank} for rank in (3, 8)
        ]
        super().__init__(family, root, low_rank)
        self.config = replace(self.config, linear_backend="panel")
        graphs = GraphLimits(MAX_ROWS, max_rank=8, max_slots=MAX_ROWS)
        self.warm: Engine = self.engine(load_paged_model(self.config), graphs=graphs)

    def run(self, poolings: tuple[Pooling, ...]) -> float:
        """Serve base rows and rows of both adapters, and compare their vectors."""
        texts = self.texts((0, 1, 2, 0))
        asked = specs_of(texts, poolings)
        core = whole_scheduler(len(self.folders))
        return check_vectors(self, texts, asked, serve(self.warm, core, asked, at_once=True))


@pytest.fixture(scope="module", params=sorted(ENCODERS.keys() - LAUNCHED))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    with pytest.MonkeyPatch.context() as patch:
        # Tokens that nobody asks for are left out, be they ever so few.
        patch.setattr(passes, "_MANY_UNASKED", 1)
        return Served(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("poolings", POOLINGS)
def test_asked_tokens_alone_equal_transformers_and_peft(
    served: Served, poolings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrowed: list[int] = []
    own = Program.run_narrowed

    def run_narrowed(program: Program, *arguments: Any) -> Any:
        narrowed.append(1)
        return own(program, *arguments)

    monkeypatch.setattr(Program, "run_narrowed", run_narrowed)
    worst = served.run(POOLINGS[poolings])
    print(f"FIGURE {served.family}, {poolings} {worst:.1e}")
    assert narrowed


def _of_a_neighbour(numbers: PassNumbers, asked: IdArray) -> AskedRows:
    found = asked_rows(numbers, asked)
    return found._replace(rows=np.minimum(found.rows + 1, len(numbers.query_lens) - 1))


def test_keys_of_a_neighbour_are_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "asked_rows", _of_a_neighbour)
    with pytest.raises(AssertionError, match="'FIRST'"):
        served.run((Pooling.FIRST,))
