"""What a service of server groups is, and what is known of each group: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class GroupState(Enum):
    """Where a group is in its life."""

    # Its machine is not chosen yet: it waits for room in the cluster.
    PLACING = "placing"
    # Its server loads the model.
    STARTING = "starting"
    READY = "ready"
    # It was told to end, and finishes what it has.
    DRAINING = "draining"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """What each server group of a service is started with."""

    # Of lorax-launcher, but for its addresses.
    options: tuple[str, ...]
    # What it takes of a machine.
    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    # Machines that share its model, a rank on each; what it takes is taken of each.
    num_nodes: int = 1
    # Where adapters are kept on each machine.
    store_dir: str
    # A folder of that name on each machine, with certificates for links between machines.
    tls_dir: str | None = None
    # The address of the ingress' machine: groups there may be reached without certificates.
    ingress_host: str = "127.0.0.1"
    # Counts upgrades: what has a lower number is replaced.
    generation: int = 1

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray keeps for a group on each machine, by the names of its resources."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressSpec:
    """What each ingress of a service is started with."""

    hostname: str
    port: int
    # How many there are: on several machines where links between them are possible.
    number: int = 1
    tls_dir: str | None = None
    # More of lorax-ingress.
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """What an operator wants."""

    group: GroupSpec
    num_ingresses: int = 1
    # Replicas: as many, or between as many by what there is to do.
    least: int = 1
    most: int = 1


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """How much a group has to do."""

    num_running: int = 0
    num_queued: int = 0
    # Share of its KV blocks that requests hold, from 0 to 1.
    kv_in_use: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """What a group says of itself."""

    state: GroupState
    # The specification that it was started with.
    spec: GroupSpec
    # The machine that it is on, as Ray calls it, and its address.
    node: str = ""
    host: str = ""
    # Where an ingress attaches; empty until it is ready. On its machine alone: its HTTP, its metrics.
    uri: str = ""
    url: str = ""
    metrics: str = ""
    load: GroupLoad = GroupLoad()
    # What its server said last that was wrong.
    error: str = ""
