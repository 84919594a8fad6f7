"""What the router is told of replicas and requests, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """What a replica said of itself; it is old when it comes.

    Adapters are named by keys that are equal for equal content on all replicas.
    """

    name: str
    # When it was true, on the router's clock: when the replica was asked, not when it answered.
    taken_at: float
    # Whether it takes new requests: false while it starts, drains or stands still.
    is_accepting: bool = True
    # How much it can do beside others; what is compared is work by capacity.
    capacity: float = 1.0
    # Adapters that fit on the device at once; those that are there, those in host memory.
    num_slots: int = 1
    resident: frozenset[str] = frozenset()
    hosted: frozenset[str] = frozenset()
    num_running: int = 0
    num_queued: int = 0
    # Tokens of the prompts of those that are queued; 0 where that is not known.
    num_queued_tokens: int = 0
    # Share of its KV blocks that requests hold, from 0 to 1.
    kv_in_use: float = 0.0


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What matters of a request for where it goes."""

    # None: the base model.
    adapter: str | None = None
    tenant: str = ""
    num_prompt_tokens: int = 0
    # A hash of all tokens up to the end of each of its first full blocks, in their order.
    prefix: tuple[bytes, ...] = ()
    # Whether a replica may load the adapter before anybody asks it for it.
    can_preload: bool = False


class RouteReason(Enum):
    """Why a request goes where it goes: a label of metrics."""

    # Its first blocks are in the cache there.
    PREFIX = "prefix"
    # Its adapter is on the device there.
    RESIDENT = "resident"
    # Its adapter is nowhere, or in host memory there: this is a home of it.
    HOME = "home"
    HOST = "host"
    # Its adapter has more traffic than its homes should take: this is a new one.
    SPREAD = "spread"
    # No home takes it: all have far more work than others.
    OVERFLOW = "overflow"
    # It needs no adapter: of two the one with less work.
    LOAD = "load"


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """Where a request goes, and why."""

    replica: str
    reason: RouteReason
    # Who is to load the adapter meanwhile, and has requests for it from then on.
    preload_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """The constants of the policy; the defaults are those that docs/scaling.md is measured with."""

    # A replica takes what is sent to it while its work is at most (1 + tolerance) times the mean,
    # plus the slack, in requests of a short prompt.
    tolerance: float = 0.15
    slack: float = 2.0
    # Tokens of a prompt that are as much work as a request besides.
    prompt_unit: int = 256
    # An adapter that nobody has any more goes to a replica that gives up no more than one that so
    # many requests of late asked for, old ones in part; so many times the bound is allowed for it.
    cheap: float = 1.0
    far: float = 1.5
    # One that others have, too, is worth what is asked for so many times less than it; beyond so
    # many times the bound, what is asked for so many times less.
    copy_gain: float = 64.0
    urgent: float = 3.0
    urgent_gain: float = 8.0
    # Requests of one adapter on a replica that is far beyond the bound, from which on free slots are
    # for it, even while others may still come that need them.
    many: int = 6
    # So many requests is an adapter worth that a request has to wait for, until its first token.
    load_work: float = 3.0
    # An adapter may fill this part of a home: with more traffic it has more homes.
    home_share: float = 0.3
    # It loses one only when its traffic is below this part of what would need it.
    shrink_at: float = 0.7
    # Seconds after which past traffic counts half.
    half_life_s: float = 20.0
    # Homes that an adapter which is nowhere may go to: the one with less work takes it.
    num_choices: int = 3
    # Blocks of a prefix from which on it decides, and those that are looked at.
    min_prefix_blocks: int = 4
    max_prefix_blocks: int = 64
    # What is remembered: blocks of prefixes; adapters with traffic; adapters with ranked homes.
    max_prefixes: int = 100_000
    max_rates: int = 100_000
    # Whether homes load adapters before requests come; how long these go on where the adapter is.
    # Those with so many requests of late count, at most so many of them, the hottest.
    preloads: bool = True
    patience_s: float = 5.0
    preload_from: float = 1.0
    max_preloads: int = 1_000
    max_ranked: int = 20_000
