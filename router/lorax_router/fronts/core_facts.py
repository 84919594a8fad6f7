"""What an ingress is told of a core: what it serves, and how much it has to do."""

from __future__ import annotations

import msgspec

from lorax_contract.config import RouterConfig
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.info import ServerInfo


class CoreFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while a core serves, by a RouterConfig's names where it has one."""

    model_id: str
    served_model_names: list[str]
    model_device_type: str
    # What the model is mainly for, as ``/info`` has it.
    task: str = "generate"
    max_total_tokens: int
    max_body_bytes: int
    default_adapter_source: str
    # Why no adapters are served; None: they are.
    adapter_refusal: str | None
    # Whether AskMessage is answered.
    takes_messages: bool = False
    # Whether AskManaged is.
    takes_changes: bool = False
    # Whether NotePreloads is taken.
    takes_preloads: bool = False


class CoreLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How much a core has to do. Adapters are called what ``place_key`` calls them."""

    is_accepting: bool
    num_slots: int
    # On the shards, or on their way.
    resident: list[str]
    num_running: int
    num_queued: int
    # Prompts and the most that may follow, of those that were never admitted.
    num_queued_tokens: int
    # Share of the KV blocks that requests hold.
    kv_in_use: float
    # What each tenant got of it so far, as Scheduler.service_here has it.
    served: dict[str, float] = {}
    # What was taken of quotas so far, by ``kind:tenant`` as Meters has it.
    taken: dict[str, float] = {}
    # In the shards' host memory and not on the device, some seconds ago.
    hosted: list[str] = []
    # What each tenant has waiting for its first step, requests and tokens.
    queued: dict[str, tuple[int, int]] = {}
    # Stands for all that was managed by hand, as ManagedRecord has it; None: nothing is said of it.
    managed: int | None = None


def facts_of(config: RouterConfig, info: ServerInfo, selections: SelectionPolicy) -> CoreFacts:
    """Return what does not change of a router while it serves."""
    return CoreFacts(
        model_id=config.model_id,
        served_model_names=[*config.served_model_names],
        model_device_type=info.model_device_type,
        task=info.task,
        max_total_tokens=info.max_total_tokens,
        max_body_bytes=config.max_body_bytes,
        default_adapter_source=config.default_adapter_source,
        adapter_refusal=selections.refusal,
        takes_messages=True,
        takes_changes=True,
        takes_preloads=True,
    )
