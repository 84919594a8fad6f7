"""Which LoRA backends there are, and the choice between them.

A backend's module is imported only when it is asked about, so that what one backend needs
(a compiler, a GPU library) never burdens the others.
"""

from __future__ import annotations

import importlib
import logging

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.lora.backend import LoraBackend

logger = logging.getLogger(__name__)

_CLASSES = {
    "triton": "lorax_shard.lora.triton.backend:TritonLora",
    "cpp": "lorax_shard.lora.cpp:CppLora",
    "cpu": "lorax_shard.lora.grouped:GroupedLora",
    "torch": "lorax_shard.lora.reference:TorchLora",
}
# Best first. Triton's interpreter on a CPU is for tests, by name only.
_AUTO_ORDER = {"cpu": ("cpp", "cpu", "torch")}
_AUTO_OTHERS = ("triton", "cpu", "torch")

BACKENDS = tuple(_CLASSES)


def probe(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why a backend cannot run here, or None when it can."""
    try:
        return _load(name).probe(device, dtype)
    except ImportError as error:
        return f"it needs a package that does not import: {error}"


def create(name: str, device: torch.device, dtype: torch.dtype) -> LoraBackend:
    """Return the named backend, or for ``auto`` the best that can run; log the choice.

    Raises StartupError(BACKEND_UNAVAILABLE) for an unknown name or a backend that
    cannot run here.
    """
    if name == "auto":
        return _create_best(device, dtype)
    if name not in _CLASSES:
        raise StartupError(
            f"there is no LoRA backend {name!r}; choose auto or one of {', '.join(BACKENDS)}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    if reason := probe(name, device, dtype):
        raise StartupError(
            f"the LoRA backend {name!r} cannot run here: {reason}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    return _load(name)()


def _create_best(device: torch.device, dtype: torch.dtype) -> LoraBackend:
    refused: list[str] = []
    for name in _AUTO_ORDER.get(device.type, _AUTO_OTHERS):
        reason = probe(name, device, dtype)
        if reason is None:
            skipped = f" (not {'; not '.join(refused)})" if refused else ""
            logger.info("LoRA backend: %s%s", name, skipped)
            return _load(name)()
        refused.append(f"{name}: {reason}")
    raise StartupError(
        f"no LoRA backend can run here: {'; '.join(refused)}", ExitCode.BACKEND_UNAVAILABLE
    )


def _load(name: str) -> type[LoraBackend]:
    module, _, attribute = _CLASSES[name].partition(":")
    loaded: type[LoraBackend] = getattr(importlib.import_module(module), attribute)
    return loaded
