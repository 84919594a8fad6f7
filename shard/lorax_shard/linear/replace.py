"""Put packed linears into a model in place of its own, from outside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from lorax_shard.linear import remembered
from lorax_shard.linear.backends import TorchBackend
from lorax_shard.linear.interface import LinearBackend, NamedLinearBackend
from lorax_shard.linear.measure import Table, choose, least_of, log_table, measure_undisturbed
from lorax_shard.linear.registry import BACKENDS
from lorax_shard.linear.targets import (
    SIBLINGS,
    LinearTarget,
    find_groups,
    find_targets,
    put_kernel,
    put_stacked,
    stacked_bias,
)

logger = logging.getLogger(__name__)

# Second copies of weights may take this share of the memory that is free at load.
_COPY_SHARE = 0.25
# A measurement that took longer is kept for the next start.
_WORTH_KEEPING_S = 0.5


class Installed(NamedTuple):
    """The backend that was chosen, and the bytes of second copies that its weights take."""

    backend: str
    copied_bytes: int


@torch.no_grad()
def install(
    model: nn.Module, backend: str, device: torch.device, *, stack_siblings: bool = True
) -> Installed:
    """Replace the model's nn.Linear and Conv1D modules and return what was chosen.

    ``backend`` is 'auto' or a name of the registry. The plain weights are given up where the
    backend does not need them; tied weights stay shared, and a tied head is packed as a copy
    only if memory allows. ``stack_siblings`` computes linears that read the same tensor in one
    product where weights are packed anyway. Raises StartupError (BACKEND_UNAVAILABLE).
    """
    targets = list(find_targets(model))
    if not targets:
        return Installed("torch" if backend == "auto" else BACKENDS.load(backend).name, 0)
    dtype = max(targets, key=lambda target: target.weight.nbytes).weight.dtype
    chosen = (
        _resolve_auto(targets, device, dtype)
        if backend == "auto"
        else BACKENDS.create(backend, device, dtype)
    )
    num_linears = len(targets)
    extra = _replace(targets, chosen, SIBLINGS if stack_siblings else ())
    logger.info(
        "linear backend: %s for %d linears; second copies of weights take %.0f MB",
        chosen.name,
        num_linears,
        extra / 1e6,
        extra={"fields": {"event": "linear_backend", "backend": chosen.name, "copies": extra}},
    )
    return Installed(chosen.name, extra)


def _resolve_auto(
    targets: Sequence[LinearTarget], device: torch.device, dtype: torch.dtype
) -> LinearBackend:
    candidates = _unrivalled(BACKENDS.runnable(device, dtype))
    if len(candidates) == 1:
        return candidates[0]
    weights = [target.weight for target in targets if not target.is_tied]
    weights = weights or [target.weight for target in targets]
    table = _figures(weights, candidates, remembered.table_path(weights, candidates))
    return choose(table, candidates, may_copy=_fits(sum(weight.nbytes for weight in weights)))


def _figures(
    weights: Sequence[torch.Tensor], candidates: Sequence[NamedLinearBackend], path: Path
) -> Table:
    """Return what an undisturbed start measured, or measure."""
    kept = remembered.recall(path, candidates)
    if kept is not None and kept.is_sure:
        logger.info("linears were measured at an earlier start; delete %s to repeat that", path)
        return kept.table
    measured = measure_undisturbed(weights, candidates)
    table = measured.table
    if kept is not None and not measured.is_sure:
        table = least_of(kept.table, table)
    log_table(table)
    if measured.seconds > _WORTH_KEEPING_S:
        remembered.remember(path, table, is_sure=measured.is_sure)
    return table


def _unrivalled(backends: Sequence[NamedLinearBackend]) -> list[NamedLinearBackend]:
    superseded = {name for backend in backends for name in backend.supersedes}
    return [backend for backend in backends if backend.name not in superseded]


def _fits(nbytes: int) -> bool:
    free: int = psutil.virtual_memory().available
    return nbytes <= _COPY_SHARE * free


def _replace(
    targets: list[LinearTarget], chosen: LinearBackend, siblings: Sequence[tuple[str, ...]]
) -> int:
    """Replace all targets and return the bytes of second copies.

    Empties the list on the way, so that each old weight is freed before the next is packed.
    """
    extra, plain = 0, TorchBackend()
    for group in find_groups(targets, siblings):
        tied_too_large = group[0].is_tied and not _fits(group[0].weight.nbytes)
        backend = plain if tied_too_large else chosen
        freed = 0 if group[0].is_tied else sum(target.weight.nbytes for target in group)
        if group[0].is_tied and backend.keeps_plain:
            freed = group[0].weight.nbytes
        # On a CPU, stacking would copy weights that the plain product uses where they are. On a
        # GPU few large products beat many small ones.
        if len(group) > 1 and (backend.name != plain.name or group[0].weight.is_cuda):
            extra += _replace_siblings(group, backend) - freed
        else:
            extra += sum(_replace_one(target, backend) for target in group) - freed
        group.clear()
    return extra


def _replace_one(target: LinearTarget, backend: LinearBackend) -> int:
    kernel = backend.pack(target.weight, target.bias)
    put_kernel(target, kernel)
    return kernel.nbytes


def _replace_siblings(group: list[LinearTarget], backend: LinearBackend) -> int:
    kernel = backend.pack(torch.cat([target.weight for target in group]), stacked_bias(group))
    put_stacked(group, kernel)
    return kernel.nbytes
