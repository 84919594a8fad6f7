"""Reads LoRAX's requests: a proto3 zero means "off", text may come untokenized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorax_contract.constraint import Constraint, ConstraintKind
from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling
from lorax_contract.step import (
    AdapterHandle,
    BlockId,
    NewRow,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import constraint_from_proto, logit_bias_from_proto

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class LoraxRequest:
    """One request of a LoRAX batch, in the engine's values."""

    new_row: NewRow
    # Prompt tokens that are in the caller's blocks already.
    num_cached: int
    # How far this Prefill is to compute the prompt, at most.
    chunk_end: int
    # Blocks that the caller gave up front; empty: the shard takes its own.
    blocks: list[BlockId]
    # Whether it came as text and was tokenized here, by the base's tokenizer.
    is_text: bool

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens the row may come to hold, its whole output included."""
        spec = self.new_row.spec
        return len(spec.prompt_ids) + spec.stopping.max_new_tokens


def read_request(
    request: pb.Request, tokenizer: Tokenizer, block_size: int, max_input_length: int
) -> LoraxRequest:
    """Return a request's values; ValidationError names the request and what is wrong."""
    try:
        _refuse_unserved(request)
        ids = _prompt_ids(request, tokenizer, max_input_length)
        if request.cache_len >= len(ids):
            raise ValidationError(
                f"cache_len {request.cache_len} leaves none of {len(ids)} tokens to compute"
            )
        chunk_end = len(ids)
        if request.HasField("chunk_len"):
            if request.chunk_len < 1:
                raise ValidationError("chunk_len must be at least 1")
            chunk_end = min(len(ids), request.cache_len + request.chunk_len)
        _check_slots(request, block_size, len(ids))
        spec = RequestSpec(
            request_id=RequestId(request.id),
            prompt_ids=ids,
            sampling=_sampling(request),
            stopping=_stopping(request.stopping_parameters),
            adapter=AdapterHandle(request.adapter_index),
            constraint=_constraint(request),
        )
    except ValidationError as error:
        raise ValidationError(f"request {request.id}: {error}") from error
    blocks = [BlockId(block) for block in request.blocks]
    is_text = is_untokenized(request)
    return LoraxRequest(NewRow(spec, ()), request.cache_len, chunk_end, blocks, is_text)


def read_pooled(
    request: pb.Request,
    tokenizer: Tokenizer,
    max_input_length: int,
    output: OutputKind,
    pooling: Pooling,
) -> LoraxRequest:
    """Return the values of a request whose row ends with a vector or with scores."""
    try:
        _refuse_unserved(request)
        ids = _prompt_ids(request, tokenizer, max_input_length)
    except ValidationError as error:
        raise ValidationError(f"request {request.id}: {error}") from error
    spec = RequestSpec(
        request_id=RequestId(request.id),
        prompt_ids=ids,
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=0),
        adapter=AdapterHandle(request.adapter_index),
        output=output,
        pooling=pooling,
    )
    blocks = [BlockId(block) for block in request.blocks]
    return LoraxRequest(NewRow(spec, ()), 0, len(ids), blocks, is_untokenized(request))


def is_untokenized(request: pb.Request) -> bool:
    """Return whether only text came."""
    return not request.tokenized_inputs.ids


def _refuse_unserved(request: pb.Request) -> None:
    if any(chunk.HasField("image") for chunk in request.tokenized_inputs.input_chunks):
        raise ValidationError("this model takes no images; send text only")


def _constraint(request: pb.Request) -> Constraint | None:
    """Return what the output is bound to: LoRAX's JSON schema, or our constraint."""
    if request.HasField("constraint"):
        return constraint_from_proto(request.constraint)
    if request.parameters.HasField("schema"):
        return Constraint(kind=ConstraintKind.JSON_SCHEMA, text=request.parameters.schema)
    return None


def _prompt_ids(request: pb.Request, tokenizer: Tokenizer, max_input_length: int) -> list[int]:
    """Return the last ``truncate`` ids of the prompt, tokenized here when only text came."""
    ids = request.tokenized_inputs.ids[:]
    if is_untokenized(request):
        ids = tokenizer.encode(request.inputs).ids
    if request.truncate:
        return ids[-request.truncate :]
    if max_input_length and len(ids) > max_input_length:
        raise ValidationError(
            f"the prompt has {len(ids)} tokens, the most is {max_input_length}; "
            "shorten it or set truncate"
        )
    return ids


def _check_slots(request: pb.Request, block_size: int, num_tokens: int) -> None:
    """Slots say again where the tokens lie; they must follow the blocks in order."""
    if not request.slots:
        return
    slots = request.slots[:]
    expected = [
        block * block_size + offset for block in request.blocks for offset in range(block_size)
    ]
    if len(slots) < num_tokens or slots != expected[: len(slots)]:
        raise ValidationError(
            f"the slots do not follow the blocks in order; slot i of a row is "
            f"blocks[i / {block_size}] * {block_size} + i % {block_size}"
        )


def _sampling(request: pb.Request) -> SamplingParams:
    given = request.parameters
    sampled = (
        given.do_sample
        or given.temperature not in (0.0, 1.0)
        or given.top_k != 0
        or given.top_p not in (0.0, 1.0)
        or given.typical_p not in (0.0, 1.0)
        or given.min_p != 0.0
    )
    return SamplingParams(
        do_sample=sampled,
        temperature=given.temperature or 1.0,
        top_k=given.top_k,
        top_p=given.top_p or 1.0,
        typical_p=given.typical_p or 1.0,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty or 1.0,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=given.seed,
        logit_bias=logit_bias_from_proto(given),
        watermark=given.watermark,
        num_alternatives=given.return_k_alternatives,
        raw_logprobs=given.raw_logprobs,
        prompt_logprobs=request.prefill_logprobs,
        num_prompt_alternatives=request.prefill_alternatives,
    )


def _stopping(given: pb.StoppingCriteriaParameters) -> StoppingParams:
    if given.max_new_tokens < 1:
        raise ValidationError("max_new_tokens must be at least 1")
    return StoppingParams(
        max_new_tokens=given.max_new_tokens,
        min_new_tokens=given.min_new_tokens,
        stop_sequences=tuple(given.stop_sequences),
        stop_token_ids=tuple(given.stop_token_ids),
        ignore_eos=given.ignore_eos_token,
    )
