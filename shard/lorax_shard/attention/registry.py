"""Which attention backends there are, and the choice between them.

A backend's module is imported only when it is asked about, so that what one
backend needs (a compiler, a GPU library) never burdens the others.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.attention.backend import AttentionBackend, AttentionLayer

logger = logging.getLogger(__name__)

_CLASSES = {
    "flash": "lorax_shard.attention.flash.backend:FlashAttention",
    "triton": "lorax_shard.attention.triton.backend:TritonAttention",
    "cpp": "lorax_shard.attention.cpp:CppAttention",
    "sdpa": "lorax_shard.attention.sdpa:SdpaAttention",
    "torch": "lorax_shard.attention.reference:TorchAttention",
}
# Best first. Triton's interpreter on a CPU is for tests, by name only.
_AUTO_ORDER = {"cpu": ("cpp", "sdpa", "torch")}
_AUTO_OTHERS = ("flash", "triton", "sdpa", "torch")

BACKENDS = tuple(_CLASSES)


def probe(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why a backend cannot run here, or None when it can."""
    try:
        return _load(name).probe(device, dtype)
    except ImportError as error:
        return f"it needs a package that does not import: {error}"


def create(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    layers: Collection[AttentionLayer] | None = None,
) -> AttentionBackend:
    """Return the named backend, or for ``auto`` the best that can run; log the choice.

    A backend that is chosen computes all ``layers``. Where they are not known, ``auto`` passes
    over backends that compute only some layers. Raises StartupError(BACKEND_UNAVAILABLE) for an
    unknown name or a backend that cannot run here or cannot compute a layer.
    """
    if name == "auto":
        return _create_best(device, dtype, layers)
    if name not in _CLASSES:
        raise StartupError(
            f"there is no attention backend {name!r}; choose auto or one of {', '.join(BACKENDS)}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    if reason := probe(name, device, dtype) or _refusal(name, device, dtype, layers or ()):
        raise StartupError(
            f"the attention backend {name!r} cannot run here: {reason}",
            ExitCode.BACKEND_UNAVAILABLE,
        )
    return _load(name)()


def _create_best(
    device: torch.device, dtype: torch.dtype, layers: Collection[AttentionLayer] | None
) -> AttentionBackend:
    refused: list[str] = []
    for name in _AUTO_ORDER.get(device.type, _AUTO_OTHERS):
        reason = probe(name, device, dtype)
        if reason is None:
            reason = _doubt(name) if layers is None else _refusal(name, device, dtype, layers)
        if reason is None:
            skipped = f" (not {'; not '.join(refused)})" if refused else ""
            logger.info("attention backend: %s%s", name, skipped)
            return _load(name)()
        refused.append(f"{name}: {reason}")
    raise StartupError(
        f"no attention backend can run here: {'; '.join(refused)}", ExitCode.BACKEND_UNAVAILABLE
    )


def _doubt(name: str) -> str | None:
    return "it computes some layers only" if _load(name).is_partial else None


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, layers: Collection[AttentionLayer]
) -> str | None:
    """Return in words why a backend cannot compute one of the layers, or None."""
    backend = _load(name)
    # Most layers of a model are alike: each kind is asked about once.
    refusals = (backend.supports(layer, device, dtype) for layer in dict.fromkeys(layers))
    return next((reason for reason in refusals if reason is not None), None)


def _load(name: str) -> type[AttentionBackend]:
    module, _, attribute = _CLASSES[name].partition(":")
    loaded: type[AttentionBackend] = getattr(importlib.import_module(module), attribute)
    return loaded
