"""Which LoRA backends there are."""

from __future__ import annotations

from lorax_shard.backend_registry import BackendRegistry
from lorax_shard.lora.backend import LoraBackend

BACKENDS = BackendRegistry[LoraBackend](
    "LoRA",
    {
        "triton": "lorax_shard.lora.triton.backend:TritonLora",
        "cpp": "lorax_shard.lora.cpp:CppLora",
        "cpu": "lorax_shard.lora.grouped:GroupedLora",
        "torch": "lorax_shard.lora.reference:TorchLora",
    },
    # Triton's interpreter on a CPU is for tests, by name only.
    order={"cpu": ("cpp", "cpu", "torch")},
    order_elsewhere=("triton", "cpu", "torch"),
)
