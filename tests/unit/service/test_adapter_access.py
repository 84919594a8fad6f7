"""Who is served from memory: tokens, and for how long an answer holds."""

from __future__ import annotations

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
)
from lorax_router.service.adapters.answers import AnswerBook

REF = AdapterRef.of("hub", "org/private")


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def query(token: str | None = None, ref: AdapterRef = REF) -> AdapterQuery:
    return AdapterQuery(ref=ref, token=token)


def guard(world: AdapterWorld, *accepted: str) -> None:
    """Let the source serve an adapter to callers with one of these tokens only."""

    def fetch(asked: AdapterQuery) -> FetchedAdapter:
        if asked.token not in accepted:
            raise AdapterUnavailableError(Reason.NO_ACCESS, "you are not let in")
        return fetched("private", access="token")

    world.shard.on_fetch = fetch


@in_loop
async def test_an_adapter_that_took_a_token_is_not_served_to_callers_without_that_access():
    async with adapter_world() as world:
        guard(world, "good", "better")
        await world.generate("a", token="good")
        for token in (None, "bad"):
            with pytest.raises(AdapterUnavailableError, match="not let in") as raised:
                await world.generate("a", token=token)
            assert raised.value.kind.http_status == 422
        # Whoever was let in is remembered; another token is asked about, and shares the memory.
        await world.generate("a", token="good")
        assert len(world.shard.queries) == 3
        await world.generate("a", token="better")
        assert len(world.shard.queries) == 4
        assert list(world.shard.prepared) == [1]


@in_loop
async def test_a_token_that_lost_its_access_is_refused_once_the_answer_expires():
    async with adapter_world() as world:
        clock = Clock()
        world.parts.service._adapters._answers._clock = clock
        guard(world, "good")
        await world.generate("a", token="good")
        guard(world)
        clock.now = 299.0
        await world.generate("a", token="good")
        clock.now = 301.0
        with pytest.raises(AdapterUnavailableError):
            await world.generate("a", token="good")


@in_loop
async def test_tokens_are_in_no_log_line_list_or_error(caplog):
    async with adapter_world() as world:
        guard(world, "s3cret")
        caplog.set_level("DEBUG")
        await world.generate("a", token="s3cret")
        with pytest.raises(AdapterUnavailableError) as raised:
            await world.generate("b", token="s3cret-too")
        shown = [raised.value.public, str(await world.list()), str(world.shard.queries)]
        shown += [str(record.__dict__) for record in caplog.records]
        assert "s3cret" not in "".join(shown)


def test_answers_expire():
    clock = Clock()
    book = AnswerBook(10, clock)
    book.note(query(), fetched("x", valid_s=10.0))
    clock.now = 9.0
    assert book.find(query()) is not None
    assert book.find(query("any token")) is not None
    clock.now = 10.0
    assert book.find(query()) is None


def test_an_answer_to_a_token_is_for_that_token_and_name_only():
    book = AnswerBook(10, Clock())
    book.note(query("t1"), fetched("x", access="token"))
    assert book.find(query("t1")) is not None
    assert book.find(query("t2")) is None
    assert book.find(query()) is None
    assert book.find(query("t1", AdapterRef.of("hub", "org/other"))) is None


def test_an_adapter_that_becomes_private_is_nobodys_any_more():
    book = AnswerBook(10, Clock())
    book.note(query(), fetched("x"))
    book.note(query("t1"), fetched("x", access="token"))
    assert book.find(query()) is None
    assert book.find(query("t2")) is None
    assert book.find(query("t1")) is not None


def test_a_token_answer_without_a_token_is_not_kept():
    book = AnswerBook(10, Clock())
    book.note(query(), fetched("x", access="token"))
    assert book.find(query()) is None
    assert book.find(query("t1")) is None


def test_forgetting_a_name_forgets_it_for_everybody():
    book = AnswerBook(10, Clock())
    other = AdapterRef.of("hub", "org/other")
    book.note(query("t1"), fetched("x", access="token"))
    book.note(query("t2"), fetched("x", access="token"))
    book.note(query(ref=other), fetched("y"))
    book.forget(REF)
    assert book.find(query("t1")) is None
    assert book.find(query("t2")) is None
    assert book.find(query(ref=other)) is not None


def test_w28_the_book_is_bounded_and_holds_no_token():
    book = AnswerBook(10, Clock())
    for number in range(100):
        ref = AdapterRef.of("hub", f"org/n{number}")
        book.note(query("t0ken", ref), fetched("x", access="token"))
    assert len(book._answers) == 10
    assert "t0ken" not in repr(book.__dict__)
