"""Tokens that a device draws, on their way to the host."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from lorax_shard.sampling.sampled import NO_TOKEN, SampledTokens
from lorax_shard.transfer import to_host


class DeviceTokens:
    """Tokens of one batch on their way from a device; implements Draws.

    Args:
        on_device: the ids, -1 for rows without a token; int64.
        found: numbers that say what was drawn.
        understand: makes tokens of these, once they are on the host.
    """

    def __init__(
        self,
        on_device: torch.Tensor,
        found: torch.Tensor,
        understand: Callable[[torch.Tensor], SampledTokens],
    ) -> None:
        self.on_device = on_device
        self._understand = understand
        self._failed: dict[int, str] = {}
        self._lock = threading.Lock()
        self._tokens: SampledTokens | None = None
        self._found, self._arrived = to_host(found)

    def fail(self, index: int, reason: str) -> None:
        """Let a row have no token; comes before anybody reads."""
        self._failed[index] = reason
        self.on_device[index] = NO_TOKEN

    def read(self) -> SampledTokens:
        """Return the tokens, once they are there; any thread."""
        with self._lock:
            if self._tokens is None:
                if self._arrived is not None:
                    self._arrived.synchronize()
                self._tokens = self._understand(self._found)
                for index, reason in self._failed.items():
                    self._tokens.fail(index, reason)
            return self._tokens
