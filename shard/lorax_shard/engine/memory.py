"""Sizes the KV pool: runs the largest step, measures what it takes, and divides the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_contract.step import WarmupSpec
from lorax_shard import device_memory
from lorax_shard.engine.memory_plan import MeasuredMemory, MemoryPlan, PoolSettings, plan_memory
from lorax_shard.lora.dummy import loaded_dummies
from lorax_shard.model.interface import GraphSettings, PagedModel

__all__ = ["MemoryPlan", "PoolSettings", "explained", "size_pool"]

logger = logging.getLogger(__name__)


def size_pool(
    model: PagedModel,
    settings: PoolSettings,
    spec: WarmupSpec,
    run_step: Callable[[], int],
    graphs: GraphSettings | None = None,
) -> MemoryPlan:
    """Run the largest step by ``run_step`` and return the plan; the model is left without a cache.

    ``run_step`` returns the bytes that the step took beside its cache; ``graphs`` are captured
    later, None: there are none. StartupError
    (OUT_OF_MEMORY) when the step or one request of the required length does not fit; what
    cannot fit whatever the step takes is refused before anything is allocated.
    """
    block_bytes = model.block_bytes(settings.block_size)
    model.free_cache()
    plan_memory(_measured(model, settings), settings, spec, block_bytes)
    too_large = (
        f"the memory does not suffice for a step of {spec.max_step_tokens} tokens in "
        f"{spec.max_rows} rows; lower --max-batch-prefill-tokens or --max-batch-size"
    )
    try:
        with explained(too_large), _dummy_adapters(model, settings.max_adapter_rank):
            activations = run_step()
        with explained(
            "the memory does not suffice for graphs of decode steps; start with --eager"
        ):
            graph_bytes = 0 if graphs is None else model.graph_bytes(graphs)
    finally:
        model.free_cache()
    measured = _measured(model, settings, activations, graph_bytes)
    plan = plan_memory(measured, settings, spec, block_bytes)
    logger.info(
        "KV pool of %d blocks (%d tokens): %s",
        plan.num_blocks,
        plan.num_blocks * settings.block_size,
        ", ".join(f"{name} {count / 2**20:.1f} MiB" for name, count in plan.items),
    )
    return plan


def _measured(
    model: PagedModel, settings: PoolSettings, activations: int = 0, graphs: int = 0
) -> MeasuredMemory:
    device = model.device
    free = device_memory.free_bytes(device)
    if device.type == "cpu":
        # The same memory.
        free -= settings.swap_bytes * settings.ranks_on_device
    return MeasuredMemory(
        total=device_memory.total_bytes(device),
        free=max(0, free),
        # Where there is no cap, what is free is all that counts.
        taken=device_memory.taken_bytes(device) if settings.device_fraction < 1 else 0,
        weights=model.weight_bytes,
        activations=activations,
        graphs=graphs,
    )


@contextmanager
def _dummy_adapters(model: PagedModel, rank: int) -> Iterator[None]:
    """Within, the model has adapters of this rank on linears of every shape; none for rank 0."""
    if model.slots is None or rank == 0:
        yield
        return
    with loaded_dummies(model.slots, rank, model.dtype, model.device):
        yield


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
