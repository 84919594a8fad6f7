"""Which rank holds which part of each module: read from the model's own plan.

transformers names for each family which linears are split by columns and which by rows;
families without a plan, or with one that gathers what need not be gathered, get a
small one here. Everything else is replicated: so is the block around a module whose style is
not known here, since a linear that is split needs partners that are. The token embedding and the
head are split by vocabulary, always.
"""

from __future__ import annotations

import enum
import fnmatch
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorax_shard.parallel.families import PLANS
from lorax_shard.parallel.partition import (
    CannotSplitError,
    HeadShare,
    Span,
    share_heads,
    share_of,
)

logger = logging.getLogger(__name__)

# What a style means here; transformers' words but for the last five.
_SPLIT_STYLES = (
    "colwise", "rowwise", "packed_colwise", "moe_tp_experts",
    "norm", "sinks", "heads_table", "heads_colwise", "heads_rowwise",
)  # fmt: skip
# Modules that take whole inputs and give whole outputs, however they compute: they stay whole.
_WHOLE_STYLES = (
    "colwise_gather_output", "colwise_rep", "embedding_colwise", "embedding_rowwise",
    "mla_kv_a_proj", "replicate", "replicated_with_grad_allreduce", "rowwise_rep",
    "rowwise_split_input", "sequence_parallel",
)  # fmt: skip
# What ranks exchange inside of a block that is computed whole.
_WHOLE_BLOCK_STYLES = ("all_reduce", "local_params", "moe_identity_expert", "packed_rowwise")
KNOWN_STYLES = frozenset((*_SPLIT_STYLES, *_WHOLE_STYLES, *_WHOLE_BLOCK_STYLES))

_QUERIES = ("q_proj", "q_b_proj")
_KEYS = ("k_proj", "v_proj")
_FUSED = ("c_attn", "qkv_proj")
# Key and value of a head, or all three of its parts, one after the other, head by head.
_BY_HEAD = ("kv_b_proj", "query_key_value", "c_attn")
_ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
_ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")


class Role(enum.Enum):
    """How a module is spread over the ranks."""

    # Each rank computes some outputs from all inputs.
    COLUMN = "column"
    # Each rank computes a part of every output from some inputs: the sum is the output.
    ROW = "row"
    # Each rank knows some ids; others give zeros: the sum is the output.
    EMBEDDING = "embedding"
    # Each rank computes some logits.
    HEAD = "head"
    # Fused experts: each rank has a part of every expert's width: the sum is the output.
    EXPERTS = "experts"
    # A norm over all heads: each rank has the heads' parts, the mean is over all of them.
    NORM = "norm"
    # Numbers that belong to the heads: each rank has its own, and nobody meets.
    HEADS = "heads"


@dataclass(frozen=True, slots=True)
class Split:
    """What a rank holds of one module: these spans of its split dimension, in order."""

    role: Role
    spans: tuple[Span, ...]
    # The weight is kept as in x out (GPT-2's Conv1D).
    is_transposed: bool = False
    # Of modules whose parameters have other names than weight and bias: the dimension that is
    # split, and where. What is in none stays whole.
    parameters: Mapping[str, tuple[int, tuple[Span, ...]]] = field(default_factory=dict)
    # Of a norm: its whole width, and how many ranks hold what this one holds.
    width: int = 0
    num_holders: int = 1

    @property
    def weight_dim(self) -> int:
        """The dimension of the weight that is split."""
        is_row = self.role is Role.ROW
        return int(is_row != self.is_transposed)

    @property
    def size(self) -> int:
        """Items of the dimension that the rank holds."""
        return sum(map(len, self.spans))


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's part of a model."""

    rank: int
    world_size: int
    heads: HeadShare
    # By module name.
    splits: Mapping[str, Split]
    # Vocabulary entries of each rank.
    vocabulary: tuple[Span, ...]


def make_plan(model: Any, rank: int, world_size: int) -> RankPlan:
    """Return what a rank holds of a model of full size; CannotSplitError says why it cannot.

    The model may be on the meta device.
    """
    config = model.config.get_text_config()
    planner = _Planner(model, config, rank, world_size)
    return RankPlan(
        rank,
        world_size,
        planner.heads,
        planner.splits(),
        tuple(share_of(config.vocab_size, each, world_size) for each in range(world_size)),
    )


class _Planner:
    def __init__(self, model: Any, config: Any, rank: int, world_size: int) -> None:
        self._model = model
        self._config = config
        self._rank, self._world_size = rank, world_size
        num_queries = config.num_attention_heads
        num_keys = getattr(config, "num_key_value_heads", None) or num_queries
        if getattr(config, "multi_query", False):
            num_keys = 1
        self.heads = share_heads(num_queries, num_keys, rank, world_size)
        self._num_heads = (num_queries, num_keys)
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_queries

    def splits(self) -> dict[str, Split]:
        styles = self._styles()
        whole = self._whole_blocks(styles)
        found: dict[str, Split] = {}
        for name, (module, style) in styles.items():
            if style in _SPLIT_STYLES and not any(_is_within(name, block) for block in whole):
                found[name] = self._split(name, module, style)
        if not found:
            raise CannotSplitError(
                f"transformers has no plan to spread a {self._config.model_type} over ranks"
            )
        rows = (share_of(self._config.vocab_size, self._rank, self._world_size),)
        for module, role in (
            (self._model.get_input_embeddings(), Role.EMBEDDING),
            (self._model.get_output_embeddings(), Role.HEAD),
        ):
            # A backbone has no head.
            if module is not None:
                found[self._name_of(module)] = Split(role, rows)
        return found

    def _styles(self) -> dict[str, tuple[nn.Module, str]]:
        """Return the modules that the plan names and how each is to be spread."""
        patterns = self._patterns()
        found: dict[str, tuple[nn.Module, str]] = {}
        for name, module in self._model.named_modules():
            style = next((s for p, s in patterns.items() if fnmatch.fnmatchcase(name, p)), None)
            if style == "local_params":
                style = _style_of_own_parameters(module)
            if style is not None:
                found[name] = module, style
        return found

    def _whole_blocks(self, styles: Mapping[str, tuple[nn.Module, str]]) -> set[str]:
        """Return the blocks that stay whole since a part of them has a style not known here."""
        blocks: set[str] = set()
        for name, (module, style) in styles.items():
            if style not in (*_SPLIT_STYLES, *_WHOLE_STYLES):
                has_parts = next(module.children(), None) is not None
                blocks.add(name if has_parts else name.rpartition(".")[0])
        if blocks:
            logger.warning(
                "each rank computes %d blocks of this model whole, %s for one: how its plan "
                "spreads them is not known here", len(blocks), min(blocks),
            )  # fmt: skip
        return blocks

    def _patterns(self) -> dict[str, str]:
        """Return the family's plan by full module name."""
        theirs: Mapping[str, str] | None = getattr(self._config, "base_model_tp_plan", None)
        plan = PLANS.get(self._config.model_type) or theirs or {}
        prefix = base_prefix(self._model)
        return {f"{prefix}.{pattern}".lstrip("."): style for pattern, style in plan.items()}

    def _name_of(self, module: nn.Module) -> str:
        names = (str(name) for name, each in self._model.named_modules() if each is module)
        return next(names)

    def _split(self, name: str, module: nn.Module, style: str) -> Split:
        if style == "moe_tp_experts":
            return self._experts(name, module)
        if style == "norm":
            return self._norm(name, module)
        if style == "sinks":
            return Split(Role.HEADS, (), parameters={"sinks": (0, (self.heads.queries,))})
        if style == "heads_table":
            return Split(Role.HEADS, (), parameters={"weight": (1, (self.heads.queries,))})
        if style == "heads_colwise":
            return Split(Role.COLUMN, self._stacked_heads(name, _widths(module)[1]))
        if style == "heads_rowwise":
            return Split(Role.ROW, self._stacked_heads(name, _widths(module)[0]))
        transposed = not isinstance(module, nn.Linear)
        if style == "rowwise":
            return Split(Role.ROW, self._inputs(name, module), transposed)
        spans = self._outputs(name, module, packed=style == "packed_colwise")
        return Split(Role.COLUMN, spans, transposed)

    def _outputs(self, name: str, module: nn.Module, *, packed: bool) -> tuple[Span, ...]:
        *_, parent, own = name.split(".")
        size = _widths(module)[1]
        if parent in _ATTENTIONS:
            return self._attention_outputs(name, own, size)
        if packed:
            half = self._part(name, size // 2)
            return (half, Span(size // 2 + half.start, size // 2 + half.stop))
        return (self._part(name, size),)

    def _attention_outputs(self, name: str, own: str, size: int) -> tuple[Span, ...]:
        queries, keys = (each * self._head_dim for each in self._num_heads)
        q = self.heads.queries.scaled(self._head_dim)
        k = self.heads.keys.scaled(self._head_dim)
        if own in _QUERIES and size == queries:
            return (q,)
        if own in _KEYS and size == keys:
            return (k,)
        num_queries, num_keys = self._num_heads
        is_by_head = num_queries == num_keys and size % num_queries == 0
        # GPT-2's Conv1D has all queries, then all keys; GPT-BigCode's own kind has not.
        if (
            own in _FUSED
            and size == queries + 2 * keys
            and not (is_by_head and self._config.model_type == "gpt_bigcode")
        ):
            offsets = (queries, queries + keys)
            return (q, *(Span(at + k.start, at + k.stop) for at in offsets))
        if is_by_head and own in (*_BY_HEAD, *_QUERIES):
            return (self.heads.queries.scaled(size // num_queries),)
        raise CannotSplitError(f"{name} has {size} outputs, which are not this model's heads")

    def _stacked_heads(self, name: str, size: int) -> tuple[Span, ...]:
        """Return the rank's heads of each of the matrices that are stacked in one."""
        width = self._num_heads[0] * self._head_dim
        if size % width or self._num_heads[0] != self._num_heads[1]:
            raise CannotSplitError(f"{name} has a side of {size}, which is not this model's heads")
        own = self.heads.queries.scaled(self._head_dim)
        return tuple(Span(at + own.start, at + own.stop) for at in range(0, size, width))

    def _inputs(self, name: str, module: nn.Module) -> tuple[Span, ...]:
        *_, parent, own = name.split(".")
        size = _widths(module)[0]
        if parent in _ATTENTIONS and own in _ATTENTION_OUTPUTS:
            # Heads may be wider or narrower here than in queries and keys.
            if size % self._num_heads[0]:
                raise CannotSplitError(
                    f"{name} has {size} inputs, which are not this model's heads"
                )
            return (self.heads.queries.scaled(size // self._num_heads[0]),)
        return (self._part(name, size),)

    def _experts(self, name: str, module: nn.Module) -> Split:
        down = getattr(module, "down_proj", None)
        up = getattr(module, "gate_up_proj", None)
        if down is None or up is None:
            raise CannotSplitError(f"{name} keeps its experts in a way that is not known here")
        # experts x hidden x width and experts x (gate and up) width x hidden, or in x out.
        in_first = up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
        width = down.shape[1 if in_first else 2]
        # Grouped products want rows that begin at multiples of 16 bytes.
        unit = next(unit for unit in (8, 4, 2, 1) if width % unit == 0)
        own = self._part(name, width // unit).scaled(unit)
        both: tuple[Span, ...] = (own, Span(width + own.start, width + own.stop))
        if hasattr(module, "gate_up_proj_bias"):
            # GPT-OSS has gate and up in turns.
            both = (own.scaled(2),)
        parameters = {
            "gate_up_proj": (2 if in_first else 1, both),
            "down_proj": (1 if in_first else 2, (own,)),
        }
        if hasattr(module, "gate_up_proj_bias"):
            parameters["gate_up_proj_bias"] = (1, both)
        return Split(Role.EXPERTS, (own,), parameters=parameters)

    def _norm(self, name: str, module: nn.Module) -> Split:
        own = name.rpartition(".")[2]
        heads, number = (self.heads.queries, self._num_heads[0])
        if own == "k_norm":
            heads, number = (self.heads.keys, self._num_heads[1])
        width = module.get_parameter("weight").shape[0]
        if width != number * self._head_dim or not hasattr(module, "variance_epsilon"):
            raise CannotSplitError(f"{name} is no norm over this model's heads")
        shares = (
            share_heads(*self._num_heads, rank, self._world_size).keys
            for rank in range(self._world_size)
        )
        holders = sum(share == self.heads.keys for share in shares) if own == "k_norm" else 1
        spans = (heads.scaled(self._head_dim),)
        return Split(Role.NORM, spans, width=width, num_holders=holders)

    def _part(self, name: str, size: int) -> Span:
        try:
            return share_of(size, self._rank, self._world_size)
        except CannotSplitError as error:
            raise CannotSplitError(f"{name}: {error}") from error


def base_prefix(model: Any) -> str:
    """Return the name of the base model within the causal one; empty: it is the base model itself."""
    prefix: str = model.base_model_prefix
    # Llama 4's names a part that only its multimodal class has.
    return next((each for each in (prefix, "model") if hasattr(model, each)), "")


def _is_within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _style_of_own_parameters(module: nn.Module) -> str | None:
    """Return the style of a module whose own parameters, not those of its parts, are split."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    if not names:
        return None
    return "sinks" if names == {"sinks"} else "local_params"


def _widths(module: nn.Module) -> tuple[int, int]:
    """Return inputs and outputs of a linear or a Conv1D."""
    weight = module.get_parameter("weight")
    if isinstance(module, nn.Linear):
        return weight.shape[1], weight.shape[0]
    return weight.shape[0], weight.shape[1]
