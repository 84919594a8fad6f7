"""One step, as values: what the router plans, a shard executes and reports back.

Plans and outcomes hold columns (parallel lists), not an object per row: at 256
rows an object per row costs more than the planning itself. Router and shard both
speak these values; ``lorax_proto.convert`` puts them on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NewType

from lorax_contract.constraint import Constraint
from lorax_contract.pooling import HeadFacts, Pooling, VectorFacts
from lorax_contract.tracing import TraceContext

RequestId = NewType("RequestId", int)
BlockId = NewType("BlockId", int)
AdapterHandle = NewType("AdapterHandle", int)

BASE_ADAPTER = AdapterHandle(0)


class FinishCode(IntEnum):
    """Why a row ended, as a shard reports it (the numbers are those of the wire)."""

    RUNNING = 0
    LENGTH = 1
    EOS_TOKEN = 2
    STOP_SEQUENCE = 3
    ERROR = 4


class OutputKind(IntEnum):
    """What a request asks of its row (the numbers are those of the wire)."""

    # Tokens, one after the other, until one of StoppingParams ends them.
    TOKENS = 0
    # Nothing beyond the prompt: its row ends, without a token, once the prompt is computed.
    PROMPT = 1
    # A vector of what the last layer gives for the prompt, with which its row ends, too.
    VECTOR = 2
    # What the classification head of its adapter, or else of the model, makes of such vectors.
    SCORES = 3

    @property
    def pools(self) -> bool:
        """Whether its row ends with numbers that are made of what the last layer gives."""
        return self in (OutputKind.VECTOR, OutputKind.SCORES)


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What is added to the logits of some tokens: one value for each id, and each id once."""

    ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn. The seed is drawn at admission, so it is always set."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    # Added before the penalties.
    logit_bias: LogitBias = LogitBias()
    # Prefer the tokens of a list that the previous token seeds.
    watermark: bool = False
    # How many of the likeliest tokens are reported beside each token.
    num_alternatives: int = 0
    # Whether logprobs are the model's own; else they are those of what the token is drawn from,
    # after bias, penalties and warpers. Those of a prompt are always the model's own.
    raw_logprobs: bool = False
    # Report the logprob of each prompt token.
    prompt_logprobs: bool = False
    # How many of the likeliest tokens are reported beside each of them.
    num_prompt_alternatives: int = 0


# Of rows of which no token is drawn, and nothing else of this is asked: they need not be sent any.
UNSAMPLED = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingParams:
    """When a request ends."""

    # 0 if and only if no tokens are asked for (OutputKind).
    max_new_tokens: int
    # No token ends the output, and no stop string in it does, before it has more than so many.
    min_new_tokens: int = 0
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One admitted request; with the ids generated since, the only truth about it."""

    request_id: RequestId
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    stopping: StoppingParams
    adapter: AdapterHandle = BASE_ADAPTER
    # The position from which on it computes with its adapter, and with the base model before;
    # None: of the whole request, or where the shards find that it is invoked.
    adapter_start: int | None = None
    output: OutputKind = OutputKind.TOKENS
    # Of which its vector is made, if it asks for one.
    pooling: Pooling = Pooling.LAST
    # The token that the second of two texts begins with, for models that tell them apart; 0: there
    # is one text.
    second_start: int = 0

    @property
    def computes_all(self) -> bool:
        """Whether each token of the prompt has to be computed, cached or not.

        What caches hold are keys and values: no logits, and nothing that vectors are made of.
        """
        pools = self.output.pools and self.pooling is not Pooling.LAST
        return self.sampling.prompt_logprobs or pools

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that are computed at most: all but the last one of an output."""
        return len(self.prompt_ids) + max(self.stopping.max_new_tokens - 1, 0)

    # What its output is bound to.
    constraint: Constraint | None = None
    # Whose children the shards' spans of it are; None: it is not traced.
    trace: TraceContext | None = None
    # Output that it had where it ran before, of which somebody was told: fewer than it may have.
    resumed_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class NewRow:
    """A row that enters the shards: the request and the output it already has."""

    spec: RequestSpec
    output_ids: Sequence[int]
    # Tokens whose keys and values its first blocks hold already, or do once the step's copies
    # are done; at least one is left. The last of these blocks need not be full.
    num_cached: int = 0


class BlockSpace(IntEnum):
    """Where a KV block lies (the numbers are those of the wire)."""

    DEVICE = 0
    # Of each rank its own.
    HOST = 1


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy one block, within a space or between two; each rank copies its own part of it."""

    source_space: int
    source_block: int
    destination_space: int
    destination_block: int


@dataclass(slots=True)
class StepPlan:
    """What one step computes, as differences to what the shards already know.

    Row i computes ``num_tokens[i]`` tokens of request ``row_ids[i]``; its new
    blocks are the next ``num_new_blocks[i]`` entries of ``new_blocks``. Rows of
    ``drop`` leave first, rows of ``new_rows`` enter then. Copies are made one after the other,
    after all that earlier steps compute and before anything of this one: a block may give its
    content away and be granted anew in one step.
    """

    seq: int
    row_ids: list[RequestId] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_new_blocks: list[int] = field(default_factory=list)
    new_blocks: list[BlockId] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    drop: list[RequestId] = field(default_factory=list)
    activate: list[AdapterHandle] = field(default_factory=list)
    deactivate: list[AdapterHandle] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)


@dataclass(slots=True)
class TokenColumns:
    """Tokens with their logprob, text and special flag, as parallel lists."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    special: list[bool] = field(default_factory=list)

    def part(self, start: int, stop: int) -> TokenColumns:
        """Return some of the tokens."""
        if stop - start == 1:
            # Nearly always; lists of one are made faster than slices.
            return TokenColumns(
                [self.ids[start]], [self.logprobs[start]], [self.texts[start]],
                [self.special[start]],
            )  # fmt: skip
        return TokenColumns(
            self.ids[start:stop],
            self.logprobs[start:stop],
            self.texts[start:stop],
            self.special[start:stop],
        )


@dataclass(slots=True)
class Alternatives:
    """The likeliest tokens at one position, best first."""

    ids: list[int]
    logprobs: list[float]
    texts: list[str]


# The error_code of rows whose logits were no finite numbers.
NO_NUMBERS_CODE = "no_numbers"


@dataclass(slots=True)
class RowDetail:
    """What only some rows have: the text at the end, alternatives, prompt logprobs, an error."""

    generated_text: str | None = None
    alternatives: list[Alternatives] = field(default_factory=list)
    prompt_tokens: TokenColumns | None = None
    # One entry per prompt token, when alternatives to them were asked for; the first is empty.
    prompt_alternatives: list[Alternatives] = field(default_factory=list)
    # As many float32 as the model's last layer gives for a token, little-endian.
    vector: bytes | None = None
    # NO_NUMBERS_CODE, or the error_type of an ErrorKind.
    error_code: str | None = None
    error_text: str | None = None


@dataclass(slots=True)
class StepOutcome:
    """What one step produced. Rows without a token or an end are absent.

    Row i gained the next ``num_tokens[i]`` entries of ``tokens``; ``finish[i]``
    is a FinishCode. ``details`` is keyed by request. ``inactive`` says of adapters
    that were to take effect with this step, and did on no rank, why.

    ``failed`` are the rows of forward passes that failed: of several rows, any of which may be to
    blame. Nothing of them was computed and nothing is told of them. They have left the shards, so
    that steps planned before that was known pass over them.
    """

    seq: int
    row_ids: list[RequestId] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    finish: list[int] = field(default_factory=list)
    tokens: TokenColumns = field(default_factory=TokenColumns)
    details: dict[RequestId, RowDetail] = field(default_factory=dict)
    # Nanoseconds the shard spent in the forward pass and in the whole step.
    forward_ns: int = 0
    total_ns: int = 0
    inactive: dict[AdapterHandle, str] = field(default_factory=dict)
    # Tokens that were drafted, whether they were kept or not.
    num_drafted: int = 0
    # The same by row, of those that were drafted for.
    drafted: dict[RequestId, int] = field(default_factory=dict)
    failed: list[RequestId] = field(default_factory=list)
    # Why, in words.
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard group says of itself; numbers that differ between ranks are the least."""

    epoch: int
    world_size: int
    model_type: str
    dtype: str
    device_type: str
    block_size: int
    vocab_size: int
    # Longest sequence the model's positions allow; 0: unbounded.
    max_positions: int
    num_blocks: int
    max_depth: int
    # Tokens of a row that are drafted; 0: none.
    speculative_tokens: int = 0
    window_size: int | None = None
    attention_backend: str = ""
    linear_backend: str = ""
    elementwise_backend: str = ""
    # "": no adapters are served.
    lora_backend: str = ""
    # Device bytes kept for adapters; 0 before warm-up.
    adapter_bytes: int = 0
    # Blocks in host memory, and the seconds that one takes there or back; 0 before warm-up.
    num_host_blocks: int = 0
    block_move_s: float = 0.0
    # What the memory of a rank goes to, as (name, bytes); of several that of the fullest.
    memory: tuple[tuple[str, int], ...] = ()
    # Whether it is an encoder: each token sees all others, so that prompts are computed whole and
    # nothing of them is kept.
    is_encoder: bool = False
    # Whether it draws tokens; else it makes vectors of prompts, or scores.
    generates: bool = True
    # How vectors are made of prompts, where a request does not say.
    vectors: VectorFacts = field(default_factory=VectorFacts)
    # None: the model has no classification head.
    head: HeadFacts | None = None
    # The same of each rank of a group, by rank.
    rank_memory: tuple[tuple[tuple[str, int], ...], ...] = ()
    shard_uris: tuple[str, ...] = ()

    @property
    def block_bytes(self) -> int:
        """Bytes of a KV block on all ranks; 0 where that is not said."""
        ranks = self.rank_memory or (self.memory,)
        pools = sum(dict(items).get("kv_cache", 0) for items in ranks)
        return pools // self.num_blocks if self.num_blocks else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupSpec:
    """The largest step that will be sent; the shard runs it once and sizes its KV pool."""

    max_input_length: int
    max_total_tokens: int
    max_step_tokens: int
    max_rows: int
    # Upper limit on the blocks of the pool; 0: none.
    max_blocks: int = 0
    # A pool without room for a sequence of this length is refused; 0: max_total_tokens.
    required_tokens: int = 0
