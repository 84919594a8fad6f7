"""A world whose model has a classification head that says what a test wants it to say."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence

from tests.helpers.http_app import World, limits
from tests.helpers.openai_world import Session
from tests.helpers.scripted_engine import ScriptedEngine, as_many_as_asked

from lorax_contract.pooling import HeadFacts
from lorax_contract.step import FinishCode, OutputKind, RequestSpec, TokenColumns
from lorax_router.service.abilities import Abilities
from lorax_router.service.engine.port import TokenChunk

Says = Callable[[RequestSpec], Sequence[float]]


def classifying(head: HeadFacts, says: Says) -> Session:
    """Calls of a model with this head, whose scores of a prompt are what ``says`` returns."""

    def script(spec: RequestSpec) -> Iterator[TokenChunk]:
        if spec.output is not OutputKind.SCORES:
            yield from as_many_as_asked(spec)
            return
        assert spec.pooling is head.pooling
        values = says(spec)
        raw = struct.pack(f"<{len(values)}f", *values)
        yield TokenChunk(TokenColumns(), FinishCode.LENGTH, generated_text="", vector=raw)

    abilities = Abilities(generates=False, head=head)
    return Session(
        World(
            engine=ScriptedEngine(script),
            model_id="fake",
            abilities=abilities,
            max_body_bytes=100_000,
            bounds=limits(max_input_length=25),
        )
    )
