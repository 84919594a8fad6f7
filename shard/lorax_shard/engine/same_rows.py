"""Whether the ranks of a group compute the same rows, asked beside the step."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from lorax_shard.engine.inputs import RowWork
from lorax_shard.parallel.group import GroupBrokenError, RankGroup


class RowComparison:
    """Whether all ranks compute the same rows in a step; begun before they are computed.

    Nobody waits for it then, and nothing is told of the rows before it is known.
    """

    def __init__(self, group: RankGroup, seq: int, work: Sequence[RowWork]) -> None:
        self._seq = seq
        numbers = [
            seq,
            *(
                n
                for row, num, draft in work
                for n in (row.request_id, row.num_computed, num, *draft)
            ),
        ]
        print_of_all = zlib.crc32(np.array(numbers, dtype=np.int64).tobytes())
        self._prints = group.begin_gather([print_of_all])

    @property
    def is_known(self) -> bool:
        """Whether all ranks have said what they compute."""
        return self._prints.is_there

    def check(self) -> None:
        """Raise GroupBrokenError if they do not; waits for the others."""
        prints = self._prints.read()
        ranks = [rank for rank, each in enumerate(prints) if each != prints[0]]
        if ranks:
            raise GroupBrokenError(f"step {self._seq}: ranks {ranks} hold other rows than rank 0")
