"""What a front is told when it begins: one JSON document on its standard input."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import msgspec.structs

from lorax_contract.config import RouterConfig


class FrontPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration of one front."""

    # The router's; what a front has no use for is left out.
    config: RouterConfig
    # Which of the fronts it is, from 1.
    number: int
    # Of the connections, as many as it may have.
    max_connections: int
    model_device_type: str
    # What the model is mainly for, as ``/info`` has it.
    task: str = "generate"
    # Why no adapters are served; None: they are.
    adapter_refusal: str | None
    max_total_tokens: int
    # File descriptors: messages to and from the core, and connections of clients.
    link_fd: int = -1
    connections_fd: int = -1

    def with_descriptors(self, link_fd: int, connections_fd: int) -> FrontPlan:
        """Return the same with its descriptors."""
        return msgspec.structs.replace(self, link_fd=link_fd, connections_fd=connections_fd)

    def to_line(self) -> bytes:
        """Return the document and the end of its line."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> FrontPlan:
        """Read what ``to_line`` wrote."""
        return msgspec.json.decode(line, type=cls)


def shortened(config: RouterConfig) -> RouterConfig:
    """Return a configuration without what may be long and no front asks for."""
    return replace(
        config,
        chat_template=None,
        adapter_aliases=[],
        preloaded_adapter_ids=[],
        ready_fd=None,
        otlp_endpoint=None,
    )
