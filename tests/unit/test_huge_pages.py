"""Memory that is filled before it is asked for."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import psutil
import pytest

from lorax_shard import huge_pages

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has huge pages")

MB = 1 << 20


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    huge_pages.release_ahead()


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_what_was_filled_is_handed_out_in_pieces_of_their_own() -> None:
    huge_pages.fill_ahead(8 * MB)
    first, second = huge_pages.map_memory(3 * MB), huge_pages.map_memory(5 * MB)
    assert second.data_ptr() - first.data_ptr() == 3 * MB
    first.fill_(1)
    assert not second.any()
    second.fill_(2)
    assert int(first.max()) == 1


def test_more_than_was_filled_is_memory_as_ever() -> None:
    huge_pages.fill_ahead(2 * MB)
    more = huge_pages.map_memory(3 * MB)
    assert more.nbytes == 3 * MB
    assert not more.any()
    assert huge_pages.map_memory(2 * MB).nbytes == 2 * MB


def test_what_nobody_asked_for_goes_back_to_the_system() -> None:
    huge_pages.fill_ahead(256 * MB)
    assert huge_pages._ahead is not None
    huge_pages._ahead._thread.join()
    kept = huge_pages.map_memory(4 * MB).fill_(7)
    before = resident()
    huge_pages.release_ahead()
    assert before - resident() > 200 * MB
    assert int(kept.min()) == 7
    later = huge_pages.map_memory(4 * MB)
    assert not later.any()


def test_memory_outlives_who_filled_it() -> None:
    huge_pages.fill_ahead(4 * MB)
    memory = huge_pages.map_memory(4 * MB)
    huge_pages.release_ahead()
    memory.fill_(3)
    assert int(memory.min()) == 3


def test_small_pieces_share_huge_pages_and_go_back_one_by_one() -> None:
    pieces = [huge_pages.map_memory(5 * MB - 64) for _ in range(3)]
    first, second, third = (piece.data_ptr() for piece in pieces)
    assert second - first == third - second == 5 * MB
    for number, piece in enumerate(pieces):
        piece.fill_(number + 1)
    del pieces[1], piece
    kept = pieces.pop()[-100:]
    assert (kept == 3).all()
    assert (pieces[0] == 1).all()
    # Whoever reads where the second one was finds what the system gives: zeros.
    assert ctypes.string_at(second + 4 * MB // 2, 1000) == bytes(1000)
