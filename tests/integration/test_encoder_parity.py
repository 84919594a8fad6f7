"""Vectors of encoders against transformers and PEFT, whose texts are computed one by one.

The router's scheduler drives the engine; faults planted on purpose are found by the comparison.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.drive_engine import serve
from tests.helpers.encoder_faults import fewer_groups, fewer_rows
from tests.helpers.encoder_models import ENCODERS, LONGEST, TELLS_TEXTS_APART
from tests.helpers.encoder_world import (
    POOLINGS,
    EncoderWorld,
    Text,
    check_vectors,
    specs_of,
    whole_scheduler,
)

from lorax_contract.pooling import Pooling
from lorax_shard.attention import ragged, whole
from lorax_shard.engine import inputs
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.vectors import VectorSpan
from lorax_shard.model import loader
from lorax_shard.model.encoder import EncoderModel
from lorax_shard.model.families import ENCODER_FAMILIES
from lorax_shard.model.loader import load_paged_model


class Served(EncoderWorld):
    """A world whose engine is at hand."""

    def __init__(self, family: str, root: Path) -> None:
        super().__init__(family, root)
        paged = load_paged_model(self.config)
        assert paged.model_type == family
        self.warm: Engine = self.engine(paged)

    def run(self, texts: list[Text], poolings: tuple[Pooling, ...] = POOLINGS, **how: Any) -> float:
        """Serve the texts and compare their vectors; at most ``max_rows`` at once."""
        asked = specs_of(texts, poolings)
        core = whole_scheduler(len(self.folders), **how)
        return check_vectors(self, texts, asked, serve(self.warm, core, asked, at_once=True))


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param))


def test_the_list_of_encoders_is_what_is_tested() -> None:
    assert ENCODERS.keys() == ENCODER_FAMILIES


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_pooling_of_a_ragged_batch_equals_transformers(
    served: Served, pooling: Pooling
) -> None:
    worst = served.run(served.texts(), (pooling,))
    print(f"FIGURE {served.family}, {pooling.name} {worst:.1e}")


def test_each_text_alone_equals_transformers(served: Served) -> None:
    served.run(served.texts(), max_rows=1)


def test_adapters_beside_base_rows_equal_peft(served: Served) -> None:
    texts = served.texts(tuple(range(len(served.folders) + 1)))
    base = [served.hidden(replace(text, handle=0)) for text in texts]
    for text, states in zip(texts, base, strict=True):
        differs = float((served.hidden(text) - states).abs().max()) > 1e-2
        assert differs == bool(text.handle), "an adapter that changes nothing tests nothing"
    worst = served.run(texts)
    print(f"FIGURE {served.family}, adapters {worst:.1e}")


def test_the_last_position_is_served_and_the_next_is_refused(served: Served) -> None:
    ids = [5 + at for at in range(LONGEST + 1)]
    served.run([Text(ids[:LONGEST])], (Pooling.LAST,))
    asked = specs_of([Text(ids)], (Pooling.LAST,))
    (answer,) = serve(served.warm, whole_scheduler(0), asked).values()
    assert answer.vector is None
    assert answer.error is not None


def test_tokens_that_stand_for_padding_are_tokens(served: Served) -> None:
    """transformers gives RoBERTa's own padding token no position, wherever it stands."""
    pads = [0, 1] * 4
    served.run([Text([9, 8, 7, *pads, 6, 5]), Text(pads), Text([1, 1]), Text([1]), Text([3, 1, 4])])


@pytest.mark.parametrize("served", sorted(ENCODERS.keys() - TELLS_TEXTS_APART), indirect=True)
def test_a_pair_is_one_text_where_none_are_told_apart(served: Served) -> None:
    texts = [Text([7, 8, 9, 10, 11, 12], second) for second in (0, 3)]
    served.run(texts, (Pooling.MEAN,))


span_of, positions_of = inputs.span_of, EncoderModel._positions


def _from_one_before(*arguments: Any) -> VectorSpan | None:
    span = span_of(*arguments)
    if span is None or span.start == 0:
        return span
    return span._replace(start=span.start - 1, stop=span.stop - 1)


def _shifted(self: Any, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    # But for the first token: to angles, a shift of all of a text is none.
    return positions_of(self, input_ids, positions) + (positions > 0)


PLANTED = {
    "pooling takes a neighbour's token": [(inputs, "span_of", _from_one_before)],
    "positions shifted by one": [(EncoderModel, "_positions", _shifted)],
    "attention sees a neighbour": [
        (ragged, "_rows_of", fewer_rows), (whole, "_groups", fewer_groups),
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(
    served: Served, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [each for each in served.texts() if 1 < len(each.ids) < LONGEST]
    served.run(texts)
    for each in PLANTED[fault]:
        monkeypatch.setattr(*each)
    for pooling in POOLINGS:
        # By the numbers of a vector, and by nothing else.
        with pytest.raises(AssertionError, match=f"'{pooling.name}'"):
            served.run(texts, (pooling,))


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_attention_without_a_kernel_sees_nothing_of_what_fills_rows_up(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "encoder_attention", lambda *_: whole.WholeAttention())
    served = Served(family, tmp_path)
    texts = [each for each in served.texts() if 1 < len(each.ids) < LONGEST]
    served.run(texts)
    monkeypatch.setattr(whole, "_mask", lambda *_: None)
    with pytest.raises(AssertionError, match="'MEAN'"):
        served.run(texts, (Pooling.MEAN,))


@pytest.mark.parametrize("served", sorted(TELLS_TEXTS_APART), indirect=True)
def test_token_types_off_by_one_are_found(served: Served) -> None:
    texts = [Text([7, 8, 9, 10, 11, 12], 3)]
    asked = [replace(spec, second_start=2) for spec in specs_of(texts, (Pooling.MEAN,))]
    with pytest.raises(AssertionError, match="'MEAN'"):
        check_vectors(served, texts, asked, serve(served.warm, whole_scheduler(0), asked))


@pytest.mark.parametrize("served", ["modernbert"], indirect=True)
def test_a_window_one_token_wider_is_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type(served.warm.model._backend)
    attend = backend.attend

    def wider(*arguments: Any) -> torch.Tensor:
        *before, spec, metadata = arguments
        return attend(*before, spec._replace(window=spec.window and spec.window + 1), metadata)

    monkeypatch.setattr(backend, "attend", wider)
    with pytest.raises(AssertionError, match="'LAST'"):
        served.run([Text(list(range(20)))], (Pooling.LAST,))
