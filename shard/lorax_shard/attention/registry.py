"""Which attention backends there are, and the choice between them."""

from __future__ import annotations

from collections.abc import Collection

import torch

from lorax_shard.attention.backend import AttentionBackend, AttentionLayer
from lorax_shard.backend_registry import BackendRegistry

BACKENDS = BackendRegistry[AttentionBackend](
    "attention",
    {
        "flash": "lorax_shard.attention.flash.backend:FlashAttention",
        "triton": "lorax_shard.attention.triton.backend:TritonAttention",
        "tiles": "lorax_shard.attention.cpp:TileAttention",
        "cpp": "lorax_shard.attention.cpp:CppAttention",
        "sdpa": "lorax_shard.attention.sdpa:SdpaAttention",
        "torch": "lorax_shard.attention.reference:TorchAttention",
    },
    # Triton's interpreter on a CPU is for tests, by name only.
    order={"cpu": ("tiles", "cpp", "sdpa", "torch")},
    order_elsewhere=("flash", "triton", "sdpa", "torch"),
)


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

    def refusal(backend: type[AttentionBackend]) -> str | None:
        if layers is None:
            is_doubtful = name == "auto" and backend.is_partial
            return "it computes some layers only" if is_doubtful else None
        # Most layers of a model are alike: each kind is asked about once.
        refusals = (backend.supports(layer, device, dtype) for layer in dict.fromkeys(layers))
        return next((reason for reason in refusals if reason is not None), None)

    return BACKENDS.create(name, device, dtype, refusal)
