"""Put packed linears into a model in place of its own, from outside."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import psutil
import torch
from torch import nn

from lorax_shard.linear import remembered
from lorax_shard.linear.backends import TorchBackend
from lorax_shard.linear.interface import LinearBackend
from lorax_shard.linear.measure import choose, is_disturbed, least_of, log_table, measure
from lorax_shard.linear.packed import PackedLinear, SiblingGroup, SiblingKernel
from lorax_shard.linear.registry import BACKENDS

logger = logging.getLogger(__name__)

# Linears of one parent module that read the same tensor.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# Second copies of weights may take this share of the memory that is free at load.
_COPY_SHARE = 0.25
# A measurement that took longer is kept for the next start.
_WORTH_KEEPING_S = 0.5


class _Target(NamedTuple):
    """A linear of the model: where it hangs and what it computes with."""

    parent: nn.Module
    name: str
    weight: torch.Tensor  # out x in
    bias: torch.Tensor | None
    # Another module uses the same weight (a tied head): it stays in memory in any case.
    is_tied: bool
    # The model's own weight is in x out (Conv1D).
    is_transposed: bool


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
    targets = list(_targets(model))
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


def _targets(model: nn.Module) -> Iterator[_Target]:
    uses = Counter(id(parameter) for _, parameter in _all_parameters(model))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # Subclasses of nn.Linear compute something else and stay.
            if type(child) is nn.Linear:
                weight = child.weight.detach()
            elif _is_conv1d(child):
                weight = child.get_parameter("weight").detach().t()
            else:
                continue
            parameters = dict(child.named_parameters(recurse=False))
            bias = parameters["bias"].detach() if "bias" in parameters else None
            is_tied = uses[id(parameters["weight"])] > 1
            yield _Target(parent, name, weight, bias, is_tied, _is_conv1d(child))


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear, which keeps its weight as in x out; known by name, so that this room
    # does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def _resolve_auto(
    targets: Sequence[_Target], device: torch.device, dtype: torch.dtype
) -> LinearBackend:
    candidates = BACKENDS.runnable(device, dtype)
    if len(candidates) == 1:
        return candidates[0]
    weights = [target.weight for target in targets if not target.is_tied]
    weights = weights or [target.weight for target in targets]
    path = remembered.table_path(weights, candidates)
    table = remembered.recall(path, candidates)
    if table is None or is_disturbed(table):
        started = time.perf_counter()
        measured = measure(weights, candidates)
        table = measured if table is None else least_of(table, measured)
        log_table(table)
        if time.perf_counter() - started > _WORTH_KEEPING_S:
            remembered.remember(path, table)
    else:
        logger.info("linears were measured at an earlier start; delete %s to repeat that", path)
    return choose(table, candidates, may_copy=_fits(sum(weight.nbytes for weight in weights)))


def _fits(nbytes: int) -> bool:
    free: int = psutil.virtual_memory().available
    return nbytes <= _COPY_SHARE * free


def _replace(
    targets: list[_Target], chosen: LinearBackend, siblings: Sequence[tuple[str, ...]]
) -> int:
    """Replace all targets and return the bytes of second copies.

    Empties the list on the way, so that each old weight is freed before the next is packed.
    """
    extra, plain = 0, TorchBackend()
    for group in _groups(targets, siblings):
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


def _groups(targets: list[_Target], siblings: Sequence[tuple[str, ...]]) -> Iterator[list[_Target]]:
    """Yield siblings together and all other targets alone; empties ``targets``."""
    targets.reverse()
    while targets:
        first = targets.pop()
        group = [first]
        names = next((names for names in siblings if first.name in names), ())
        # The linears of one parent follow each other.
        while targets and not first.is_tied and _are_siblings(first, targets[-1], names):
            group.append(targets.pop())
        yield group


def _are_siblings(first: _Target, other: _Target, names: Sequence[str]) -> bool:
    return (
        other.parent is first.parent
        and other.name in names
        and not other.is_tied
        and other.weight.shape[1] == first.weight.shape[1]
    )


def _replace_one(target: _Target, backend: LinearBackend) -> int:
    kernel = backend.pack(target.weight, target.bias)
    out_features, in_features = target.weight.shape
    module = PackedLinear(kernel, in_features, out_features, target.bias)
    module.is_transposed = target.is_transposed
    setattr(target.parent, target.name, module)
    return kernel.nbytes


def _replace_siblings(group: list[_Target], backend: LinearBackend) -> int:
    weight = torch.cat([target.weight for target in group])
    kernel = backend.pack(weight, _stacked_bias(group))
    sizes = [target.weight.shape[0] for target in group]
    siblings = SiblingGroup(kernel, sizes)
    for index, target in enumerate(group):
        share = SiblingKernel(siblings, index, kernel.nbytes * sizes[index] // sum(sizes))
        module = PackedLinear(share, weight.shape[1], sizes[index], target.bias)
        module.is_transposed = target.is_transposed
        setattr(target.parent, target.name, module)
    return kernel.nbytes


def _stacked_bias(group: list[_Target]) -> torch.Tensor | None:
    if all(target.bias is None for target in group):
        return None
    return torch.cat(
        [
            target.weight.new_zeros(target.weight.shape[0]) if target.bias is None else target.bias
            for target in group
        ]
    )
