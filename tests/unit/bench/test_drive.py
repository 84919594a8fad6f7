"""The client against a server that answers by a script: well, badly, slowly, in any pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.unit.bench.scripted_server import OK, Connection, Script, completion, event, scripted

from lorax_bench.apis import Lorax, OpenAI, ServerApi
from lorax_bench.drive import BROKEN, SHORT, UNREADABLE, Target, drive
from lorax_bench.records import Record
from lorax_bench.requests import BenchRequest, Workload
from lorax_bench.sse import EventReader

DONE = b"data: [DONE]\n\n"
STREAM = completion("He", 1) + completion("llo", 2) + completion("", 3) + DONE
OPEN_AI = OpenAI(model="base", adapters=("a", "b"))


def request(**values: object) -> BenchRequest:
    return BenchRequest(**{"prompt_ids": (5, 6, 7), "max_tokens": 3, **values})  # type: ignore[arg-type]


def run(
    script: Script,
    requests: Sequence[BenchRequest] = (request(),),
    *,
    api: ServerApi = OPEN_AI,
    concurrency: int | None = None,
    timeout_s: float = 60.0,
    api_key: str | None = None,
) -> list[Record]:
    """Drive the requests against the script."""

    async def both() -> list[Record]:
        async with scripted(script) as url:
            target = Target(url=url, api=api, timeout_s=timeout_s, api_key=api_key)
            load = Workload(
                name="test", requests=tuple(requests), concurrency=concurrency, num_adapters=2
            )
            return await drive(target, load)

    return asyncio.run(both())


async def answer(connection: Connection) -> None:
    await connection.raw(OK)
    await connection.chunk(STREAM)
    await connection.chunk(b"")


def test_an_answer_is_read_with_its_tokens() -> None:
    (record,) = run(answer)
    assert record.error is None
    assert (record.num_tokens, "".join(record.texts), record.prompt_tokens) == (3, "Hello", 3)


def test_what_is_sent_is_what_was_asked_for() -> None:
    seen: list[Connection] = []

    async def script(connection: Connection) -> None:
        seen.append(connection)
        await answer(connection)

    asked = [request(), request(adapter=1, temperature=0.7, top_p=0.9, seed=4)]
    run(script, asked, concurrency=1, api_key="secret")
    assert [each.path for each in seen] == ["/v1/completions"] * 2
    assert all("authorization: bearer secret" in each.head.lower() for each in seen)
    base, sampled = (each.body for each in seen)
    assert base == {
        "model": "base", "prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0.0, "stream": True,
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    assert (sampled["model"], sampled["temperature"]) == ("b", 0.7)
    assert (sampled["top_p"], sampled["seed"]) == (0.9, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_events_may_be_cut_anywhere(size: int) -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        for first in range(0, len(STREAM), size):
            await connection.chunk(STREAM[first : first + size])
        await connection.chunk(b"")

    (record,) = run(script)
    assert (record.error, record.num_tokens, record.texts) == (None, 3, ["He", "llo"])


def test_a_stream_is_read_alike_wherever_it_is_cut() -> None:
    stream = b": hello\r\ndata: 1\r\n\r\ndata: 2\ndata: 3\n\nevent: x\nid: 4\n\ndata:5\n\n"
    for cut in range(len(stream) + 1):
        reader = EventReader()
        found = reader.feed(stream[:cut]) + reader.feed(stream[cut:]) + reader.close()
        assert found == [b"1", b"2\n3", b"5"]


def test_an_event_that_no_empty_line_ends_counts_too() -> None:
    reader = EventReader()
    assert reader.feed(b"data: 1\n\ndata: 2") == [b"1"]
    assert reader.close() == [b"2"]


def test_tokens_are_noted_when_they_come() -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        for number in (1, 2, 3):
            await asyncio.sleep(0.01)
            await connection.chunk(completion("x", number))
        await connection.chunk(b"")

    (record,) = run(script)
    assert record.token_times_s == sorted(record.token_times_s)
    assert record.ttft_s is not None
    assert record.end_to_end_s is not None
    assert record.ttft_s >= 0.01
    assert record.end_to_end_s >= 0.03


def test_tokens_of_one_event_are_counted_by_the_server() -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        await connection.chunk(completion("He", 1) + completion("llo", 3) + DONE)
        await connection.chunk(b"")

    (record,) = run(script)
    assert (record.error, record.num_tokens) == (None, 3)


def test_without_extensions_the_sum_at_the_end_completes_the_count() -> None:
    seen: list[Connection] = []

    async def script(connection: Connection) -> None:
        seen.append(connection)
        await connection.raw(OK)
        last = event({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}})
        await connection.chunk(completion("He") + completion("") + completion("llo") + last + DONE)
        await connection.chunk(b"")

    (record,) = run(script, api=OpenAI(model="base", extensions=False))
    assert (record.error, record.num_tokens, record.prompt_tokens) == (None, 3, 4)
    assert "ignore_eos" not in seen[0].body
    assert seen[0].body["stream_options"] == {"include_usage": True}


def test_an_answer_that_ends_early_is_an_error_unless_the_end_of_text_ends_it() -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        await connection.chunk(completion("He", 1) + DONE)
        await connection.chunk(b"")

    (record,) = run(script)
    assert (record.error, record.num_tokens) == (SHORT, 1)
    (record,) = run(script, api=OpenAI(model="base", extensions=False))
    assert record.error is None


async def cut(connection: Connection) -> None:
    await connection.raw(OK)
    await connection.chunk(completion("He", 1))
    connection.writer.close()


async def refuse(connection: Connection) -> None:
    await connection.whole("429 Too Many Requests", b'{"error": {"message": "queue is full"}}')


async def fail_as_page(connection: Connection) -> None:
    await connection.whole("502 Bad Gateway", b"<html>no upstream</html>")


async def fail_in_stream(connection: Connection) -> None:
    await connection.raw(OK)
    await connection.chunk(completion("He", 1) + event({"error": {"message": "out of memory"}}))
    await connection.chunk(b"")


async def mumble(connection: Connection) -> None:
    await connection.raw(OK)
    await connection.chunk(b"data: {nonsense\n\n")
    await connection.chunk(b"")


async def say_nothing(connection: Connection) -> None:
    connection.writer.close()


@pytest.mark.parametrize(
    ("script", "words", "num_tokens"),
    [
        (cut, BROKEN, 1),
        (refuse, "HTTP 429: queue is full", 0),
        (fail_as_page, "HTTP 502: <html>no upstream</html>", 0),
        (fail_in_stream, "out of memory", 1),
        (mumble, UNREADABLE, 0),
        (say_nothing, BROKEN, 0),
    ],
)
def test_a_failure_is_said_in_words(script: Script, words: str, num_tokens: int) -> None:
    (record,) = run(script)
    assert (record.error, record.num_tokens) == (words, num_tokens)


def test_a_failed_request_stops_no_other() -> None:
    async def script(connection: Connection) -> None:
        await (cut if connection.number % 2 else answer)(connection)

    records = run(script, [request()] * 6, concurrency=2)
    assert [each.request for each in records] == list(range(6))
    assert sorted(each.error or "" for each in records) == [""] * 3 + [BROKEN] * 3


def test_an_answer_that_never_ends_is_given_up() -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        await connection.chunk(completion("He", 1))
        await asyncio.Event().wait()

    (record,) = run(script, timeout_s=0.5)
    assert record.error == "no end of the answer within 0.5 s"


def test_a_server_that_is_not_there_is_said_so() -> None:
    target = Target(url="http://127.0.0.1:9", api=OPEN_AI)
    (record,) = asyncio.run(drive(target, Workload(name="one", requests=(request(),))))
    assert record.error is not None
    assert record.error.startswith("no connection to the server")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_closed_loop_has_so_many_at_once_and_keeps_the_order(concurrency: int) -> None:
    running, most, order = 0, 0, []

    async def script(connection: Connection) -> None:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        order.append(connection.body["seed"])
        await connection.raw(OK)
        for number in (1, 2, 3):
            await asyncio.sleep(0)
            await connection.chunk(completion("x", number))
        running -= 1
        await connection.chunk(b"")

    requests = [request(temperature=1.0, seed=number) for number in range(9)]
    run(script, requests, concurrency=concurrency)
    assert most <= concurrency
    if concurrency == 1:
        assert order == list(range(9))
    assert sorted(order) == list(range(9))


def test_an_open_loop_sends_when_it_is_due_whatever_runs() -> None:
    arrived: list[int] = []
    all_there = asyncio.Event()

    async def script(connection: Connection) -> None:
        arrived.append(connection.body["seed"])
        if len(arrived) == 3:
            all_there.set()
        await all_there.wait()  # nobody is answered before the last one has come
        await answer(connection)

    times = (0.2, 0.0, 0.1)
    requests = [request(temperature=1.0, seed=i, at_s=at) for i, at in enumerate(times)]
    records = run(script, requests)
    assert [each.error for each in records] == [None] * 3
    assert sorted(records, key=lambda each: each.sent_s) == [records[i] for i in (1, 2, 0)]
    assert all(record.sent_s >= at for record, at in zip(records, times))


def test_lorax_streams_are_read_and_asked_for() -> None:
    seen: list[Connection] = []

    async def script(connection: Connection) -> None:
        seen.append(connection)
        await connection.raw(OK)
        for number in range(3):
            document = {"token": {"id": 40 + number, "text": f"t{number}"}, "details": None}
            if number == 2:
                document["details"] = {"generated_tokens": 3, "prompt_tokens": 2}
            await connection.chunk(event(document))
        await connection.chunk(b"")

    api = Lorax(
        decode=lambda ids: "-".join(map(str, ids)), adapters=("x", "y"), adapter_source="local"
    )
    (record,) = run(script, [request(adapter=1)], api=api)
    assert (record.error, record.token_ids, record.texts) == (
        None,
        [40, 41, 42],
        ["t0", "t1", "t2"],
    )
    assert record.prompt_tokens == 2
    assert seen[0].path == "/generate_stream"
    assert seen[0].body == {
        "inputs": "5-6-7",
        "parameters": {
            "max_new_tokens": 3, "ignore_eos_token": True, "truncate": 3, "adapter_id": "y",
            "adapter_source": "local",
        },
    }  # fmt: skip


def test_an_error_of_a_lorax_stream_is_told() -> None:
    async def script(connection: Connection) -> None:
        await connection.raw(OK)
        await connection.chunk(event({"error": "no such adapter", "error_type": "validation"}))
        await connection.chunk(b"")

    (record,) = run(script, api=Lorax(decode=str))
    assert record.error == "no such adapter"
