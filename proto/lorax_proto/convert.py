"""Step values on the wire and back: ``*_to_proto`` and ``*_from_proto`` pairs.

Router and shard speak the values of ``lorax_contract.step``; only this module
knows both them and the messages. Columns are handed over as whole lists, so a
step costs a few calls and not one per row. The wire carries floats in single
precision: parameters and logprobs come back rounded to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    UNSAMPLED,
    AdapterHandle,
    Alternatives,
    BlockCopy,
    BlockId,
    LogitBias,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    RowDetail,
    SamplingParams,
    ShardInfo,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
    WarmupSpec,
)
from lorax_contract.tracing import read_context
from lorax_proto import generate_pb2 as pb
from lorax_proto.pooled import (
    head_from_proto,
    head_to_proto,
    known,
    vector_facts_from_proto,
    vector_facts_to_proto,
)

StepReply = TypeVar("StepReply", pb.PrefillResponse, pb.DecodeResponse)


def step_to_proto(plan: StepPlan, epoch: int) -> pb.PrefillRequest | pb.DecodeRequest:
    """Return the request of a step: Prefill when rows enter, Decode otherwise."""
    step = pb.Step(
        row_ids=plan.row_ids,
        num_tokens=plan.num_tokens,
        num_new_blocks=plan.num_new_blocks,
        new_blocks=plan.new_blocks,
    )
    if plan.drop:
        step.drop.extend(plan.drop)
    if plan.activate:
        step.activate.extend(plan.activate)
    if plan.deactivate:
        step.deactivate.extend(plan.deactivate)
    if plan.copies:
        step.copies.extend(_copy_to_proto(copy) for copy in plan.copies)
    if not plan.new_rows:
        return pb.DecodeRequest(epoch=epoch, seq=plan.seq, step=step)
    batch = pb.Batch(
        id=plan.seq,
        requests=[new_row_to_proto(row) for row in plan.new_rows],
        size=len(plan.new_rows),
    )
    return pb.PrefillRequest(batch=batch, epoch=epoch, seq=plan.seq, step=step)


def step_from_proto(message: pb.PrefillRequest | pb.DecodeRequest) -> StepPlan:
    """Return the plan of a request that has ``step`` and ``seq`` set."""
    step = message.step
    rows = message.batch.requests if isinstance(message, pb.PrefillRequest) else ()
    return StepPlan(
        seq=message.seq,
        row_ids=cast(list[RequestId], step.row_ids[:]),
        num_tokens=step.num_tokens[:],
        num_new_blocks=step.num_new_blocks[:],
        new_blocks=cast(list[BlockId], step.new_blocks[:]),
        new_rows=[new_row_from_proto(row) for row in rows],
        drop=cast(list[RequestId], step.drop[:]),
        activate=cast(list[AdapterHandle], step.activate[:]),
        deactivate=cast(list[AdapterHandle], step.deactivate[:]),
        copies=[_copy_from_proto(copy) for copy in step.copies],
    )


def new_row_to_proto(row: NewRow) -> pb.Request:
    """Return a row that enters; ids after ``num_prompt_tokens`` are its past output."""
    spec = row.spec
    request = pb.Request(
        id=spec.request_id,
        stopping_parameters=_stopping_to_proto(spec.stopping),
        prefill_logprobs=spec.sampling.prompt_logprobs,
        adapter_index=spec.adapter,
        num_prompt_tokens=len(spec.prompt_ids),
        prefill_alternatives=spec.sampling.num_prompt_alternatives,
        output=pb.OutputKind.Name(spec.output),
        pooling=pb.Pooling.Name(spec.pooling),
        second_start=spec.second_start,
        cache_len=row.num_cached,
        adapter_start=spec.adapter_start,
    )
    if spec.sampling is not UNSAMPLED:
        request.parameters.CopyFrom(_sampling_to_proto(spec.sampling))
    ids = request.tokenized_inputs.ids
    ids.extend(spec.prompt_ids)
    ids.extend(row.output_ids)
    if spec.constraint is not None:
        request.constraint.CopyFrom(constraint_to_proto(spec.constraint))
    if spec.trace is not None:
        request.traceparent, request.tracestate = spec.trace.traceparent, spec.trace.state
    return request


def new_row_from_proto(request: pb.Request) -> NewRow:
    """Return the row of a request with token ids; without ``num_prompt_tokens`` all are prompt.

    Raises ValidationError for a kind of output, or of pooling, that is unknown.
    """
    ids = request.tokenized_inputs.ids[:]
    has_past = request.HasField("num_prompt_tokens")
    num_prompt = request.num_prompt_tokens if has_past else len(ids)
    spec = RequestSpec(
        request_id=RequestId(request.id),
        prompt_ids=ids[:num_prompt],
        sampling=_sampling_from_proto(request),
        stopping=_stopping_from_proto(request.stopping_parameters),
        adapter=AdapterHandle(request.adapter_index),
        adapter_start=request.adapter_start if request.HasField("adapter_start") else None,
        output=known(OutputKind, request.output, "an output"),
        pooling=known(Pooling, request.pooling, "a pooling"),
        second_start=request.second_start,
        constraint=constraint_from_proto(request.constraint)
        if request.HasField("constraint")
        else None,
        trace=read_context(request.traceparent, request.tracestate)
        if request.traceparent
        else None,
    )
    return NewRow(spec, ids[num_prompt:], request.cache_len)


def constraint_to_proto(constraint: Constraint) -> pb.Constraint:
    """Return what an output is bound to."""
    return pb.Constraint(kind=pb.ConstraintKind.Name(constraint.kind.value), text=constraint.text)


def constraint_from_proto(message: pb.Constraint) -> Constraint:
    """Return what an output is bound to; raises ValidationError for a kind that is unknown."""
    try:
        return Constraint(kind=ConstraintKind(message.kind), text=message.text)
    except ValueError:
        raise ValidationError(f"a constraint of the kind {message.kind} is not known") from None


def _sampling_to_proto(params: SamplingParams) -> pb.NextTokenChooserParameters:
    return pb.NextTokenChooserParameters(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        typical_p=params.typical_p,
        do_sample=params.do_sample,
        seed=params.seed,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        return_k_alternatives=params.num_alternatives,
        min_p=params.min_p,
        watermark=params.watermark,
        logit_bias_ids=params.logit_bias.ids,
        logit_bias_values=params.logit_bias.values,
        raw_logprobs=params.raw_logprobs,
    )


def _sampling_from_proto(request: pb.Request) -> SamplingParams:
    if not request.HasField("parameters"):
        return UNSAMPLED
    params = request.parameters
    return SamplingParams(
        do_sample=params.do_sample,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        typical_p=params.typical_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seed=params.seed,
        logit_bias=logit_bias_from_proto(params),
        watermark=params.watermark,
        num_alternatives=params.return_k_alternatives,
        raw_logprobs=params.raw_logprobs,
        prompt_logprobs=request.prefill_logprobs,
        num_prompt_alternatives=request.prefill_alternatives,
    )


def logit_bias_from_proto(params: pb.NextTokenChooserParameters) -> LogitBias:
    """Return the logit bias of a request's parameters, as it came."""
    return LogitBias(tuple(params.logit_bias_ids), tuple(params.logit_bias_values))


def _stopping_to_proto(params: StoppingParams) -> pb.StoppingCriteriaParameters:
    return pb.StoppingCriteriaParameters(
        max_new_tokens=params.max_new_tokens,
        stop_sequences=params.stop_sequences,
        ignore_eos_token=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        min_new_tokens=params.min_new_tokens,
    )


def _stopping_from_proto(params: pb.StoppingCriteriaParameters) -> StoppingParams:
    return StoppingParams(
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens,
        stop_sequences=tuple(params.stop_sequences),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos_token,
    )


def _copy_to_proto(copy: BlockCopy) -> pb.BlockCopy:
    return pb.BlockCopy(
        source_space=pb.BlockSpace.Name(copy.source_space),
        source_block=copy.source_block,
        destination_space=pb.BlockSpace.Name(copy.destination_space),
        destination_block=copy.destination_block,
    )


def _copy_from_proto(copy: pb.BlockCopy) -> BlockCopy:
    return BlockCopy(
        int(copy.source_space),
        copy.source_block,
        int(copy.destination_space),
        copy.destination_block,
    )


def outcome_to_proto(outcome: StepOutcome, reply_type: type[StepReply]) -> StepReply:
    """Return a step's reply as columns; ``reply_type`` is that of the RPC that was called."""
    reply = reply_type()
    # Written where they stay: a message that is put into another is copied.
    columns, tokens = reply.columns, outcome.tokens
    columns.request_ids.extend(outcome.row_ids)
    columns.num_tokens.extend(outcome.num_tokens)
    columns.finish.extend(outcome.finish)
    columns.token_ids.extend(tokens.ids)
    columns.logprobs.extend(tokens.logprobs)
    columns.texts.extend(tokens.texts)
    columns.special.extend(tokens.special)
    columns.num_drafted = outcome.num_drafted
    if outcome.drafted:
        columns.drafted_ids.extend(outcome.drafted)
        columns.drafted.extend(outcome.drafted.values())
    if outcome.details:
        columns.details.extend(_details_to_proto(outcome.details))
    for handle, text in outcome.inactive.items():
        columns.inactive.add(adapter_index=handle, text=text)
    columns.failed.extend(outcome.failed)
    columns.failure = outcome.failure
    reply.timing.forward_ns = outcome.forward_ns
    reply.timing.total_ns = outcome.total_ns
    return reply


def outcome_from_proto(message: pb.PrefillResponse | pb.DecodeResponse, seq: int) -> StepOutcome:
    """Return the outcome of step ``seq`` from its reply in columns."""
    columns, timing = message.columns, message.timing
    return StepOutcome(
        seq=seq,
        row_ids=cast(list[RequestId], columns.request_ids[:]),
        num_tokens=columns.num_tokens[:],
        finish=columns.finish[:],
        tokens=_UnreadTokens(columns),
        details={
            RequestId(detail.request_id): _detail_from_proto(detail) for detail in columns.details
        },
        inactive={AdapterHandle(each.adapter_index): each.text for each in columns.inactive},
        forward_ns=timing.forward_ns,
        total_ns=timing.total_ns,
        num_drafted=columns.num_drafted,
        drafted=dict(zip(cast(list[RequestId], columns.drafted_ids[:]), columns.drafted[:])),
        failed=cast(list[RequestId], columns.failed[:]),
        failure=columns.failure,
    )


class _UnreadTokens(TokenColumns):
    """Tokens of a reply, read from its message when they are first asked for.

    The next step waits for who has a token or an end, not for which tokens they are.
    """

    __slots__ = ("_columns",)

    def __init__(self, columns: pb.Columns) -> None:
        self._columns: pb.Columns | None = columns

    def __getattr__(self, name: str) -> Any:
        """Fill the columns, none of which is there yet."""
        columns = self._columns if name in TokenColumns.__slots__ else None
        if columns is None:
            raise AttributeError(name)
        self.ids, self.logprobs = columns.token_ids[:], columns.logprobs[:]
        self.texts, self.special = columns.texts[:], columns.special[:]
        self._columns = None
        return getattr(self, name)

    def __eq__(self, other: object) -> bool:
        """Whether the tokens are the same, read by now or not."""
        if not isinstance(other, TokenColumns):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in TokenColumns.__slots__)

    __hash__ = None  # type: ignore[assignment]


def _details_to_proto(details: Mapping[RequestId, RowDetail]) -> Iterable[pb.RowDetail]:
    for request_id, detail in details.items():
        message = pb.RowDetail(
            request_id=request_id,
            generated_text=detail.generated_text,
            alternative_tokens=_alternatives_to_proto(detail.alternatives),
            error_code=detail.error_code,
            error_text=detail.error_text,
            vector=detail.vector,
        )
        if (prompt := detail.prompt_tokens) is not None:
            message.prefill_tokens.CopyFrom(prompt_to_proto(prompt, detail.prompt_alternatives))
        yield message


def _detail_from_proto(message: pb.RowDetail) -> RowDetail:
    has = message.HasField
    return RowDetail(
        generated_text=message.generated_text if has("generated_text") else None,
        alternatives=_alternatives_from_proto(message.alternative_tokens),
        prompt_tokens=tokens_from_proto(message.prefill_tokens) if has("prefill_tokens") else None,
        prompt_alternatives=_alternatives_from_proto(message.prefill_tokens.alternative_tokens),
        error_code=message.error_code if has("error_code") else None,
        error_text=message.error_text if has("error_text") else None,
        vector=message.vector if has("vector") else None,
    )


def _alternatives_to_proto(alternatives: Iterable[Alternatives]) -> list[pb.AlternativeTokens]:
    return [
        pb.AlternativeTokens(ids=some.ids, logprobs=some.logprobs, texts=some.texts)
        for some in alternatives
    ]


def _alternatives_from_proto(messages: Iterable[pb.AlternativeTokens]) -> list[Alternatives]:
    return [Alternatives(some.ids[:], some.logprobs[:], some.texts[:]) for some in messages]


def prompt_to_proto(
    tokens: TokenColumns, alternatives: Iterable[Alternatives] = ()
) -> pb.NextTokens:
    """Return the tokens of a prompt, with alternatives to each if there are any."""
    message = tokens_to_proto(tokens)
    message.alternative_tokens.extend(_alternatives_to_proto(alternatives))
    return message


def tokens_to_proto(tokens: TokenColumns) -> pb.NextTokens:
    """Return token columns as the message that LoRAX's interface uses for them."""
    return pb.NextTokens(
        ids=tokens.ids, logprobs=tokens.logprobs, texts=tokens.texts, is_special=tokens.special
    )


def tokens_from_proto(message: pb.NextTokens) -> TokenColumns:
    """Return the columns of LoRAX's message for tokens."""
    return TokenColumns(
        message.ids[:], message.logprobs[:], message.texts[:], message.is_special[:]
    )


def info_to_proto(info: ShardInfo, *, rank: int = 0) -> pb.InfoResponse:
    """Return what one rank says of itself; the addresses travel by ServiceDiscovery."""
    return pb.InfoResponse(
        dtype=info.dtype,
        device_type=info.device_type,
        window_size=info.window_size,
        block_size=info.block_size,
        supports_generation=info.generates,
        supports_embeddings=True,
        supports_classification=info.head is not None,
        chunked_prefill=not info.is_encoder,
        requires_block_allocator=True,
        epoch=info.epoch,
        rank=rank,
        world_size=info.world_size,
        speculate=info.speculative_tokens,
        model_type=info.model_type,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        num_blocks=info.num_blocks,
        memory=[pb.MemoryItem(name=name, bytes=size) for name, size in info.memory],
        capabilities=pb.Capabilities(
            columns=True, max_depth=info.max_depth, swap=info.num_host_blocks > 0
        ),
        attention_backend=info.attention_backend,
        linear_backend=info.linear_backend,
        elementwise_backend=info.elementwise_backend,
        lora_backend=info.lora_backend,
        adapter_bytes=info.adapter_bytes,
        num_host_blocks=info.num_host_blocks,
        block_move_s=info.block_move_s,
        vectors=vector_facts_to_proto(info.vectors),
        head=None if info.head is None else head_to_proto(info.head),
    )


def info_from_proto(message: pb.InfoResponse, shard_uris: Sequence[str] = ()) -> ShardInfo:
    """Return what a rank said of itself, with the addresses that were discovered."""
    return ShardInfo(
        epoch=message.epoch,
        world_size=message.world_size,
        model_type=message.model_type,
        dtype=message.dtype,
        device_type=message.device_type,
        block_size=message.block_size,
        vocab_size=message.vocab_size,
        max_positions=message.max_positions,
        num_blocks=message.num_blocks,
        max_depth=message.capabilities.max_depth,
        speculative_tokens=message.speculate,
        window_size=message.window_size if message.HasField("window_size") else None,
        attention_backend=message.attention_backend,
        linear_backend=message.linear_backend,
        elementwise_backend=message.elementwise_backend,
        lora_backend=message.lora_backend,
        adapter_bytes=message.adapter_bytes,
        num_host_blocks=message.num_host_blocks,
        block_move_s=message.block_move_s,
        memory=tuple((item.name, item.bytes) for item in message.memory),
        is_encoder=not message.chunked_prefill,
        generates=message.supports_generation,
        vectors=vector_facts_from_proto(message.vectors),
        head=head_from_proto(message.head) if message.HasField("head") else None,
        shard_uris=tuple(shard_uris),
    )


def warmup_to_proto(spec: WarmupSpec, epoch: int) -> pb.WarmupRequest:
    """Return the request to size the KV pool for the largest step."""
    return pb.WarmupRequest(
        max_input_length=spec.max_input_length,
        max_prefill_tokens=spec.max_step_tokens,
        max_new_tokens=spec.max_total_tokens - spec.max_input_length,
        epoch=epoch,
        max_rows=spec.max_rows,
        max_blocks=spec.max_blocks,
        required_tokens=spec.required_tokens,
    )


def warmup_from_proto(message: pb.WarmupRequest) -> WarmupSpec:
    """Return the largest step; a LoRAX caller names no rows: ``max_rows`` is then 0."""
    return WarmupSpec(
        max_input_length=message.max_input_length,
        max_total_tokens=message.max_input_length + message.max_new_tokens,
        max_step_tokens=message.max_prefill_tokens,
        max_rows=message.max_rows,
        max_blocks=message.max_blocks,
        required_tokens=message.required_tokens,
    )
