# ruff: noqa
# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_KIND_ONE_OF: _ClassVar[ScoreKind]
    SCORE_KIND_ANY_OF: _ClassVar[ScoreKind]
    SCORE_KIND_NUMBERS: _ClassVar[ScoreKind]

class OutputKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_KIND_TOKENS: _ClassVar[OutputKind]
    OUTPUT_KIND_PROMPT: _ClassVar[OutputKind]
    OUTPUT_KIND_VECTOR: _ClassVar[OutputKind]
    OUTPUT_KIND_SCORES: _ClassVar[OutputKind]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_LAST: _ClassVar[Pooling]
    POOLING_MEAN: _ClassVar[Pooling]
    POOLING_FIRST: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]
    POOLING_MEAN_SQRT: _ClassVar[Pooling]
    POOLING_WEIGHTED_MEAN: _ClassVar[Pooling]
    POOLING_EACH: _ClassVar[Pooling]

class ConstraintKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONSTRAINT_KIND_NONE: _ClassVar[ConstraintKind]
    CONSTRAINT_KIND_JSON_SCHEMA: _ClassVar[ConstraintKind]
    CONSTRAINT_KIND_REGEX: _ClassVar[ConstraintKind]
    CONSTRAINT_KIND_LARK: _ClassVar[ConstraintKind]
    CONSTRAINT_KIND_CHOICE: _ClassVar[ConstraintKind]
    CONSTRAINT_KIND_LLGUIDANCE: _ClassVar[ConstraintKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_EOS_TOKEN: _ClassVar[FinishReason]
    FINISH_REASON_STOP_SEQUENCE: _ClassVar[FinishReason]

class BlockSpace(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_SPACE_DEVICE: _ClassVar[BlockSpace]
    BLOCK_SPACE_HOST: _ClassVar[BlockSpace]

class FinishCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_CODE_RUNNING: _ClassVar[FinishCode]
    FINISH_CODE_LENGTH: _ClassVar[FinishCode]
    FINISH_CODE_EOS_TOKEN: _ClassVar[FinishCode]
    FINISH_CODE_STOP_SEQUENCE: _ClassVar[FinishCode]
    FINISH_CODE_ERROR: _ClassVar[FinishCode]

class AdapterSource(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HUB: _ClassVar[AdapterSource]
    S3: _ClassVar[AdapterSource]
    LOCAL: _ClassVar[AdapterSource]
    PBASE: _ClassVar[AdapterSource]

class MergeStrategy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINEAR: _ClassVar[MergeStrategy]
    TIES: _ClassVar[MergeStrategy]
    DARE_LINEAR: _ClassVar[MergeStrategy]
    DARE_TIES: _ClassVar[MergeStrategy]

class MajoritySignMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOTAL: _ClassVar[MajoritySignMethod]
    FREQUENCY: _ClassVar[MajoritySignMethod]
SCORE_KIND_ONE_OF: ScoreKind
SCORE_KIND_ANY_OF: ScoreKind
SCORE_KIND_NUMBERS: ScoreKind
OUTPUT_KIND_TOKENS: OutputKind
OUTPUT_KIND_PROMPT: OutputKind
OUTPUT_KIND_VECTOR: OutputKind
OUTPUT_KIND_SCORES: OutputKind
POOLING_LAST: Pooling
POOLING_MEAN: Pooling
POOLING_FIRST: Pooling
POOLING_MAX: Pooling
POOLING_MEAN_SQRT: Pooling
POOLING_WEIGHTED_MEAN: Pooling
POOLING_EACH: Pooling
CONSTRAINT_KIND_NONE: ConstraintKind
CONSTRAINT_KIND_JSON_SCHEMA: ConstraintKind
CONSTRAINT_KIND_REGEX: ConstraintKind
CONSTRAINT_KIND_LARK: ConstraintKind
CONSTRAINT_KIND_CHOICE: ConstraintKind
CONSTRAINT_KIND_LLGUIDANCE: ConstraintKind
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_EOS_TOKEN: FinishReason
FINISH_REASON_STOP_SEQUENCE: FinishReason
BLOCK_SPACE_DEVICE: BlockSpace
BLOCK_SPACE_HOST: BlockSpace
FINISH_CODE_RUNNING: FinishCode
FINISH_CODE_LENGTH: FinishCode
FINISH_CODE_EOS_TOKEN: FinishCode
FINISH_CODE_STOP_SEQUENCE: FinishCode
FINISH_CODE_ERROR: FinishCode
HUB: AdapterSource
S3: AdapterSource
LOCAL: AdapterSource
PBASE: AdapterSource
LINEAR: MergeStrategy
TIES: MergeStrategy
DARE_LINEAR: MergeStrategy
DARE_TIES: MergeStrategy
TOTAL: MajoritySignMethod
FREQUENCY: MajoritySignMethod

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PreloadedAdapter(_message.Message):
    __slots__ = ("adapter_parameters", "adapter_source", "adapter_index")
    ADAPTER_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    adapter_parameters: AdapterParameters
    adapter_source: AdapterSource
    adapter_index: int
    def __init__(self, adapter_parameters: _Optional[_Union[AdapterParameters, _Mapping]] = ..., adapter_source: _Optional[_Union[AdapterSource, str]] = ..., adapter_index: _Optional[int] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("with_adapters", "adapter_parts")
    WITH_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PARTS_FIELD_NUMBER: _ClassVar[int]
    with_adapters: bool
    adapter_parts: _containers.RepeatedCompositeFieldContainer[AdapterPart]
    def __init__(self, with_adapters: bool = ..., adapter_parts: _Optional[_Iterable[_Union[AdapterPart, _Mapping]]] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("requires_padding", "dtype", "device_type", "window_size", "block_size", "speculate", "preloaded_adapters", "supports_generation", "supports_embeddings", "supports_classification", "chunked_prefill", "requires_block_allocator", "epoch", "rank", "world_size", "model_type", "vocab_size", "max_positions", "num_blocks", "memory", "capabilities", "adapters", "attention_backend", "linear_backend", "lora_backend", "adapter_bytes", "num_host_blocks", "block_move_s", "elementwise_backend", "vectors", "head")
    REQUIRES_PADDING_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_TYPE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_FIELD_NUMBER: _ClassVar[int]
    PRELOADED_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_GENERATION_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    SUPPORTS_CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    CHUNKED_PREFILL_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_BLOCK_ALLOCATOR_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    LINEAR_BACKEND_FIELD_NUMBER: _ClassVar[int]
    LORA_BACKEND_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_MOVE_S_FIELD_NUMBER: _ClassVar[int]
    ELEMENTWISE_BACKEND_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    requires_padding: bool
    dtype: str
    device_type: str
    window_size: int
    block_size: int
    speculate: int
    preloaded_adapters: _containers.RepeatedCompositeFieldContainer[PreloadedAdapter]
    supports_generation: bool
    supports_embeddings: bool
    supports_classification: bool
    chunked_prefill: bool
    requires_block_allocator: bool
    epoch: int
    rank: int
    world_size: int
    model_type: str
    vocab_size: int
    max_positions: int
    num_blocks: int
    memory: _containers.RepeatedCompositeFieldContainer[MemoryItem]
    capabilities: Capabilities
    adapters: AdapterTiers
    attention_backend: str
    linear_backend: str
    lora_backend: str
    adapter_bytes: int
    num_host_blocks: int
    block_move_s: float
    elementwise_backend: str
    vectors: VectorFacts
    head: HeadFacts
    def __init__(self, requires_padding: bool = ..., dtype: _Optional[str] = ..., device_type: _Optional[str] = ..., window_size: _Optional[int] = ..., block_size: _Optional[int] = ..., speculate: _Optional[int] = ..., preloaded_adapters: _Optional[_Iterable[_Union[PreloadedAdapter, _Mapping]]] = ..., supports_generation: bool = ..., supports_embeddings: bool = ..., supports_classification: bool = ..., chunked_prefill: bool = ..., requires_block_allocator: bool = ..., epoch: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., model_type: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_positions: _Optional[int] = ..., num_blocks: _Optional[int] = ..., memory: _Optional[_Iterable[_Union[MemoryItem, _Mapping]]] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ..., adapters: _Optional[_Union[AdapterTiers, _Mapping]] = ..., attention_backend: _Optional[str] = ..., linear_backend: _Optional[str] = ..., lora_backend: _Optional[str] = ..., adapter_bytes: _Optional[int] = ..., num_host_blocks: _Optional[int] = ..., block_move_s: _Optional[float] = ..., elementwise_backend: _Optional[str] = ..., vectors: _Optional[_Union[VectorFacts, _Mapping]] = ..., head: _Optional[_Union[HeadFacts, _Mapping]] = ...) -> None: ...

class HeadFacts(_message.Message):
    __slots__ = ("pooling", "labels", "scores")
    POOLING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    pooling: Pooling
    labels: _containers.RepeatedScalarFieldContainer[str]
    scores: ScoreKind
    def __init__(self, pooling: _Optional[_Union[Pooling, str]] = ..., labels: _Optional[_Iterable[str]] = ..., scores: _Optional[_Union[ScoreKind, str]] = ...) -> None: ...

class VectorFacts(_message.Message):
    __slots__ = ("pooling", "normalize", "prompts", "default_prompt", "size")
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_PROMPT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    pooling: Pooling
    normalize: bool
    prompts: _containers.ScalarMap[str, str]
    default_prompt: str
    size: int
    def __init__(self, pooling: _Optional[_Union[Pooling, str]] = ..., normalize: bool = ..., prompts: _Optional[_Mapping[str, str]] = ..., default_prompt: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class MemoryItem(_message.Message):
    __slots__ = ("name", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("columns", "max_depth", "swap")
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    MAX_DEPTH_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    columns: bool
    max_depth: int
    swap: bool
    def __init__(self, columns: bool = ..., max_depth: _Optional[int] = ..., swap: bool = ...) -> None: ...

class AdapterTiers(_message.Message):
    __slots__ = ("device", "host", "disk")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    device: _containers.RepeatedCompositeFieldContainer[TierEntry]
    host: _containers.RepeatedCompositeFieldContainer[TierEntry]
    disk: _containers.RepeatedCompositeFieldContainer[TierEntry]
    def __init__(self, device: _Optional[_Iterable[_Union[TierEntry, _Mapping]]] = ..., host: _Optional[_Iterable[_Union[TierEntry, _Mapping]]] = ..., disk: _Optional[_Iterable[_Union[TierEntry, _Mapping]]] = ...) -> None: ...

class TierEntry(_message.Message):
    __slots__ = ("adapter_index", "digest", "bytes")
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    adapter_index: int
    digest: str
    bytes: int
    def __init__(self, adapter_index: _Optional[int] = ..., digest: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class ServiceDiscoveryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServiceDiscoveryResponse(_message.Message):
    __slots__ = ("urls",)
    URLS_FIELD_NUMBER: _ClassVar[int]
    urls: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, urls: _Optional[_Iterable[str]] = ...) -> None: ...

class ClearCacheRequest(_message.Message):
    __slots__ = ("id", "epoch", "seq", "next_epoch")
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    NEXT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    id: int
    epoch: int
    seq: int
    next_epoch: int
    def __init__(self, id: _Optional[int] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., next_epoch: _Optional[int] = ...) -> None: ...

class ClearCacheResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NextTokenChooserParameters(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "typical_p", "do_sample", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty", "watermark", "adapter_id", "schema", "return_k_alternatives", "min_p", "logit_bias_ids", "logit_bias_values", "raw_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    DO_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    RETURN_K_ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    RAW_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    do_sample: bool
    seed: int
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    watermark: bool
    adapter_id: str
    schema: str
    return_k_alternatives: int
    min_p: float
    logit_bias_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    raw_logprobs: bool
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., do_sample: bool = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., watermark: bool = ..., adapter_id: _Optional[str] = ..., schema: _Optional[str] = ..., return_k_alternatives: _Optional[int] = ..., min_p: _Optional[float] = ..., logit_bias_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., raw_logprobs: bool = ...) -> None: ...

class StoppingCriteriaParameters(_message.Message):
    __slots__ = ("max_new_tokens", "stop_sequences", "ignore_eos_token", "stop_token_ids", "min_new_tokens")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    stop_sequences: _containers.RepeatedScalarFieldContainer[str]
    ignore_eos_token: bool
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    min_new_tokens: int
    def __init__(self, max_new_tokens: _Optional[int] = ..., stop_sequences: _Optional[_Iterable[str]] = ..., ignore_eos_token: bool = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., min_new_tokens: _Optional[int] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("data", "mimetype")
    DATA_FIELD_NUMBER: _ClassVar[int]
    MIMETYPE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    mimetype: str
    def __init__(self, data: _Optional[bytes] = ..., mimetype: _Optional[str] = ...) -> None: ...

class InputChunk(_message.Message):
    __slots__ = ("text", "image")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: Image
    def __init__(self, text: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...

class TokenizedInputs(_message.Message):
    __slots__ = ("ids", "input_chunks")
    IDS_FIELD_NUMBER: _ClassVar[int]
    INPUT_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    input_chunks: _containers.RepeatedCompositeFieldContainer[InputChunk]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., input_chunks: _Optional[_Iterable[_Union[InputChunk, _Mapping]]] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "inputs", "tokenized_inputs", "truncate", "parameters", "stopping_parameters", "prefill_logprobs", "adapter_index", "blocks", "slots", "cache_len", "chunk_len", "num_prompt_tokens", "prefill_alternatives", "output", "adapter_start", "pooling", "second_start", "constraint", "traceparent", "tracestate")
    ID_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZED_INPUTS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    STOPPING_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CACHE_LEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_LEN_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_START_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    SECOND_START_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    id: int
    inputs: str
    tokenized_inputs: TokenizedInputs
    truncate: int
    parameters: NextTokenChooserParameters
    stopping_parameters: StoppingCriteriaParameters
    prefill_logprobs: bool
    adapter_index: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    slots: _containers.RepeatedScalarFieldContainer[int]
    cache_len: int
    chunk_len: int
    num_prompt_tokens: int
    prefill_alternatives: int
    output: OutputKind
    adapter_start: int
    pooling: Pooling
    second_start: int
    constraint: Constraint
    traceparent: str
    tracestate: str
    def __init__(self, id: _Optional[int] = ..., inputs: _Optional[str] = ..., tokenized_inputs: _Optional[_Union[TokenizedInputs, _Mapping]] = ..., truncate: _Optional[int] = ..., parameters: _Optional[_Union[NextTokenChooserParameters, _Mapping]] = ..., stopping_parameters: _Optional[_Union[StoppingCriteriaParameters, _Mapping]] = ..., prefill_logprobs: bool = ..., adapter_index: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., slots: _Optional[_Iterable[int]] = ..., cache_len: _Optional[int] = ..., chunk_len: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., prefill_alternatives: _Optional[int] = ..., output: _Optional[_Union[OutputKind, str]] = ..., adapter_start: _Optional[int] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., second_start: _Optional[int] = ..., constraint: _Optional[_Union[Constraint, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class Constraint(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: ConstraintKind
    text: str
    def __init__(self, kind: _Optional[_Union[ConstraintKind, str]] = ..., text: _Optional[str] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("id", "requests", "size", "max_tokens", "max_blocks")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    id: int
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    size: int
    max_tokens: int
    max_blocks: int
    def __init__(self, id: _Optional[int] = ..., requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., size: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_blocks: _Optional[int] = ...) -> None: ...

class CachedBatch(_message.Message):
    __slots__ = ("id", "request_ids", "size", "max_tokens", "current_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CURRENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    request_ids: _containers.RepeatedScalarFieldContainer[int]
    size: int
    max_tokens: int
    current_tokens: int
    def __init__(self, id: _Optional[int] = ..., request_ids: _Optional[_Iterable[int]] = ..., size: _Optional[int] = ..., max_tokens: _Optional[int] = ..., current_tokens: _Optional[int] = ...) -> None: ...

class GeneratedText(_message.Message):
    __slots__ = ("text", "generated_tokens", "skipped_tokens", "finish_reason", "seed")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    text: str
    generated_tokens: int
    skipped_tokens: int
    finish_reason: FinishReason
    seed: int
    def __init__(self, text: _Optional[str] = ..., generated_tokens: _Optional[int] = ..., skipped_tokens: _Optional[int] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., seed: _Optional[int] = ...) -> None: ...

class AlternativeTokens(_message.Message):
    __slots__ = ("ids", "logprobs", "texts")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., texts: _Optional[_Iterable[str]] = ...) -> None: ...

class NextTokens(_message.Message):
    __slots__ = ("ids", "logprobs", "texts", "is_special", "alternative_tokens")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    IS_SPECIAL_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    texts: _containers.RepeatedScalarFieldContainer[str]
    is_special: _containers.RepeatedScalarFieldContainer[bool]
    alternative_tokens: _containers.RepeatedCompositeFieldContainer[AlternativeTokens]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., texts: _Optional[_Iterable[str]] = ..., is_special: _Optional[_Iterable[bool]] = ..., alternative_tokens: _Optional[_Iterable[_Union[AlternativeTokens, _Mapping]]] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("request_id", "prefill_tokens", "next_tokens", "generated_text", "prefill_tokens_length")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TEXT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_LENGTH_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    prefill_tokens: NextTokens
    next_tokens: NextTokens
    generated_text: GeneratedText
    prefill_tokens_length: int
    def __init__(self, request_id: _Optional[int] = ..., prefill_tokens: _Optional[_Union[NextTokens, _Mapping]] = ..., next_tokens: _Optional[_Union[NextTokens, _Mapping]] = ..., generated_text: _Optional[_Union[GeneratedText, _Mapping]] = ..., prefill_tokens_length: _Optional[int] = ...) -> None: ...

class FilterBatchRequest(_message.Message):
    __slots__ = ("batch_id", "request_ids", "epoch", "seq")
    BATCH_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    batch_id: int
    request_ids: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    seq: int
    def __init__(self, batch_id: _Optional[int] = ..., request_ids: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ...) -> None: ...

class FilterBatchResponse(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: CachedBatch
    def __init__(self, batch: _Optional[_Union[CachedBatch, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("row_ids", "num_tokens", "num_new_blocks", "new_blocks", "drop", "activate", "deactivate", "copies")
    ROW_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    ACTIVATE_FIELD_NUMBER: _ClassVar[int]
    DEACTIVATE_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    row_ids: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    num_new_blocks: _containers.RepeatedScalarFieldContainer[int]
    new_blocks: _containers.RepeatedScalarFieldContainer[int]
    drop: _containers.RepeatedScalarFieldContainer[int]
    activate: _containers.RepeatedScalarFieldContainer[int]
    deactivate: _containers.RepeatedScalarFieldContainer[int]
    copies: _containers.RepeatedCompositeFieldContainer[BlockCopy]
    def __init__(self, row_ids: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., num_new_blocks: _Optional[_Iterable[int]] = ..., new_blocks: _Optional[_Iterable[int]] = ..., drop: _Optional[_Iterable[int]] = ..., activate: _Optional[_Iterable[int]] = ..., deactivate: _Optional[_Iterable[int]] = ..., copies: _Optional[_Iterable[_Union[BlockCopy, _Mapping]]] = ...) -> None: ...

class BlockCopy(_message.Message):
    __slots__ = ("source_space", "source_block", "destination_space", "destination_block")
    SOURCE_SPACE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BLOCK_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_SPACE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_BLOCK_FIELD_NUMBER: _ClassVar[int]
    source_space: BlockSpace
    source_block: int
    destination_space: BlockSpace
    destination_block: int
    def __init__(self, source_space: _Optional[_Union[BlockSpace, str]] = ..., source_block: _Optional[int] = ..., destination_space: _Optional[_Union[BlockSpace, str]] = ..., destination_block: _Optional[int] = ...) -> None: ...

class Columns(_message.Message):
    __slots__ = ("request_ids", "num_tokens", "finish", "token_ids", "logprobs", "texts", "special", "details", "inactive", "num_drafted", "failed", "failure", "drafted_ids", "drafted")
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    SPECIAL_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    INACTIVE_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_IDS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    finish: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    texts: _containers.RepeatedScalarFieldContainer[str]
    special: _containers.RepeatedScalarFieldContainer[bool]
    details: _containers.RepeatedCompositeFieldContainer[RowDetail]
    inactive: _containers.RepeatedCompositeFieldContainer[InactiveAdapter]
    num_drafted: int
    failed: _containers.RepeatedScalarFieldContainer[int]
    failure: str
    drafted_ids: _containers.RepeatedScalarFieldContainer[int]
    drafted: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_ids: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., finish: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., texts: _Optional[_Iterable[str]] = ..., special: _Optional[_Iterable[bool]] = ..., details: _Optional[_Iterable[_Union[RowDetail, _Mapping]]] = ..., inactive: _Optional[_Iterable[_Union[InactiveAdapter, _Mapping]]] = ..., num_drafted: _Optional[int] = ..., failed: _Optional[_Iterable[int]] = ..., failure: _Optional[str] = ..., drafted_ids: _Optional[_Iterable[int]] = ..., drafted: _Optional[_Iterable[int]] = ...) -> None: ...

class InactiveAdapter(_message.Message):
    __slots__ = ("adapter_index", "text")
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    adapter_index: int
    text: str
    def __init__(self, adapter_index: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class RowDetail(_message.Message):
    __slots__ = ("request_id", "generated_text", "alternative_tokens", "prefill_tokens", "error_code", "error_text", "vector")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TEXT_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_TEXT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    generated_text: str
    alternative_tokens: _containers.RepeatedCompositeFieldContainer[AlternativeTokens]
    prefill_tokens: NextTokens
    error_code: str
    error_text: str
    vector: bytes
    def __init__(self, request_id: _Optional[int] = ..., generated_text: _Optional[str] = ..., alternative_tokens: _Optional[_Iterable[_Union[AlternativeTokens, _Mapping]]] = ..., prefill_tokens: _Optional[_Union[NextTokens, _Mapping]] = ..., error_code: _Optional[str] = ..., error_text: _Optional[str] = ..., vector: _Optional[bytes] = ...) -> None: ...

class StepTiming(_message.Message):
    __slots__ = ("queue_ns", "forward_ns", "total_ns")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    forward_ns: int
    total_ns: int
    def __init__(self, queue_ns: _Optional[int] = ..., forward_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("batch", "cached_batch", "epoch", "seq", "step")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CACHED_BATCH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    cached_batch: CachedBatch
    epoch: int
    seq: int
    step: Step
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ..., cached_batch: _Optional[_Union[CachedBatch, _Mapping]] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("generations", "batch", "columns", "timing")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    batch: CachedBatch
    columns: Columns
    timing: StepTiming
    def __init__(self, generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., batch: _Optional[_Union[CachedBatch, _Mapping]] = ..., columns: _Optional[_Union[Columns, _Mapping]] = ..., timing: _Optional[_Union[StepTiming, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("batches", "epoch", "seq", "step")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[CachedBatch]
    epoch: int
    seq: int
    step: Step
    def __init__(self, batches: _Optional[_Iterable[_Union[CachedBatch, _Mapping]]] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("generations", "batch", "columns", "timing")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    batch: CachedBatch
    columns: Columns
    timing: StepTiming
    def __init__(self, generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., batch: _Optional[_Union[CachedBatch, _Mapping]] = ..., columns: _Optional[_Union[Columns, _Mapping]] = ..., timing: _Optional[_Union[StepTiming, _Mapping]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("request_id", "values")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[int] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("embeddings", "errorMsg")
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    ERRORMSG_FIELD_NUMBER: _ClassVar[int]
    embeddings: _containers.RepeatedCompositeFieldContainer[Embedding]
    errorMsg: str
    def __init__(self, embeddings: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., errorMsg: _Optional[str] = ...) -> None: ...

class Entity(_message.Message):
    __slots__ = ("entity", "score", "index", "word", "start", "end")
    ENTITY_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    entity: str
    score: float
    index: int
    word: str
    start: int
    end: int
    def __init__(self, entity: _Optional[str] = ..., score: _Optional[float] = ..., index: _Optional[int] = ..., word: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class EntityList(_message.Message):
    __slots__ = ("request_id", "entities", "input_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    INPUT_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    entities: _containers.RepeatedCompositeFieldContainer[Entity]
    input_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[int] = ..., entities: _Optional[_Iterable[_Union[Entity, _Mapping]]] = ..., input_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ClassifyPredictionList(_message.Message):
    __slots__ = ("request_id", "predictions", "scores")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    predictions: _containers.RepeatedScalarFieldContainer[str]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, request_id: _Optional[int] = ..., predictions: _Optional[_Iterable[str]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("batch",)
    BATCH_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("classify_prediction_lists", "errorMsg")
    CLASSIFY_PREDICTION_LISTS_FIELD_NUMBER: _ClassVar[int]
    ERRORMSG_FIELD_NUMBER: _ClassVar[int]
    classify_prediction_lists: _containers.RepeatedCompositeFieldContainer[ClassifyPredictionList]
    errorMsg: str
    def __init__(self, classify_prediction_lists: _Optional[_Iterable[_Union[ClassifyPredictionList, _Mapping]]] = ..., errorMsg: _Optional[str] = ...) -> None: ...

class WarmupRequest(_message.Message):
    __slots__ = ("batch", "max_input_length", "max_prefill_tokens", "max_new_tokens", "epoch", "seq", "max_rows", "max_blocks", "required_tokens")
    BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_INPUT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    batch: Batch
    max_input_length: int
    max_prefill_tokens: int
    max_new_tokens: int
    epoch: int
    seq: int
    max_rows: int
    max_blocks: int
    required_tokens: int
    def __init__(self, batch: _Optional[_Union[Batch, _Mapping]] = ..., max_input_length: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_blocks: _Optional[int] = ..., required_tokens: _Optional[int] = ...) -> None: ...

class WarmupResponse(_message.Message):
    __slots__ = ("max_supported_total_tokens", "num_blocks")
    MAX_SUPPORTED_TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    max_supported_total_tokens: int
    num_blocks: int
    def __init__(self, max_supported_total_tokens: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class AdapterParameters(_message.Message):
    __slots__ = ("adapter_ids", "weights", "merge_strategy", "density", "majority_sign_method")
    ADAPTER_IDS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MERGE_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_METHOD_FIELD_NUMBER: _ClassVar[int]
    adapter_ids: _containers.RepeatedScalarFieldContainer[str]
    weights: _containers.RepeatedScalarFieldContainer[float]
    merge_strategy: MergeStrategy
    density: float
    majority_sign_method: MajoritySignMethod
    def __init__(self, adapter_ids: _Optional[_Iterable[str]] = ..., weights: _Optional[_Iterable[float]] = ..., merge_strategy: _Optional[_Union[MergeStrategy, str]] = ..., density: _Optional[float] = ..., majority_sign_method: _Optional[_Union[MajoritySignMethod, str]] = ...) -> None: ...

class DownloadAdapterRequest(_message.Message):
    __slots__ = ("adapter_parameters", "adapter_source", "api_token", "revision", "refresh", "explain", "wanted")
    ADAPTER_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SOURCE_FIELD_NUMBER: _ClassVar[int]
    API_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    adapter_parameters: AdapterParameters
    adapter_source: AdapterSource
    api_token: str
    revision: str
    refresh: bool
    explain: bool
    wanted: FetchedAdapter
    def __init__(self, adapter_parameters: _Optional[_Union[AdapterParameters, _Mapping]] = ..., adapter_source: _Optional[_Union[AdapterSource, str]] = ..., api_token: _Optional[str] = ..., revision: _Optional[str] = ..., refresh: bool = ..., explain: bool = ..., wanted: _Optional[_Union[FetchedAdapter, _Mapping]] = ...) -> None: ...

class DownloadAdapterResponse(_message.Message):
    __slots__ = ("downloaded", "memory_fraction", "fetched", "failure")
    DOWNLOADED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FRACTION_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    downloaded: bool
    memory_fraction: float
    fetched: FetchedAdapter
    failure: AdapterFailure
    def __init__(self, downloaded: bool = ..., memory_fraction: _Optional[float] = ..., fetched: _Optional[_Union[FetchedAdapter, _Mapping]] = ..., failure: _Optional[_Union[AdapterFailure, _Mapping]] = ...) -> None: ...

class FetchedAdapter(_message.Message):
    __slots__ = ("version", "part", "disk_bytes", "device_bytes", "max_rank", "vocab_size", "access", "valid_s", "downloaded", "stale", "timings", "text_files", "warnings", "id", "invocation_ids", "head")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    VALID_S_FIELD_NUMBER: _ClassVar[int]
    DOWNLOADED_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FILES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    INVOCATION_IDS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    version: str
    part: AdapterPart
    disk_bytes: int
    device_bytes: int
    max_rank: int
    vocab_size: int
    access: str
    valid_s: float
    downloaded: bool
    stale: bool
    timings: _containers.RepeatedCompositeFieldContainer[PhaseTime]
    text_files: _containers.RepeatedScalarFieldContainer[str]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    id: str
    invocation_ids: _containers.RepeatedScalarFieldContainer[int]
    head: HeadFacts
    def __init__(self, version: _Optional[str] = ..., part: _Optional[_Union[AdapterPart, _Mapping]] = ..., disk_bytes: _Optional[int] = ..., device_bytes: _Optional[int] = ..., max_rank: _Optional[int] = ..., vocab_size: _Optional[int] = ..., access: _Optional[str] = ..., valid_s: _Optional[float] = ..., downloaded: bool = ..., stale: bool = ..., timings: _Optional[_Iterable[_Union[PhaseTime, _Mapping]]] = ..., text_files: _Optional[_Iterable[str]] = ..., warnings: _Optional[_Iterable[str]] = ..., id: _Optional[str] = ..., invocation_ids: _Optional[_Iterable[int]] = ..., head: _Optional[_Union[HeadFacts, _Mapping]] = ...) -> None: ...

class PhaseTime(_message.Message):
    __slots__ = ("phase", "seconds")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    phase: str
    seconds: float
    def __init__(self, phase: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class AdapterFailure(_message.Message):
    __slots__ = ("reason", "text", "retry_after_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    reason: str
    text: str
    retry_after_s: float
    def __init__(self, reason: _Optional[str] = ..., text: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class AdapterPart(_message.Message):
    __slots__ = ("content_digest", "store_digest")
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STORE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    content_digest: str
    store_digest: str
    def __init__(self, content_digest: _Optional[str] = ..., store_digest: _Optional[str] = ...) -> None: ...

class AdapterContent(_message.Message):
    __slots__ = ("parts", "merge")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    parts: _containers.RepeatedCompositeFieldContainer[AdapterPart]
    merge: AdapterMerge
    def __init__(self, parts: _Optional[_Iterable[_Union[AdapterPart, _Mapping]]] = ..., merge: _Optional[_Union[AdapterMerge, _Mapping]] = ...) -> None: ...

class AdapterMerge(_message.Message):
    __slots__ = ("weights", "combination", "density", "majority_sign")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    COMBINATION_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedScalarFieldContainer[float]
    combination: str
    density: float
    majority_sign: str
    def __init__(self, weights: _Optional[_Iterable[float]] = ..., combination: _Optional[str] = ..., density: _Optional[float] = ..., majority_sign: _Optional[str] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("adapter_parameters", "adapter_source", "adapter_index", "api_token", "epoch", "content")
    ADAPTER_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    API_TOKEN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    adapter_parameters: AdapterParameters
    adapter_source: AdapterSource
    adapter_index: int
    api_token: str
    epoch: int
    content: AdapterContent
    def __init__(self, adapter_parameters: _Optional[_Union[AdapterParameters, _Mapping]] = ..., adapter_source: _Optional[_Union[AdapterSource, str]] = ..., adapter_index: _Optional[int] = ..., api_token: _Optional[str] = ..., epoch: _Optional[int] = ..., content: _Optional[_Union[AdapterContent, _Mapping]] = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("loaded", "device_bytes", "parse_s", "copy_s", "failure")
    LOADED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARSE_S_FIELD_NUMBER: _ClassVar[int]
    COPY_S_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    loaded: bool
    device_bytes: int
    parse_s: float
    copy_s: float
    failure: AdapterFailure
    def __init__(self, loaded: bool = ..., device_bytes: _Optional[int] = ..., parse_s: _Optional[float] = ..., copy_s: _Optional[float] = ..., failure: _Optional[_Union[AdapterFailure, _Mapping]] = ...) -> None: ...

class OffloadAdapterRequest(_message.Message):
    __slots__ = ("adapter_parameters", "adapter_source", "adapter_index", "epoch", "forget")
    ADAPTER_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SOURCE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_INDEX_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    adapter_parameters: AdapterParameters
    adapter_source: AdapterSource
    adapter_index: int
    epoch: int
    forget: _containers.RepeatedCompositeFieldContainer[AdapterPart]
    def __init__(self, adapter_parameters: _Optional[_Union[AdapterParameters, _Mapping]] = ..., adapter_source: _Optional[_Union[AdapterSource, str]] = ..., adapter_index: _Optional[int] = ..., epoch: _Optional[int] = ..., forget: _Optional[_Iterable[_Union[AdapterPart, _Mapping]]] = ...) -> None: ...

class OffloadAdapterResponse(_message.Message):
    __slots__ = ("offloaded",)
    OFFLOADED_FIELD_NUMBER: _ClassVar[int]
    offloaded: bool
    def __init__(self, offloaded: bool = ...) -> None: ...

class AdapterTextRequest(_message.Message):
    __slots__ = ("store_digest", "names", "epoch")
    STORE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    store_digest: str
    names: _containers.RepeatedScalarFieldContainer[str]
    epoch: int
    def __init__(self, store_digest: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., epoch: _Optional[int] = ...) -> None: ...

class AdapterTextResponse(_message.Message):
    __slots__ = ("files", "failure")
    FILES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[TextFile]
    failure: AdapterFailure
    def __init__(self, files: _Optional[_Iterable[_Union[TextFile, _Mapping]]] = ..., failure: _Optional[_Union[AdapterFailure, _Mapping]] = ...) -> None: ...

class ReadAdapterRequest(_message.Message):
    __slots__ = ("part", "file", "offset")
    PART_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    part: AdapterPart
    file: int
    offset: int
    def __init__(self, part: _Optional[_Union[AdapterPart, _Mapping]] = ..., file: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class ReadAdapterResponse(_message.Message):
    __slots__ = ("files", "content", "failure")
    FILES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[EntryFile]
    content: bytes
    failure: AdapterFailure
    def __init__(self, files: _Optional[_Iterable[_Union[EntryFile, _Mapping]]] = ..., content: _Optional[bytes] = ..., failure: _Optional[_Union[AdapterFailure, _Mapping]] = ...) -> None: ...

class EntryFile(_message.Message):
    __slots__ = ("name", "size", "sha256", "is_derived")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    IS_DERIVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    is_derived: bool
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ..., is_derived: bool = ...) -> None: ...

class TextFile(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class PrepareConstraintRequest(_message.Message):
    __slots__ = ("constraint", "content", "epoch")
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    constraint: Constraint
    content: AdapterContent
    epoch: int
    def __init__(self, constraint: _Optional[_Union[Constraint, _Mapping]] = ..., content: _Optional[_Union[AdapterContent, _Mapping]] = ..., epoch: _Optional[int] = ...) -> None: ...

class PrepareConstraintResponse(_message.Message):
    __slots__ = ("refusal", "failure")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    failure: AdapterFailure
    def __init__(self, refusal: _Optional[str] = ..., failure: _Optional[_Union[AdapterFailure, _Mapping]] = ...) -> None: ...
