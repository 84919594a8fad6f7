"""A file is hashed while it comes, and what stands in its digest is what lies on the disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_shard.fetching.sources import stream
from lorax_shard.fetching.sources.interface import FetchContext, RemoteFile
from lorax_shard.fetching.sources.stream import Broken, Opened, Opener, download

MB = 1 << 20
NAME = "adapter_model.safetensors"


def opener(tries: list[tuple[int | None, bytes, bool]]) -> Opener:
    """Return what gives, try by try, bytes from a place on (None: as asked), and may break off."""
    left = iter(tries)

    @contextlib.contextmanager
    def opened(start: int) -> Iterator[Opened]:
        place, data, breaks = next(left)

        def chunks() -> Iterator[memoryview]:
            memory = bytearray(7)
            for begin in range(0, len(data), len(memory)):
                piece = data[begin : begin + len(memory)]
                # Always the same memory, as a source may give it.
                memory[: len(piece)] = piece
                yield memoryview(memory)[: len(piece)]
            if breaks:
                raise Broken("it broke off")

        yield Opened(start=start if place is None else place, total=None, chunks=chunks())

    return opened


@pytest.mark.parametrize(
    "tries",
    [
        [(None, b"0123456789abcdef", False)],
        [(None, b"0123456789", True), (None, b"abcdef", False)],
        # It begins anew, or earlier than it was asked to, with other bytes.
        [(None, b"012345678x", True), (0, b"0123456789abcdef", False)],
        [(None, b"0123xxxxxxxxxx", True), (4, b"456789abcdef", False)],
        [(None, b"", True), (None, b"0123456789abcdef", False)],
    ],
)
def test_a_digest_is_that_of_the_file(
    tries: list[tuple[int | None, bytes, bool]], tmp_path: Path, context: FetchContext
) -> None:
    stored = download("it", RemoteFile(name=NAME), tmp_path, opener(tries), context)
    content = (tmp_path / NAME).read_bytes()
    assert content == b"0123456789abcdef"
    assert (stored.size, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_file_that_comes_in_one_go_is_not_read_again(
    tmp_path: Path, context: FetchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_hashed", None)
    download("it", RemoteFile(name=NAME), tmp_path, opener([(None, b"all", False)]), context)
    assert (tmp_path / NAME).read_bytes() == b"all"


def test_what_an_earlier_process_left_is_hashed_with_the_rest(
    tmp_path: Path, context: FetchContext
) -> None:
    kept = bytes(range(256)) * (MB // 256)
    (tmp_path / f"{NAME}.part").write_bytes(kept)
    stored = download(
        "it", RemoteFile(name=NAME), tmp_path, opener([(None, b"rest", False)]), context
    )
    assert stored.sha256 == hashlib.sha256(kept + b"rest").hexdigest()
