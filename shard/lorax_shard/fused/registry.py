"""Which elementwise backends there are."""

from __future__ import annotations

from lorax_shard.backend_registry import BackendRegistry
from lorax_shard.fused.backend import ElementwiseBackend

BACKENDS = BackendRegistry[ElementwiseBackend](
    "elementwise",
    {
        "triton": "lorax_shard.fused.triton.backend:TritonElementwise",
        "cpp": "lorax_shard.fused.cpp:CppElementwise",
        "torch": "lorax_shard.fused.reference:TorchElementwise",
    },
    # Triton's interpreter on a CPU is for tests, by name only.
    order={"cpu": ("cpp", "torch")},
    order_elsewhere=("triton", "torch"),
)
