"""The simulated server: its sizes and speeds, and presets with the arithmetic behind them."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_contract.config import Batching
from lorax_router.core.cost import LinearCost


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedServer:
    """What takes the place of shards, devices and links."""

    name: str
    cost: LinearCost
    # The KV pool, in tokens; what one block holds.
    kv_tokens: int
    block_size: int = 16
    max_step_tokens: int = 2048
    max_rows: int = 256
    # How steps are composed; as the server's options of these names.
    batching: Batching = "mixed"
    max_waiting_tokens: int = 20
    max_kv_read: int | None = None
    max_partial_prompts: int = 1
    target_itl_ms: float | None = None
    # Plans that may be unapplied.
    depth: int = 2
    # What the host needs between a step's outcome and the next step, where nothing hides it.
    host_s: float = 0.0005
    # Slots for adapters and the bytes that they may take; None: only slots count.
    max_adapters: int = 32
    adapter_pool_bytes: int | None = None
    cycle_time_s: float = 2.0
    # An adapter's bytes for each of its ranks.
    bytes_per_rank: int = 0
    # Bringing one: a fixed time and its bytes over the link, so many at once.
    load_fixed_s: float = 0.005
    link_bytes_per_s: float = 12e9
    load_concurrency: int = 1
    # A token's bytes in the KV pool; host memory for blocks that leave it, over the same link.
    kv_token_bytes: int = 0
    swap_bytes: int = 0
    # How the figures come about.
    arithmetic: str = ""

    @property
    def num_blocks(self) -> int:
        """Whole blocks of the pool."""
        return self.kv_tokens // self.block_size

    @property
    def num_host_blocks(self) -> int:
        """Whole blocks of host memory."""
        return self.swap_bytes // (self.block_size * self.kv_token_bytes) if self.swap_bytes else 0

    @property
    def block_move_s(self) -> float:
        """What a block takes over the link, one way."""
        return self.block_size * self.kv_token_bytes / self.link_bytes_per_s

    def load_seconds(self, nbytes: int) -> float:
        """Return how long bringing an adapter takes."""
        return self.load_fixed_s + nbytes / self.link_bytes_per_s


_A10G = SimulatedServer(
    name="llama-2-7b-a10g",
    cost=LinearCost(0.030, 2.4e-4, 1.1e-6, 2.1e-12, 3.7e-7),
    # VTC's own pool for this pair.
    kv_tokens=10_000,
    kv_token_bytes=524_288,
    bytes_per_rank=2_097_152,
    link_bytes_per_s=12e9,
    arithmetic="""\
Llama-2-7B in float16 on an A10G (600 GB/s, 70 TFLOP/s dense), at 80 % of both:
fixed: 13.5 GB of weights / 480 GB/s = 28 ms, 2 ms of launches -> 30 ms
token: 2 x 6.74e9 FLOP / 56 TFLOP/s = 0.24 ms
KV token: 2 x 32 layers x 4096 x 2 B = 524 kB / 480 GB/s = 1.1 us
adapter byte: 1 / 480 GB/s = 2.1 ps
token x rank: q, k, v, o: 32 x 4 x (4096 + 4096) = 1.05 M values a rank (2.1 MB), 2.1 MFLOP at a
tenth of the matrix rate = 0.37 us
pool: 10,000 tokens, as VTC's evaluation; link: PCIe 4.0 at 12 GB/s""",
)
_H200 = SimulatedServer(
    name="llama-3.1-8b-h200",
    cost=LinearCost(0.0041, 2.3e-5, 3.0e-8, 2.3e-13, 6.6e-8),
    kv_tokens=800_000,
    kv_token_bytes=131_072,
    max_step_tokens=8192,
    max_adapters=64,
    bytes_per_rank=5_242_880,
    link_bytes_per_s=40e9,
    arithmetic="""\
Llama-3.1-8B in bfloat16 on an H200, at its measured copy rate of 4.3 TB/s and 90 % of its measured
matrix rate of 790 TFLOP/s:
fixed: 16.1 GB of weights / 4.3 TB/s = 3.7 ms, 0.4 ms of launches -> 4.1 ms
token: 2 x 8.03e9 FLOP / 711 TFLOP/s = 23 us
KV token: 2 x 32 layers x 8 heads x 128 x 2 B = 131 kB / 4.3 TB/s = 30 ns
adapter byte: 1 / 4.3 TB/s = 0.23 ps
token x rank: all seven linears: 2.6 M values a rank (5.2 MB), 5.2 MFLOP at a tenth of the matrix
rate = 66 ns
pool: (0.9 x 149 GB - 16.1 GB - 12 GB for adapters and the largest step) / 131 kB = 800,000 tokens;
link: PCIe 5.0 at 40 GB/s""",
)
_CPU = SimulatedServer(
    name="smollm2-135m-cpu",
    cost=LinearCost(0.068, 1.97e-3, 2.4e-6, 5.3e-11, 3.0e-5),
    kv_tokens=32_768,
    kv_token_bytes=46_080,
    max_step_tokens=512,
    max_rows=64,
    depth=1,
    bytes_per_rank=1_221_120,
    load_fixed_s=0.02,
    link_bytes_per_s=5e9,
    arithmetic="""\
SmolLM2-135M in float32 on two cores of a Cascade Lake server:
fixed and token: the line through measured decode steps of 1, 8, 32 and 64 rows, which took 53, 94,
148 and 185 ms -> 68 ms + 1.97 ms a row
KV token: 2 x 30 layers x 3 heads x 64 x 4 B = 46 kB / 19 GB/s = 2.4 us
adapter byte: 1 / 19 GB/s = 53 ps
token x rank: all seven linears: 305,280 values a rank (1.2 MB), 0.61 MFLOP at a tenth of the
measured 207 GFLOP/s = 30 us
link: a host copy at 5 GB/s, 20 ms to parse""",
)

PRESETS = {server.name: server for server in (_A10G, _H200, _CPU)}
