"""Which elementwise backends there are, and the choice between them.

A backend's module is imported only when it is asked about, so that what one backend needs
(a compiler, a GPU library) never burdens the others.
"""

from __future__ import annotations

import importlib
import logging

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fused.backend import ElementwiseBackend

logger = logging.getLogger(__name__)

_CLASSES = {
    "triton": "lorax_shard.fused.triton.backend:TritonElementwise",
    "cpp": "lorax_shard.fused.cpp:CppElementwise",
    "torch": "lorax_shard.fused.reference:TorchElementwise",
}
# Best first. Triton's interpreter on a CPU is for tests, by name only.
_AUTO_ORDER = {"cpu": ("cpp", "torch")}
_AUTO_OTHERS = ("triton", "torch")

BACKENDS = tuple(_CLASSES)


def probe(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why a backend cannot run here, or None when it can."""
    try:
        return _load(name).probe(device, dtype)
    except ImportError as error:
        return f"it needs a package that does not import: {error}"


def create(name: str, device: torch.device, dtype: torch.dtype) -> ElementwiseBackend:
    """Return the named backend, or for ``auto`` the best that can run; log the choice.

    Raises StartupError(BACKEND_UNAVAILABLE) for an unknown name or one that cannot run here.
    """
    if name != "auto" and name not in _CLASSES:
        raise StartupError(
            f"there is no elementwise backend {name!r}; choose auto or one of {', '.join(BACKENDS)}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    refused: list[str] = []
    for each in _AUTO_ORDER.get(device.type, _AUTO_OTHERS) if name == "auto" else (name,):
        reason = probe(each, device, dtype)
        if reason is None:
            skipped = f" (not {'; not '.join(refused)})" if refused else ""
            logger.info("elementwise backend: %s%s", each, skipped)
            return _load(each)()
        refused.append(f"{each}: {reason}")
    raise StartupError(
        f"the elementwise backend cannot run here: {'; '.join(refused)}; use auto or torch",
        ExitCode.BACKEND_UNAVAILABLE,
    )


def _load(name: str) -> type[ElementwiseBackend]:
    module, _, attribute = _CLASSES[name].partition(":")
    loaded: type[ElementwiseBackend] = getattr(importlib.import_module(module), attribute)
    return loaded
