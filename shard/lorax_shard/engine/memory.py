"""Sizes the KV pool: what the largest step leaves free, and how many blocks fit there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec
from lorax_shard.model.interface import PagedModel

logger = logging.getLogger(__name__)

_SAMPLE_INTERVAL_S = 0.002
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How the KV pool is sized."""

    block_size: int
    # Share of the free memory that the pool may take.
    memory_fraction: float
    # A fixed number of blocks; None: as many as fit.
    num_blocks: int | None = None
    # Share of the free memory that is kept for adapters.
    adapter_fraction: float = 0.0
    # How many ranks share the memory of this one's device.
    ranks_on_device: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The blocks of the pool, and what the memory goes to, as (name, bytes)."""

    num_blocks: int
    items: tuple[tuple[str, int], ...]
    # Bytes that are kept for adapters.
    adapter_bytes: int = 0


def size_pool(
    model: PagedModel, settings: PoolSettings, spec: WarmupSpec, run_step: Callable[[], None]
) -> MemoryPlan:
    """Run the largest step by ``run_step`` and return the plan; the model is left without a cache.

    StartupError (OUT_OF_MEMORY) when the step or one request of the required length
    does not fit.
    """
    too_large = (
        f"the memory does not suffice for a step of {spec.max_step_tokens} tokens in "
        f"{spec.max_rows} rows; lower --max-batch-prefill-tokens or --max-batch-size"
    )
    try:
        with explained(too_large):
            peak = measure_peak(model.device, run_step)
    finally:
        model.free_cache()
    free = max(0, free_bytes(model.device) // settings.ranks_on_device - peak)
    adapter_bytes = int(free * settings.adapter_fraction)
    num_blocks = _num_blocks(model, settings, spec, free - adapter_bytes)
    cache_bytes = num_blocks * model.block_bytes(settings.block_size)
    items = (
        ("weights", model.weight_bytes),
        ("activations", peak),
        ("kv cache", cache_bytes),
        ("adapters", adapter_bytes),
    )
    logger.info(
        "KV pool of %d blocks (%d tokens)",
        num_blocks,
        num_blocks * settings.block_size,
        extra={"fields": {"memory": dict(items)}},
    )
    return MemoryPlan(num_blocks=num_blocks, items=items, adapter_bytes=adapter_bytes)


def _num_blocks(model: PagedModel, settings: PoolSettings, spec: WarmupSpec, free: int) -> int:
    block_bytes = model.block_bytes(settings.block_size)
    if settings.num_blocks is not None:
        if settings.num_blocks * block_bytes > free:
            raise _too_little(settings.num_blocks, block_bytes, free)
        return settings.num_blocks
    budget = int(free * settings.memory_fraction)
    fitting = budget // block_bytes
    needed = -(-(spec.required_tokens or spec.max_total_tokens) // settings.block_size)
    if spec.max_blocks:
        fitting, needed = min(fitting, spec.max_blocks), min(needed, spec.max_blocks)
    if fitting < max(needed, 1):
        raise _too_little(max(needed, 1), block_bytes, budget)
    return fitting


def _too_little(num_blocks: int, block_bytes: int, free: int) -> StartupError:
    return StartupError(
        f"the KV cache needs {num_blocks} blocks of {block_bytes} bytes "
        f"({num_blocks * block_bytes / 2**20:.0f} MiB), but only {free / 2**20:.0f} MiB are left "
        "for it; lower --max-total-tokens or raise --kv-memory-fraction",
        ExitCode.OUT_OF_MEMORY,
    )


def measure_peak(device: torch.device, run: Callable[[], None]) -> int:
    """Return by how many bytes the memory in use rose at most while ``run`` ran."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_INTERVAL_S):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, name="memory-watch", daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return int(max(peak, process.memory_info().rss) - before)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process could still take on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min(int(psutil.virtual_memory().available), _cgroup_free_bytes())


def _cgroup_free_bytes() -> int:
    """Return what the container's limit leaves; a huge number when there is no limit."""
    for limit_file, usage_file, reclaimable in _CGROUP_FILES:
        try:
            limit, usage = int(Path(limit_file).read_text()), int(Path(usage_file).read_text())
            stat = Path(usage_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # no such cgroup, or a limit of "max"
            continue
        pages = dict(line.split() for line in stat.splitlines())
        return max(0, limit - usage + int(pages.get(reclaimable, 0)))
    return 2**62


@contextmanager
def explained(text: str) -> Iterator[None]:
    """Turn a lack of memory within into a StartupError (OUT_OF_MEMORY) with this text."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StartupError(text, ExitCode.OUT_OF_MEMORY) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
