"""Memory of programs is used again, and never by two at once."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from lorax_shard.model.programs.memory import Lifetime, lay_out

LIVES = st.builds(
    lambda first, more, nbytes: Lifetime(first, first + more, nbytes),
    st.integers(0, 30), st.integers(0, 10), st.integers(1, 500),
)  # fmt: skip


@given(st.lists(LIVES, max_size=40))
def test_tensors_that_live_at_once_lie_apart(lives: list[Lifetime]) -> None:
    layout = lay_out(dict(enumerate(lives)))
    places = [(life, layout.offsets[number]) for number, life in enumerate(lives)]
    for (one, at), (other, other_at) in combinations(places, 2):
        is_apart = at + one.nbytes <= other_at or other_at + other.nbytes <= at
        assert is_apart or one.last < other.first or other.last < one.first
    assert all(at % 64 == 0 and at + life.nbytes <= layout.nbytes for life, at in places)


def test_memory_is_used_again() -> None:
    lives = {number: Lifetime(number, number + 1, 64) for number in range(100)}
    assert lay_out(lives).nbytes == 128
