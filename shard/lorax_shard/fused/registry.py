"""Which elementwise backends there are, and the choice between them."""

from __future__ import annotations

import logging

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fused.backend import ElementwiseBackend
from lorax_shard.fused.cpp import CppElementwise
from lorax_shard.fused.reference import TorchElementwise

logger = logging.getLogger(__name__)

# Best first.
_CLASSES: tuple[type[ElementwiseBackend], ...] = (CppElementwise, TorchElementwise)

BACKENDS = tuple(each.name for each in _CLASSES)


def create(name: str, device: torch.device, dtype: torch.dtype) -> ElementwiseBackend:
    """Return the named backend, or for ``auto`` the best that can run; log the choice.

    Raises StartupError(BACKEND_UNAVAILABLE) for an unknown name or one that cannot run here.
    """
    if name != "auto" and name not in BACKENDS:
        raise StartupError(
            f"there is no elementwise backend {name!r}; choose auto or one of {', '.join(BACKENDS)}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    refused: list[str] = []
    for backend in _CLASSES:
        if name not in ("auto", backend.name):
            continue
        reason = backend.probe(device, dtype)
        if reason is None:
            skipped = f" (not {'; not '.join(refused)})" if refused else ""
            logger.info("elementwise backend: %s%s", backend.name, skipped)
            return backend()
        refused.append(f"{backend.name}: {reason}")
    raise StartupError(
        f"the elementwise backend cannot run here: {'; '.join(refused)}. Choose 'auto' or 'torch'.",
        ExitCode.BACKEND_UNAVAILABLE,
    )
