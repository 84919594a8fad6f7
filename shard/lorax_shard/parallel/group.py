"""The ranks as one: the few collectives that a step needs, and who is to blame for a stall.

Begun by the thread that computes steps only, in the same order on all ranks.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.parallel.arriving import Arriving, ArrivingTensors
from lorax_shard.transfer import to_device

logger = logging.getLogger(__name__)

# How long a rank that waits for others leaves them to say that they wait as well.
_BLAME_S = 2.0
# How long the rendezvous may take to answer beyond that.
_ANSWER_S = 5.0
# How long a rank whose pass failed leaves the others to say that theirs did as well.
_FAIL_S = 5.0


class GroupBrokenError(Exception):
    """The ranks cannot go on together; each has to end. The text names the culprit if known."""


class RankGroup(Protocol):
    """What sharded modules and the engine use of the other ranks."""

    @property
    def rank(self) -> int:
        """The number of this rank."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks; the given tensor may hold it too."""

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Put the ranks' tensors together along the last dimension; rank i's is sizes[i] wide."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor; the others give one of its shape and dtype."""

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """Return what each rank gave, by rank; all give as many."""

    def begin_broadcast(self, tensor: torch.Tensor) -> Arriving:
        """Bring rank 0's tensor to all; the others give one of its shape and dtype. Nobody waits."""

    def begin_gather(self, values: Sequence[int]) -> Arriving:
        """Bring to each what each rank gives; all give as many. Nobody waits."""

    def fails_together(self) -> bool:
        """Whether the pass of each rank failed at this very place, so that all can go on.

        Asked after a failed pass only, and never by way of a collective: others may be in one.
        """

    def wait_for_all(self, what: str, timeout_s: float) -> None:
        """Wait until every rank has come to the place named; StartupError names the others."""


class TorchGroup:
    """Implements RankGroup over torch.distributed: gloo on CPUs, nccl on GPUs.

    Args:
        rendezvous: where the ranks find each other: ``tcp://host:port``, on which rank 0
            listens, or ``file:///path`` of a file that is not there yet, for ranks of one host.
        timeout_s: how long a rank waits for the others in a collective.
        meeting_s: how long it waits for them to start.
        shares_device: other ranks are on the same GPU, which nccl does not do.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        rendezvous: str,
        device: torch.device,
        *,
        timeout_s: float,
        meeting_s: float,
        shares_device: bool = False,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device = device
        self._timeout_s = timeout_s
        self._where = rendezvous
        # Collectives that were begun, and passes that failed: where this rank stands.
        self._num_begun = self._num_failures = 0
        # Whether collectives are ordered with what the device computes.
        self._is_ordered = device.type == "cuda" and not shares_device
        try:
            # A store of our own: groups side by side on one host have nothing in common.
            self._store = _store(rendezvous, rank, world_size, meeting_s)
            self._wait_for_all("started", meeting_s)
            distributed.init_process_group(
                "nccl" if self._is_ordered else "gloo",
                store=self._store,
                rank=rank,
                world_size=world_size,
                timeout=dt.timedelta(seconds=timeout_s),
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise StartupError(
                f"rank {rank} of {world_size} cannot meet the others at {rendezvous}: "
                f"{_first_line(error)}",
                ExitCode.RANKS_APART,
            ) from error

    def wait_for_all(self, what: str, timeout_s: float) -> None:
        """Wait until every rank has come here; StartupError names those that did not."""
        self._wait_for_all(what, timeout_s)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        tensor = tensor.contiguous()
        self._together(lambda: distributed.all_reduce(tensor))
        return tensor

    def all_gather(self, tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Put the ranks' tensors together along the last dimension."""
        widest = max(sizes)
        padded = tensor
        if tensor.shape[-1] < widest:
            padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        parts = [torch.empty_like(padded) for _ in sizes]
        self._together(lambda: distributed.all_gather(parts, padded.contiguous()))
        kept = (part[..., :size] for part, size in zip(parts, sizes, strict=True))
        return torch.cat(list(kept), dim=-1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor."""
        shared = tensor.to(self._device).contiguous()
        self._together(lambda: distributed.broadcast(shared, src=0))
        return shared.to(tensor.device)

    def gather_values(self, values: Sequence[int]) -> list[list[int]]:
        """Return what each rank gave, by rank."""
        own = torch.tensor(list(values), dtype=torch.int64, device=self._device)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        self._together(lambda: distributed.all_gather(parts, own))
        return [part.tolist() for part in parts]

    def begin_broadcast(self, tensor: torch.Tensor) -> Arriving:
        """Bring rank 0's tensor to all."""
        shared = tensor.to(self._device).contiguous()
        work = self._together(lambda: distributed.broadcast(shared, src=0, async_op=True))
        # Rank 0 has what it gives.
        return self._arriving(shared.unsqueeze(0), work if self.rank else None)

    def begin_gather(self, values: Sequence[int]) -> Arriving:
        """Bring to each what each rank gives."""
        own = to_device(torch.tensor(list(values), dtype=torch.int64), self._device)
        numbers = own.new_empty(self.world_size, len(own))
        parts = list(numbers.unbind())
        work = self._together(lambda: distributed.all_gather(parts, own, async_op=True))
        return self._arriving(numbers, work)

    def _arriving(self, numbers: torch.Tensor, work: Any) -> Arriving:
        return ArrivingTensors(numbers, work, is_ordered=self._is_ordered, blame=self._blame)

    def fails_together(self) -> bool:
        """Whether each rank says so, of one place between two collectives."""
        self._num_failures += 1
        place = f"failed/{self._num_failures}/{self._num_begun}"
        return not self._ask(lambda: self._missing_after(place, _FAIL_S), _FAIL_S, [self.rank])

    def close(self) -> None:
        """Leave the group."""
        distributed.destroy_process_group()

    def _together(self, collective: Callable[[], Any]) -> Any:
        self._num_begun += 1
        try:
            return collective()
        except RuntimeError as error:
            self._blame(error)

    def _blame(self, error: Exception) -> NoReturn:
        """Raise GroupBrokenError with the ranks that do not answer, by what all tell the store.

        A rank that waits in vain says so; one that stands still, or is gone, does not.
        """
        silent = self._silent_ranks()
        who = (
            f"{_named(silent)} stood still or ended"
            if silent
            else "no rank is known to be at fault"
        )
        raise GroupBrokenError(
            f"rank {self.rank} waited for the others in a step, for at most "
            f"{self._timeout_s:g} s: {who} ({_first_line(error)})"
        ) from error

    def _silent_ranks(self) -> list[int]:
        """Return the ranks that do not say that they wait."""
        # The rendezvous is rank 0's; in a file it always answers.
        return self._ask(lambda: self._missing_after("waited", _BLAME_S), _BLAME_S, [0])

    def _ask(
        self, question: Callable[[], list[int]], timeout_s: float, otherwise: list[int]
    ) -> list[int]:
        """Ask the rendezvous, and return ``otherwise`` if it does not answer.

        Over TCP it is rank 0's: when that stands still, a question to it is never answered,
        whatever timeout the store has.
        """
        found: list[list[int]] = []

        def ask() -> None:
            try:
                found.append(question())
            except RuntimeError:
                logger.debug("the rendezvous does not answer", exc_info=True)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(timeout_s + _ANSWER_S)
        return found[0] if found else otherwise

    def _missing_after(self, place: str, timeout_s: float) -> list[int]:
        """Say that this rank came to a place, and return those that do not say so in time."""
        self._store.set(f"{place}/{self.rank}", "")
        deadline = time.monotonic() + timeout_s
        while (missing := self._missing(place)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return missing

    def _wait_for_all(self, what: str, timeout_s: float) -> None:
        self._store.set(f"{what}/{self.rank}", "")
        deadline = time.monotonic() + timeout_s
        while missing := self._missing(what):
            if time.monotonic() > deadline:
                raise StartupError(
                    f"rank {self.rank} waited {timeout_s:g} s for the others at {self._where}: "
                    f"{_named(missing)} did not come",
                    ExitCode.RANKS_APART,
                )
            time.sleep(0.02)

    def _missing(self, what: str) -> list[int]:
        ranks = range(self.world_size)
        return [rank for rank in ranks if not self._store.check([f"{what}/{rank}"])]


def _store(rendezvous: str, rank: int, world_size: int, timeout_s: float) -> Any:
    kind, _, place = rendezvous.partition("://")
    if kind == "file":
        return distributed.FileStore(place, world_size)  # type: ignore[attr-defined]
    if kind != "tcp":
        raise ValueError(f"{rendezvous!r} is neither tcp://host:port nor file:///path")
    host, _, port = place.rpartition(":")
    return distributed.TCPStore(  # type: ignore[attr-defined]
        host.strip("[]"),
        int(port),
        world_size,
        is_master=rank == 0,
        timeout=dt.timedelta(seconds=timeout_s),
    )


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
