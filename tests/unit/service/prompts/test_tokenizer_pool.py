"""The tokenizer in threads of its own."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.helpers.http_app import word_tokenizer

from lorax_contract.errors import LoraxError, OverloadedError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.prompts.encoding import TextToEncode
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool, TokenSpan, load_tokenizer


def test_tokens_know_their_places_in_the_text():
    pool = TokenizerPool(word_tokenizer(), 1)
    spans = asyncio.run(pool.tokenize("w1  ü w2"))
    pool.close()
    assert spans[0] == TokenSpan(900, "", 0, 0)
    assert spans[1] == TokenSpan(1, "w1", 0, 2)
    assert spans[2] == TokenSpan(901, "ü", 4, 5)
    assert spans[3] == TokenSpan(2, "w2", 6, 8)


def test_special_tokens_can_be_left_out():
    pool = TokenizerPool(word_tokenizer(), 1)
    assert asyncio.run(pool.encode(TextToEncode("w1", add_special_tokens=False))).ids == [1]
    assert [s.id for s in asyncio.run(pool.tokenize("w1", add_special_tokens=False))] == [1]
    pool.close()


def test_work_runs_off_the_loop():
    async def run() -> str:
        return await pool.run(lambda: threading.current_thread().name)

    pool = TokenizerPool(word_tokenizer(), 1)
    assert asyncio.run(run()).startswith("tokenizer")
    pool.close()


def test_calls_beyond_the_bound_are_refused_and_room_comes_back():
    async def run() -> None:
        gate = threading.Event()
        waiting = [asyncio.ensure_future(pool.run(gate.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await pool.encode(TextToEncode("w1"))
        gate.set()
        await asyncio.gather(*waiting)
        assert await pool.encode(TextToEncode("w1")) == ([900, 1], 0, None)

    pool = TokenizerPool(word_tokenizer(), 1, max_pending=2)
    asyncio.run(run())
    pool.close()


def test_a_panic_of_the_library_becomes_an_error():
    class PanicException(BaseException):
        """As the Rust library raises it."""

    def panic() -> None:
        raise PanicException("index out of range")

    pool = TokenizerPool(word_tokenizer(), 1)
    with pytest.raises(LoraxError, match="index out of range") as caught:
        asyncio.run(pool.run(panic))
    assert "index" not in caught.value.public
    pool.close()


class Counting:
    """A tokenizer that counts its calls, and panics over a text."""

    def __init__(self, poison: str = "") -> None:
        self._own, self._poison = word_tokenizer(), poison
        self.batches: list[list[str]] = []

    def encode_batch_fast(self, texts: list[str], **how: bool):
        self.batches.append(texts)
        if self._poison in texts:
            raise PanicException("index out of range")
        return self._own.encode_batch_fast(texts, **how)


class PanicException(BaseException):
    """As the Rust library raises it."""


def encoded(pool: TokenizerPool, asked: list[TextToEncode]) -> list[object]:
    async def run() -> list[object]:
        return await asyncio.gather(*map(pool.encode, asked), return_exceptions=True)

    found = asyncio.run(run())
    pool.close()
    return found


def test_texts_that_come_together_are_tokenized_together():
    tokenizer = Counting()
    texts = [f"w{number}" for number in range(9)]
    asked = [TextToEncode(each) for each in texts]
    asked += [TextToEncode("w1", add_special_tokens=False), TextToEncode("w1 w2 w3", cut_to=2)]
    tokenizer.post_process = tokenizer._own.post_process
    tokenizer.num_special_tokens_to_add = tokenizer._own.num_special_tokens_to_add
    found = encoded(TokenizerPool(tokenizer, 1), asked)
    assert [each.ids for each in found] == [*([900, n] for n in range(9)), [1], [900, 1]]
    assert tokenizer.batches[0] == texts
    assert len(tokenizer.batches) == 3


def test_a_text_that_cannot_be_tokenized_ends_no_other():
    found = encoded(TokenizerPool(Counting("w3"), 1), [TextToEncode(f"w{n}") for n in range(5)])
    assert [each.ids for n, each in enumerate(found) if n != 3] == [[900, n] for n in (0, 1, 2, 4)]
    assert isinstance(found[3], LoraxError)
    assert "index" not in found[3].public


def test_a_long_text_is_no_part_of_others():
    tokenizer = Counting()
    long = "w1 " * 4000
    encoded(TokenizerPool(tokenizer, 1), [TextToEncode(each) for each in ("w1", long, "w2")])
    assert tokenizer.batches == [["w1", "w2"], [long]]


def test_who_waits_no_longer_is_left_out():
    async def run() -> None:
        gate = threading.Event()
        held = asyncio.ensure_future(pool.run(gate.wait))
        given_up = asyncio.ensure_future(pool.encode(TextToEncode("w1")))
        kept = asyncio.ensure_future(pool.encode(TextToEncode("w2")))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        gate.set()
        assert (await kept).ids == [900, 2]
        assert given_up.cancelled()
        await held

    pool = TokenizerPool(word_tokenizer(), 1)
    asyncio.run(run())
    pool.close()


def test_closed_threads_refuse_texts():
    async def run() -> None:
        pool.close()
        with pytest.raises(RuntimeError):
            await pool.encode(TextToEncode("w1"))

    pool = TokenizerPool(word_tokenizer(), 1)
    asyncio.run(run())


def test_settings_of_the_file_do_not_cut_prompts(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode("w1 w2 w3 w4").ids == [900, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}'])
def test_an_unusable_tokenizer_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartupError, match=r"tokenizer\.json cannot be read") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.exit_code is ExitCode.TOKENIZER_UNUSABLE
