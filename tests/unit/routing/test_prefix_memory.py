"""What is remembered of prefixes is bounded, and goes with its replica."""

from __future__ import annotations

from lorax_ingress.routing.prefixes import PrefixMemory
from lorax_ingress.routing.values import RouteRequest


def request(*blocks: bytes, adapter: str | None = None) -> RouteRequest:
    return RouteRequest(adapter=adapter, prefix=blocks)


def test_the_longest_known_beginning_counts() -> None:
    memory = PrefixMemory(100, 64)
    memory.note(request(b"1", b"12"), "short")
    memory.note(request(b"1", b"12", b"123"), "long")
    assert memory.find(request(b"1", b"12", b"123", b"1234"), 1) == ("long",)
    assert memory.find(request(b"1", b"12", b"other"), 1) == ("long", "short")
    assert memory.find(request(b"1", b"12"), 3) == ()
    assert memory.find(request(b"1", adapter="another"), 1) == ()


def test_the_least_recent_go() -> None:
    memory = PrefixMemory(3, 64)
    for number in range(10):
        memory.note(request(bytes([number])), "a")
    assert len(memory) == 3
    assert memory.find(request(bytes([9])), 1) == ("a",)
    assert memory.find(request(bytes([0])), 1) == ()


def test_so_many_blocks_are_looked_at() -> None:
    memory = PrefixMemory(100, 2)
    memory.note(request(b"1", b"2", b"3"), "a")
    assert len(memory) == 2


def test_the_latest_replicas_are_kept_and_a_dead_one_is_not() -> None:
    memory = PrefixMemory(100, 64)
    for name in "abcdef":
        memory.note(request(b"1"), name)
    assert memory.find(request(b"1"), 1) == ("f", "e", "d", "c")
    memory.forget("e")
    assert memory.find(request(b"1"), 1) == ("f", "d", "c")
    memory.note(request(b"2"), "x")
    memory.forget("x")
    assert memory.find(request(b"2"), 1) == ()
