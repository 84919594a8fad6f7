"""The copies of a step, put together where their order allows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lorax_contract.errors import ShardError
from lorax_contract.step import BlockCopy, BlockSpace
from lorax_shard.model.interface import PagedModel


class CopyRun(NamedTuple):
    """Copies from one space to another that can be made at once."""

    source_space: int
    destination_space: int
    sources: list[int]
    destinations: list[int]


def copy_runs(copies: Sequence[BlockCopy]) -> Iterator[CopyRun]:
    """Yield runs whose effect, one run after the other, is that of one copy after the other.

    A run ends where the spaces change, and where a block would be written twice or be read
    after it was written.
    """
    run: CopyRun | None = None
    written: set[int] = set()
    for copy in copies:
        spaces = (copy.source_space, copy.destination_space)
        is_within = copy.source_space == copy.destination_space
        if run is not None and (
            (run.source_space, run.destination_space) != spaces
            or copy.destination_block in written
            or (is_within and copy.source_block in written)
        ):
            yield run
            run = None
        if run is None:
            run = CopyRun(*spaces, [], [])
            written = set()
        run.sources.append(copy.source_block)
        run.destinations.append(copy.destination_block)
        written.add(copy.destination_block)
    if run is not None:
        yield run


def make_copies(model: PagedModel, copies: Sequence[BlockCopy]) -> None:
    """Have a model make copies, one after the other in effect."""
    for run in copy_runs(copies):
        if run.destination_space == BlockSpace.HOST:
            model.swap_out(run.sources, run.destinations)
        elif run.source_space == BlockSpace.HOST:
            model.swap_in(run.sources, run.destinations)
        else:
            model.copy_blocks(run.sources, run.destinations)


def check_copies(
    seq: int, copies: Sequence[BlockCopy], num_blocks: int, num_host_blocks: int
) -> None:
    """Raise ShardError for a block outside the pool or host memory."""
    sizes: dict[int, int] = {BlockSpace.DEVICE: num_blocks, BlockSpace.HOST: num_host_blocks}
    for copy in copies:
        for space, block in (
            (copy.source_space, copy.source_block),
            (copy.destination_space, copy.destination_block),
        ):
            size = sizes.get(space, 0)
            if 0 <= block < size:
                continue
            if space == BlockSpace.HOST and not size:
                raise ShardError(f"step {seq}: this shard has no host memory for blocks")
            where = "host memory" if space == BlockSpace.HOST else "the pool"
            raise ShardError(
                f"step {seq}: block {block} of a copy is outside {where} of {size} blocks"
            )
        if copy.source_space == copy.destination_space == BlockSpace.HOST:
            raise ShardError(f"step {seq}: blocks are not copied within host memory")
