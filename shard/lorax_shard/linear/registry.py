"""Backends by name; ``auto`` is not one of them: install() resolves it once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear.backends import MklBackend, OneDnnBackend, TorchBackend
from lorax_shard.linear.interface import LinearBackend
from lorax_shard.linear.panel import PanelBackend

_CREATORS: dict[str, Callable[[], LinearBackend]] = {
    "torch": TorchBackend,
    "panel": PanelBackend,
    "onednn": OneDnnBackend,
    "mkl": MklBackend,
}


def names() -> tuple[str, ...]:
    """Return the names of all backends."""
    return tuple(_CREATORS)


def create(name: str) -> LinearBackend:
    """Make a backend; raises StartupError (BACKEND_UNAVAILABLE) for an unknown name."""
    if name not in _CREATORS:
        raise StartupError(
            f"there is no linear backend {name!r}. Choose one of auto, {', '.join(_CREATORS)}.",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    return _CREATORS[name]()


def create_runnable(name: str, device: torch.device, dtype: torch.dtype) -> LinearBackend:
    """Make a backend that runs here; raises StartupError (BACKEND_UNAVAILABLE) with the reason."""
    backend = create(name)
    if (reason := backend.why_not(device, dtype)) is not None:
        raise StartupError(
            f"the linear backend {name!r} cannot run: {reason}. Choose 'auto' or 'torch'.",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    return backend
