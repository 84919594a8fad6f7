"""Texts that several requests share: made once, for those that share them, and not kept for ever."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.http_app import word_tokenizer
from tests.helpers.in_loop import in_loop

from lorax_router.service.prompts import shared_texts
from lorax_router.service.prompts.encoding import EncodedText, TextToEncode
from lorax_router.service.prompts.shared_texts import SharedTexts
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool


class CountingPool(TokenizerPool):
    """Notes what it tokenizes."""

    def __init__(self) -> None:
        super().__init__(word_tokenizer(), 1)
        self.texts: list[str] = []

    async def encode(self, asked: TextToEncode) -> EncodedText:
        self.texts.append(asked.text)
        return await super().encode(asked)


@in_loop
async def test_a_text_is_made_once_for_those_that_share_it() -> None:
    pool = CountingPool()
    shared = SharedTexts(pool)
    asked = TextToEncode("w1 w2")
    together = await asyncio.gather(*(shared.encode("a", asked) for _ in range(5)))
    assert together == [([900, 1, 2], 0, None)] * 5
    assert await shared.encode("a", asked) == together[0]
    assert pool.texts == ["w1 w2"]
    # Another call has its own, and so has another question.
    await shared.encode("b", asked)
    found = await shared.encode("a", TextToEncode("w1 w2", cut_to=2, with_spans=True))
    assert found == ([900, 1], 0, [(0, 0), (0, 2)])
    assert len(pool.texts) == 3
    pool.close()


@in_loop
async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_texts, "_MAX_TOKENS", 200)
    pool = CountingPool()
    shared = SharedTexts(pool)
    for name in ("a", "b", "c", "d", "a"):
        assert (await shared.encode(name, TextToEncode("w1"))).ids == [900, 1]
    # Three have room.
    assert len(pool.texts) == 5
    long = TextToEncode("w1 " * 300)
    for _ in range(2):
        assert len((await shared.encode("e", long)).ids) == 301
    assert len(pool.texts) == 7
    pool.close()
