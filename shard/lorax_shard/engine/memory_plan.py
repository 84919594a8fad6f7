"""How a rank divides its device's memory. Pure: measured bytes in, a plan or a refusal out.

    what one rank may take  =  min(free / ranks, total x device_fraction / ranks - taken)
      less the activations of the largest step, and graphs
        adapters            =  x adapter_fraction
        KV cache            =  x memory_fraction of what adapters leave, in whole blocks
        unused              =  the rest

``free`` and ``taken`` are measured with the weights loaded, so that no share counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """How the KV pool is sized."""

    block_size: int
    # Share that the pool may take of what the largest step and adapters leave.
    memory_fraction: float
    # A fixed number of blocks; None: as many as fit.
    num_blocks: int | None = None
    # Share that is kept for adapters of what the largest step leaves.
    adapter_fraction: float = 0.0
    # Share of the whole device that the ranks on it may take together.
    device_fraction: float = 1.0
    # How many ranks share the memory of this one's device.
    ranks_on_device: int = 1
    # Rank of the adapters that take part in the largest step; 0: none do.
    max_adapter_rank: int = 0
    # Host memory of each rank for blocks that leave the pool.
    swap_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMemory:
    """Bytes of a device while the weights are loaded and there is no KV pool."""

    total: int
    # What nobody has taken, of the whole device.
    free: int
    # What this rank has taken, its weights included; 0 where ``device_fraction`` is 1.
    taken: int
    weights: int
    # What the largest step takes beside the cache and adapters.
    activations: int = 0
    graphs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The blocks of the pool, and what the memory goes to, as (name, bytes)."""

    num_blocks: int
    items: tuple[tuple[str, int], ...]
    # Bytes that are kept for adapters.
    adapter_bytes: int = 0
    block_bytes: int = 0

    def with_blocks(self, num_blocks: int) -> MemoryPlan:
        """Return the plan of a pool of so many blocks: what it leaves is unused."""
        cache = num_blocks * self.block_bytes
        items = dict(self.items)
        if "kv_cache" in items:
            items["unused"] += items["kv_cache"] - cache
            items["kv_cache"] = cache
        return replace(self, num_blocks=num_blocks, items=tuple(items.items()))


def plan_memory(
    measured: MeasuredMemory, settings: PoolSettings, spec: WarmupSpec, block_bytes: int
) -> MemoryPlan:
    """Divide what is free; the module's docstring says how.

    StartupError (OUT_OF_MEMORY) when the pool does not hold one request of the required length,
    or ``settings.num_blocks``; it names what to change, and to which value.
    """
    found = _Division.of(measured, settings)
    num_blocks = _num_blocks(found, settings, spec, block_bytes)
    if num_blocks is None:
        raise StartupError(_refusal(measured, settings, spec, block_bytes), ExitCode.OUT_OF_MEMORY)
    cache = num_blocks * block_bytes
    items = {
        "weights": measured.weights,
        "activations": measured.activations,
        "graphs": measured.graphs,
        "adapters": found.adapters,
        "kv_cache": cache,
        "unused": found.rest - cache,
    }
    return MemoryPlan(
        num_blocks=num_blocks,
        items=tuple(items.items()),
        adapter_bytes=found.adapters,
        block_bytes=block_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Division:
    """Bytes of one rank."""

    # May still be taken.
    budget: int
    # Whether that is by ``device_fraction``, and more is free.
    is_capped: bool
    # Left by the largest step; negative if it does not fit.
    remaining: int
    adapters: int
    # Left by adapters.
    rest: int

    @classmethod
    def of(cls, measured: MeasuredMemory, settings: PoolSettings) -> _Division:
        free = measured.free // settings.ranks_on_device
        cap = int(measured.total * settings.device_fraction) // settings.ranks_on_device
        budget = max(0, min(free, cap - measured.taken))
        remaining = budget - measured.activations - measured.graphs
        adapters = int(max(0, remaining) * settings.adapter_fraction)
        return cls(budget, budget < free, remaining, adapters, max(0, remaining) - adapters)


def _num_blocks(
    found: _Division, settings: PoolSettings, spec: WarmupSpec, block_bytes: int
) -> int | None:
    """Return how many blocks the pool has; None: too few."""
    if settings.num_blocks is not None:
        return settings.num_blocks if settings.num_blocks * block_bytes <= found.rest else None
    if not block_bytes:
        # Nothing is kept of rows: blocks are numbers, and no row ever waits for one.
        return max(1, spec.max_rows) * _needed(settings, replace(spec, max_blocks=0))
    fitting = int(found.rest * settings.memory_fraction) // block_bytes
    if spec.max_blocks:
        fitting = min(fitting, spec.max_blocks)
    return fitting if fitting >= _needed(settings, spec) else None


def _needed(settings: PoolSettings, spec: WarmupSpec) -> int:
    """Return how many blocks there must be."""
    if settings.num_blocks is not None:
        return settings.num_blocks
    needed = -(-(spec.required_tokens or spec.max_total_tokens) // settings.block_size)
    return max(1, min(needed, spec.max_blocks) if spec.max_blocks else needed)


def _refusal(
    measured: MeasuredMemory, settings: PoolSettings, spec: WarmupSpec, block_bytes: int
) -> str:
    found, needed = _Division.of(measured, settings), _needed(settings, spec)
    left = found.rest
    if settings.num_blocks is None:
        left = int(left * settings.memory_fraction)
    selections = [
        f"{verb} {flag} to {value}"
        for verb, flag, value in remedies(measured, settings, spec, block_bytes)
    ]
    in_step = measured.activations + measured.graphs
    # Before the largest step has run nothing is known of it.
    step = f" less {_mib(in_step)} for the largest step" if in_step else ""
    advice = ", or ".join(selections) or "choose a smaller model or a smaller dtype"
    return (
        f"the KV cache needs {needed} blocks of {block_bytes} bytes "
        f"({_mib(needed * block_bytes)}), but only {_mib(left)} are left for it: this rank "
        f"may take {_mib(found.budget)} beside its weights{step}, of which adapters get "
        f"{_mib(found.adapters)}; {advice}"
    )


def remedies(
    measured: MeasuredMemory, settings: PoolSettings, spec: WarmupSpec, block_bytes: int
) -> list[tuple[str, str, str]]:
    """Return what to do about a plan that is refused: each (verb, flag, value) is enough alone."""
    needed = _needed(settings, spec)
    return [
        (verb, flag, text)
        for verb, flag, text, changed in _candidates(
            measured, settings, spec, needed * block_bytes, block_bytes
        )
        if _num_blocks(_Division.of(changed[0], changed[1]), changed[1], changed[2], block_bytes)
    ]


_Case = tuple[MeasuredMemory, PoolSettings, WarmupSpec]


def _candidates(
    measured: MeasuredMemory,
    settings: PoolSettings,
    spec: WarmupSpec,
    bytes_needed: int,
    block_bytes: int,
) -> Iterator[tuple[str, str, str, _Case]]:
    """Yield values that solve the plan's inequality for one flag each, and the case they make."""
    found = _Division.of(measured, settings)
    is_fixed = settings.num_blocks is not None
    kv_share = 1.0 if is_fixed else settings.memory_fraction
    fitting = int(found.rest * kv_share) // block_bytes
    if is_fixed and fitting:
        changed = replace(settings, num_blocks=fitting)
        yield "lower", "--num-blocks", str(fitting), (measured, changed, spec)
    tokens = fitting * settings.block_size
    # Less than that is no request: a token in and a token out.
    if not is_fixed and tokens >= 2:
        shorter = replace(spec, required_tokens=tokens)
        yield "lower", "--max-total-tokens", str(tokens), (measured, settings, shorter)
    if not is_fixed and 0 < bytes_needed <= found.rest:
        share = _up(bytes_needed / found.rest)
        changed = replace(settings, memory_fraction=share)
        yield "raise", "--kv-memory-fraction", f"{share:g}", (measured, changed, spec)
    if found.adapters and bytes_needed <= found.remaining * kv_share:
        share = _down(1 - bytes_needed / (found.remaining * kv_share))
        changed = replace(settings, adapter_fraction=share)
        yield "lower", "--adapter-memory-fraction", f"{share:g}", (measured, changed, spec)
    lacking = math.ceil(bytes_needed / kv_share / (1 - settings.adapter_fraction))
    lacking -= found.remaining
    if found.is_capped:
        room = settings.device_fraction + lacking * settings.ranks_on_device / measured.total
        share = _up(room)
        changed = replace(settings, device_fraction=share)
        if share <= 1:
            yield "raise", "--cuda-memory-fraction", f"{share:g}", (measured, changed, spec)
    if 0 < lacking < measured.activations:
        # The memory of a step grows with its tokens.
        less = int(spec.max_step_tokens * (1 - lacking / measured.activations))
        smaller = replace(measured, activations=measured.activations - lacking)
        if less:
            yield "lower", "--max-batch-prefill-tokens", f"about {less}", (smaller, settings, spec)


def _up(share: float) -> float:
    """Round up to hundredths."""
    return math.ceil(share * 100) / 100


def _down(share: float) -> float:
    return math.floor(share * 100) / 100


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
