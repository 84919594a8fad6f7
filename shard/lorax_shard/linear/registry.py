"""Which linear backends there are; which of them is the fastest is measured at load."""

from __future__ import annotations

from lorax_shard.backend_registry import BackendRegistry
from lorax_shard.linear.interface import NamedLinearBackend

BACKENDS = BackendRegistry[NamedLinearBackend](
    "linear",
    {
        "torch": "lorax_shard.linear.backends:TorchBackend",
        "panel": "lorax_shard.linear.panel:PanelBackend",
        "tiles": "lorax_shard.linear.panel:TileBackend",
        "onednn": "lorax_shard.linear.backends:OneDnnBackend",
        "mkl": "lorax_shard.linear.backends:MklBackend",
    },
    # MKL's packing is left out: it serves one row count and costs a copy.
    order={},
    order_elsewhere=("tiles", "panel", "onednn", "torch"),
)
