"""The router's record of a request: the only truth about it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from lorax_contract.errors import ValidationError
from lorax_contract.step import BlockId, NewRow, OutputKind, RequestId, RequestSpec
from lorax_router.core.tenant_limits import NO_LIMITS, TenantLimits


class Status(Enum):
    """Where a request stands. A preempted request is WAITING again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """On what terms a request asks for its turn: who asks, and how urgent it is."""

    tenant: str = ""
    # The tenant's share beside those of others.
    weight: float = 1.0
    # A smaller one goes first.
    priority: int = 0
    # Prefixes are cached apart by it: the time of a hit tells what others asked.
    cache_salt: str = ""
    # When its last token is to be there, on the clock that steps are planned by.
    deadline: float = math.inf
    # What its tenant may have waiting and may hold.
    limits: TenantLimits = NO_LIMITS


ANY_TERMS = RequestTerms()


class RequestState:
    """One request: what is known, what is computed, and what is on its way.

    ::

        known tokens   = prompt + applied output
        num_computed   <= num_scheduled <= known + num_pending
        └ KV of applied   └ KV after all        └ reports on their way: tokens sampled
          steps             steps in flight       by steps that are not applied yet

    A request without output tokens has one report too, of its end: nothing is known to be
    computed after it, so it needs no other care.

    Owned by the Scheduler; nobody else writes to it.
    """

    __slots__ = (
        "adapter_content",
        "block_keys",
        "blocks",
        "decode_row",
        "has_turn",
        "host_blocks",
        "incarnation",
        "is_drafted",
        "is_long",
        "is_patient",
        "is_suspect",
        "is_unindexed",
        "last_step",
        "matched",
        "matched_tail",
        "num_ahead",
        "num_announced",
        "num_bypassed",
        "num_cached",
        "num_charged",
        "num_computed",
        "num_ever_computed",
        "num_indexed",
        "num_kv_tokens",
        "num_pending",
        "num_preemptions",
        "num_returns",
        "num_scheduled",
        "num_swapped",
        "num_tokens",
        "order",
        "output_ids",
        "rank",
        "request_id",
        "spec",
        "status",
        "submitted_at",
        "terms",
    )  # fmt: skip

    def __init__(
        self,
        spec: RequestSpec,
        order: int,
        now: float,
        terms: RequestTerms = ANY_TERMS,
        content: str = "",
    ) -> None:
        self.spec = spec
        self.terms = terms
        # Equal for adapters that compute the same.
        self.adapter_content: Hashable = content or spec.adapter
        self.request_id: RequestId = spec.request_id
        self.num_kv_tokens = spec.num_kv_tokens
        self.order = order
        # The policy's own: what goes before the order of arrival.
        self.rank = 0.0
        # The policy's own, too: that more urgent ones may come while a step with its prompt runs.
        self.is_patient = False
        # And that it has what it needs all the same.
        self.has_turn = False
        # Whether it may be to blame for a pass that failed: it is nobody's victim until that is known.
        self.is_suspect = False
        self.submitted_at = now
        self.status = Status.WAITING
        self.output_ids: list[int] = [*spec.resumed_ids]
        self.num_tokens = len(spec.prompt_ids) + len(spec.resumed_ids)
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_pending = 0
        self.blocks: list[BlockId] = []
        # The prefix index's own: keys of its full blocks; how many of them are in the index, or
        # are left out of it; whether the rest stays out; how many it said it would compute.
        self.block_keys: list[int] = []
        self.num_indexed = 0
        self.is_unindexed = False
        self.num_announced = 0
        # The same's: blocks found while the request waits, and what stands for the last of them.
        self.matched: list[BlockId] = []
        self.matched_tail: Any = None
        self.num_returns = 0
        # While it waits swapped out: the host blocks that hold its first tokens, and how many.
        self.host_blocks: list[int] = []
        self.num_swapped = 0
        # Tokens of this residence that were in the cache.
        self.num_cached = 0
        # Whether a step computed more of it than was planned: those in flight may be too many then.
        self.is_drafted = False
        # Whether its prompt did not fit into the step in which it entered.
        self.is_long = False
        # For how many tokens beyond the scheduled ones it may have blocks.
        self.num_ahead = 0
        # The last step that touches this request's row.
        self.last_step = 0
        # Counts residences, so that a late outcome is not booked on a later one.
        self.incarnation = 0
        # The builder's own: its row in a step that computes one token and is reported of. It is the
        # same in each such step until the request begins anew.
        self.decode_row: Any = None
        self.num_preemptions = 0
        # The policy's own: of how many of its tokens a tenant's share was charged.
        self.num_charged = 0
        # The most that was computed in an earlier residence.
        self.num_ever_computed = 0
        # How many later requests were admitted while this one did not fit.
        self.num_bypassed = 0

    @property
    def num_to_schedule(self) -> int:
        """Tokens that the next step could compute; none once the last report is on its way."""
        return min(self.num_tokens + self.num_pending, self.num_kv_tokens) - self.num_scheduled

    @property
    def was_admitted(self) -> bool:
        """Whether it runs, or has run and gave way."""
        return self.status is not Status.WAITING or self.incarnation > 0

    def as_new_row(self) -> NewRow:
        """Return what a shard must know to (re)build the row."""
        return NewRow(self.spec, tuple(self.output_ids), self.num_cached)

    def known_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Return some of the ids of prompt and output."""
        prompt = self.spec.prompt_ids
        num_prompt = len(prompt)
        if stop <= num_prompt:
            return tuple(prompt[start:stop])
        if start >= num_prompt:
            return tuple(self.output_ids[start - num_prompt : stop - num_prompt])
        return (*prompt[start:], *self.output_ids[: stop - num_prompt])

    def reset_computed(self) -> None:
        """Forget the KV: the next residence computes everything again."""
        self.blocks = []
        self.num_ever_computed = max(self.num_ever_computed, self.num_computed)
        self.num_computed = 0
        self.num_scheduled = 0
        self.num_cached = self.num_indexed = 0
        self.is_unindexed = self.is_suspect = False
        self._begin_anew()

    def undo_scheduled(self) -> None:
        """Nothing of what steps in flight were to compute was: a row that enters anew will do it.

        It keeps its blocks, those for what is undone among them.
        """
        self.num_ahead += self.num_scheduled - self.num_computed
        self.num_scheduled = self.num_cached = self.num_computed
        self.is_suspect = True
        self._begin_anew()

    def finish(self) -> None:
        """It has ended, and holds nothing any more."""
        self.status = Status.FINISHED
        self.blocks = []
        # Which names the request itself: it would go with the next collection of garbage only.
        self.decode_row = None

    def _begin_anew(self) -> None:
        self.incarnation += 1
        self.decode_row = None

    def begin(self, blocks: list[BlockId], num_indexed: int, num_tokens: int) -> None:
        """Begin with blocks that hold so many tokens; the first ones are in the index."""
        self.blocks = blocks
        self.num_cached = self.num_computed = self.num_scheduled = num_tokens
        self.num_indexed = num_indexed
        self.matched, self.matched_tail = [], None

    def check(self, num_pending: int, room: int, block_size: int) -> None:
        """Raise AssertionError if an invariant broke.

        ``num_pending`` as the steps have it; ``room``: tokens that its blocks hold, those included
        that it has been placed for.
        """
        known = len(self.spec.prompt_ids) + len(self.output_ids)
        max_reports = max(self.spec.stopping.max_new_tokens, 1)
        surplus = max(num_pending - 1, 0) if self.is_drafted else 0
        facts = {
            "known tokens": self.num_tokens == known,
            "pending tokens": self.num_pending == num_pending,
            "computed <= scheduled": self.num_computed <= self.num_scheduled,
            "scheduled <= known + pending": self.num_scheduled <= known + num_pending,
            "scheduled tokens have blocks": self.num_scheduled <= room,
            "no block too many": room - self.num_scheduled < block_size + self.num_ahead,
            "scheduled tokens are wanted": self.num_scheduled <= self.num_kv_tokens + surplus,
            "output limit": len(self.output_ids) + num_pending <= max_reports + surplus,
            "waiting holds nothing": self.status is Status.RUNNING or room == 0,
            "running is not swapped": self.status is Status.WAITING or not self.host_blocks,
            "swapped is known": self.num_swapped < known + num_pending,
        }
        if broken := [name for name, holds in facts.items() if not holds]:
            raise AssertionError(f"request {self.request_id}: {', '.join(broken)}")


# The order in which requests are admitted, and in which they give way from its end.
rank_of = attrgetter("rank", "order")


def refuse_impossible(spec: RequestSpec, num_blocks: int, block_size: int) -> None:
    """Raise ValidationError when a request could not even run alone in the empty pool."""
    if not spec.prompt_ids:
        raise ValidationError("`inputs` must have at least one token")
    if spec.output is OutputKind.TOKENS and spec.stopping.max_new_tokens < 1:
        raise ValidationError("`max_new_tokens` must be at least 1")
    if spec.output is not OutputKind.TOKENS and spec.stopping.max_new_tokens:
        raise ValidationError("`max_new_tokens` must be 0 where no tokens are asked for")
    if spec.resumed_ids and len(spec.resumed_ids) >= spec.stopping.max_new_tokens:
        raise ValidationError(
            f"an output that goes on has {len(spec.resumed_ids)} tokens already; `max_new_tokens` "
            f"is {spec.stopping.max_new_tokens}"
        )
    if -(-spec.num_kv_tokens // block_size) > num_blocks:
        raise ValidationError(
            f"{len(spec.prompt_ids)} prompt tokens and {spec.stopping.max_new_tokens} new "
            f"tokens need more than the {num_blocks * block_size} tokens that the KV cache holds; "
            "shorten the prompt or lower `max_new_tokens`"
        )


def refuse_longer(spec: RequestSpec, most: int) -> None:
    """Raise ValidationError for a prompt that no step has room for as a whole."""
    if len(spec.prompt_ids) > most:
        raise ValidationError(
            f"a prompt of {len(spec.prompt_ids)} tokens does not fit in a step of at most {most}, "
            "and an encoder computes it at once; shorten it"
        )
