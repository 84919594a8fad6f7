"""Messages arrive whole and in order, however the socket cuts them; a reader that stands still is left."""

from __future__ import annotations

import asyncio
import socket

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.http_app import until

from lorax_router.fronts.link import Link


@given(st.lists(st.binary(max_size=40), max_size=12), st.lists(st.integers(1, 30), max_size=8))
@settings(deadline=None)
def test_messages_are_whole_however_they_are_cut(messages, cuts) -> None:
    found: list[bytes] = []
    link = Link(lambda data: found.append(bytes(data)), lambda: None)
    stream = b"".join(len(each).to_bytes(4, "little") + each for each in messages)
    for size in cuts:
        piece, stream = stream[:size], stream[size:]
        if piece:
            link.data_received(piece)
    if stream:
        link.data_received(stream)
    assert found == messages


def test_both_ends_send_and_notice_the_end() -> None:
    async def scene() -> None:
        ours, theirs = socket.socketpair()
        found: dict[str, list[bytes]] = {"ours": [], "theirs": []}
        ended: list[str] = []
        one = await Link.over(
            ours, lambda data: found["ours"].append(bytes(data)), lambda: ended.append("ours")
        )
        other = await Link.over(
            theirs, lambda data: found["theirs"].append(bytes(data)), lambda: ended.append("theirs")
        )
        large = bytes(3_000_000)
        for each in (b"a", large, b""):
            one.send(each)
        other.send(b"b")
        await until(lambda: len(found["theirs"]) == 3 and found["ours"])
        assert found == {"ours": [b"b"], "theirs": [b"a", large, b""]}
        other.close()
        await until(lambda: len(ended) == 2)
        one.send(b"nobody is there")

    asyncio.run(scene())


def test_an_end_that_does_not_read_is_given_up() -> None:
    async def scene() -> None:
        ours, theirs = socket.socketpair()
        ended: list[bool] = []
        with theirs:
            link = await Link.over(
                ours, lambda data: None, lambda: ended.append(True), max_unsent_bytes=100_000
            )
            sent = 0
            while not ended:
                link.send(bytes(10_000))
                sent += 10_000
                await asyncio.sleep(0)
                # What the system keeps for a socket comes on top.
                assert sent < 5_000_000

    asyncio.run(scene())
