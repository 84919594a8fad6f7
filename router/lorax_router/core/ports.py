"""The border of the core: the values that cross it, and the shards behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.constraint import Constraint
from lorax_contract.errors import ShardError
from lorax_contract.step import (
    AdapterHandle,
    ShardInfo,
    StepOutcome,
    StepPlan,
    WarmupSpec,
)

__all__ = ["SessionSource", "ShardClient", "ShardSession"]


class ShardClient(Protocol):
    """One rank, or a group that behaves as one.

    Two lanes. *Commit*: ``step`` and ``clear`` carry a sequence number and take
    effect in its order, on all ranks alike; several may be in flight. *Prepare*:
    the adapter calls and ``health`` run beside steps and are not ordered.
    A call that fails raises ShardError or one of its subclasses; what is wrong with
    an adapter is AdapterUnavailableError.
    """

    async def info(self) -> ShardInfo:
        """Return what the shard is."""

    async def warmup(self, spec: WarmupSpec) -> int:
        """Size the KV pool and return its number of blocks."""

    async def step(self, plan: StepPlan) -> StepOutcome:
        """Execute one step; calls are answered in the order of ``plan.seq``."""

    async def clear(self, seq: int) -> None:
        """Drop all rows, in the order of the commit lane."""

    async def take_over(self, epoch: int) -> None:
        """Begin a later epoch: what another router has left goes, model and host copies stay.

        Calls of earlier epochs are refused from then on. ``info`` and ``warmup`` come next.
        """

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        """Have an adapter fetched and verified; raises AdapterUnavailableError."""

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return those of the named tokenizer and template files that a fetched adapter has.

        Raises AdapterUnavailableError; its reason is EVICTED when fetching anew helps.
        """

    async def prepare_adapter(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make an adapter ready on all ranks; a partial failure drops it on all.

        Raises AdapterUnavailableError; its reason is EVICTED when fetching anew helps.
        """

    async def release_adapter(
        self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()
    ) -> None:
        """Free what ``prepare_adapter`` made; the parts to forget leave host and disk too."""

    async def prepare_constraint(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> None:
        """Make a constraint ready for rows with an adapter's tokens, or with the base's.

        Raises ValidationError for one that no output can be bound to.
        """

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return what is prepared and where these parts lie, as the fullest rank has it."""

    async def health(self) -> None:
        """Return if the shard answers and its engine thread is alive."""

    async def lost(self) -> ShardError:
        """Return once the shard is gone, or another incarnation of it answers, and how that shows."""

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True)
class ShardSession:
    """One incarnation of the shard group, warmed up."""

    shards: ShardClient
    info: ShardInfo
    num_blocks: int


class SessionSource(Protocol):
    """Gives the session that comes after one whose shards are lost."""

    # Is told of a loss that no step has shown.
    on_lost: Callable[[ShardError], None]

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is done beside the steps that could end the shards."""

    async def next(self, loss: ShardError) -> ShardSession:
        """Return what serves next, once it is there; raises ShardError when none comes."""

    def use(self, session: ShardSession) -> None:
        """Let it serve."""

    def end(self, error: ShardError) -> None:
        """Nothing serves any more."""
