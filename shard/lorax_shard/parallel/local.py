"""Makes a model of full size one rank's: parameters of its part, and where ranks meet.

The modules stay what they are (``nn.Linear``, ``Conv1D``, ``nn.Embedding``), only narrower, so
that packing, adapters and probes see nothing new. The ranks meet in forward hooks around
them: a row-parallel linear's output is a part of a sum until its hook has run, and so is
whatever an adapter added to it, which therefore needs no collective of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorax_shard.parallel.group import RankGroup
from lorax_shard.parallel.plan import RankPlan, Role, Split


def make_local(model: Any, plan: RankPlan) -> None:
    """Give every split module parameters of the rank's size, without values."""
    for name, split in plan.splits.items():
        module = model.get_submodule(name)
        _RESIZE[split.role](module, split)
        parent = model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, "config") and split.role in (Role.COLUMN, Role.ROW):
            _tell_heads(parent, plan)


def keep_bias_once(model: Any, plan: RankPlan) -> None:
    """Leave the bias of row-parallel linears to rank 0: the sum has it once."""
    if plan.rank == 0:
        return
    for name, split in plan.splits.items():
        kept = {Role.ROW: "bias", Role.EXPERTS: "down_proj_bias"}.get(split.role, "")
        bias = getattr(model.get_submodule(name), kept, None) if kept else None
        if isinstance(bias, torch.Tensor):
            with torch.no_grad():
                bias.zero_()


def connect(
    model: Any, plan: RankPlan, group: RankGroup, extra_logits: Callable[[], int] = lambda: 0
) -> None:
    """Let the ranks meet; comes after whatever replaces the model's modules.

    ``extra_logits`` says how many logits an adapter of the step has beyond the vocabulary: they
    are the last rank's, as are the ids beyond it.
    """
    for name, split in plan.splits.items():
        module = model.get_submodule(name)
        if split.role in (Role.ROW, Role.EXPERTS):
            module.register_forward_hook(lambda _m, _a, output: group.all_reduce(output))
        elif split.role is Role.HEAD:
            _connect_head(module, plan, group, extra_logits)
        elif split.role is Role.EMBEDDING:
            _connect_embedding(module, plan, group)
        elif split.role is Role.NORM:
            _connect_norm(module, split, group)


def _connect_head(
    module: nn.Module, plan: RankPlan, group: RankGroup, extra_logits: Callable[[], int]
) -> None:
    def join(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        sizes = [len(span) for span in plan.vocabulary]
        sizes[-1] += extra_logits()
        return group.all_gather(output, sizes)

    module.register_forward_hook(join)


def _connect_embedding(module: nn.Module, plan: RankPlan, group: RankGroup) -> None:
    own = plan.vocabulary[plan.rank]
    is_last = plan.rank == plan.world_size - 1
    absent: list[torch.Tensor] = []

    def localise(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        ids = args[0]
        is_absent = ids < own.start
        if not is_last:
            is_absent |= ids >= own.stop
        absent.append(is_absent)
        return ((ids - own.start).masked_fill(is_absent, 0), *args[1:])

    def join(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return group.all_reduce(output.masked_fill(absent.pop().unsqueeze(-1), 0.0))

    module.register_forward_pre_hook(localise)
    module.register_forward_hook(join)


def _connect_norm(module: Any, split: Split, group: RankGroup) -> None:
    """Correct what a norm divided by, the mean over its own part, to the mean over all."""
    epsilon: float = module.variance_epsilon

    def correct(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        squares = args[0].float().pow(2).sum(-1, keepdim=True)
        own = squares / args[0].shape[-1]
        # Heads that several ranks hold count once.
        whole = group.all_reduce(squares / split.num_holders) / split.width
        factor = torch.sqrt((own + epsilon) / (whole + epsilon))
        return (output.float() * factor).to(output.dtype)

    module.register_forward_hook(correct)


def _tell_heads(attention: nn.Module, plan: RankPlan) -> None:
    """Let an attention module, which may count heads by its config, count the rank's."""
    heads = plan.heads
    full: Any = attention.config
    if getattr(full, "is_local", False) or not any(
        hasattr(attention, name) for name in ("head_dim", "qk_head_dim")
    ):
        return
    head_dim = int(getattr(attention, "head_dim", 0))
    local: Any = copy.copy(full)
    num_keys = getattr(full, "num_key_value_heads", None)
    local.num_attention_heads = len(heads.queries)
    if num_keys is not None:
        local.num_key_value_heads = len(heads.keys)
    local.is_local = True
    attention.config = local
    for name, number in (
        ("num_heads", len(heads.queries)),
        ("num_attention_heads", len(heads.queries)),
        ("num_key_value_heads", len(heads.keys)),
        ("num_key_value_groups", len(heads.queries) // len(heads.keys)),
        # GPT-2 cuts its fused projection in three of this width, GPT-BigCode in these.
        ("split_size", len(heads.queries) * head_dim),
        ("kv_heads", len(heads.keys)),
        ("kv_dim", len(heads.keys) * head_dim),
        *((("embed_dim", len(heads.queries) * head_dim),) if hasattr(attention, "kv_dim") else ()),
    ):
        if hasattr(attention, name):
            setattr(attention, name, number)


def _resize_column(module: nn.Module, split: Split) -> None:
    _set(module, "weight", split.weight_dim, split.size)
    _set(module, "bias", 0, split.size)
    setattr(module, "nf" if split.is_transposed else "out_features", split.size)


def _resize_row(module: nn.Module, split: Split) -> None:
    _set(module, "weight", split.weight_dim, split.size)
    setattr(module, "nx" if split.is_transposed else "in_features", split.size)


def _resize_embedding(module: nn.Module, split: Split) -> None:
    assert isinstance(module, nn.Embedding)
    module.num_embeddings = split.size
    # Of the whole vocabulary; it matters for gradients only.
    module.padding_idx = None
    _set(module, "weight", 0, split.size)


def _resize_parameters(module: nn.Module, split: Split) -> None:
    for name, (dim, spans) in split.parameters.items():
        _set(module, name, dim, sum(map(len, spans)))


def _resize_experts(module: nn.Module, split: Split) -> None:
    _resize_parameters(module, split)
    for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
        if hasattr(module, name):
            setattr(module, name, split.size)


def _resize_norm(module: nn.Module, split: Split) -> None:
    _set(module, "weight", 0, split.size)


_RESIZE = {
    Role.COLUMN: _resize_column,
    Role.ROW: _resize_row,
    Role.EMBEDDING: _resize_embedding,
    Role.HEAD: _resize_column,
    Role.EXPERTS: _resize_experts,
    Role.NORM: _resize_norm,
    Role.HEADS: _resize_parameters,
}


def _set(module: nn.Module, name: str, dim: int, size: int) -> None:
    """Replace a parameter by one that has another size in one dimension."""
    old = getattr(module, name, None)
    if old is None:
        return
    shape = list(old.shape)
    shape[dim] = size
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(module, name, nn.Parameter(empty, requires_grad=False))
