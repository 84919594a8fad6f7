"""From a client's words to a request that can run: LoRAX's limits, checked once, here.

Behind this border only valid values exist. What needs no tokens is checked first
and without waiting; then the prompt is tokenized off the loop and its length is
checked against the limits.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import OutputKind, SamplingParams, StoppingParams
from lorax_contract.words import counted
from lorax_router.core.request import RequestTerms
from lorax_router.core.tenant_limits import NO_LIMITS, TenantLimits
from lorax_router.service.abilities import Abilities
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.limits import RequestLimits
from lorax_router.service.prompts.prompt_encoder import (
    EncodedPrompt,
    PromptEncoder,
    TemplateRenderer,
)
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool
from lorax_router.service.requests import (
    BASE_MODEL_ADAPTER_ID,
    GenerateParameters,
    GenerateRequest,
    ValidRequest,
)
from lorax_router.service.sampling import resolve_sampling

_BASE_TEXT = AdapterText()
_NO_ADAPTERS = SelectionPolicy(
    refusal="this server serves the base model only; leave it out or set `adapter_id` to "
    f"{BASE_MODEL_ADAPTER_ID!r}"
)


def draw_seed() -> int:
    """Return a seed nobody can guess; 63 bits pass through every signed integer."""
    return secrets.randbits(63)


MAX_SALT_CHARS = 256

# What became last of one prompt, with the places of its tokens and without.
Made = dict[bool, ValidRequest]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """A request whose parameters are within bounds and whose prompt has no tokens yet."""

    request: GenerateRequest
    samplings: tuple[SamplingParams, ...]
    # None: the base model.
    selection: AdapterSelection | None = None

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated."""
        return len(self.samplings)


class Validator:
    """Owns the limits; makes a ValidRequest of a GenerateRequest or says what is wrong."""

    def __init__(
        self,
        limits: RequestLimits,
        tokenizer: TokenizerPool,
        templates: TemplateRenderer,
        draw_seed: Callable[[], int] = draw_seed,
        *,
        selections: SelectionPolicy = _NO_ADAPTERS,
        abilities: Abilities | None = None,
    ) -> None:
        self._selections = selections
        self.limits = limits
        self.abilities = abilities or Abilities()
        self._tokenizer = tokenizer
        self._prompts = PromptEncoder(limits, tokenizer, templates)
        self._draw_seed = draw_seed

    async def progress(self) -> None:
        """Return once a text could be tokenized; never while all threads for it are stuck."""
        await self._tokenizer.progress()

    def check(
        self,
        request: GenerateRequest,
        *,
        stream: bool,
        adapter_id: str | None = None,
        is_checked: bool = False,
    ) -> CheckedRequest:
        """Check all that needs no tokens; raises ValidationError.

        ``adapter_id`` is named in place of the request's own; ``is_checked``: all else of the
        request was found to be right already.
        """
        params = request.parameters
        if not is_checked:
            self.abilities.check(request)
            self._prompts.check(request.prompt, is_cut=params.cut_to is not None)
        selection = self._selections.selection_of(params, adapter_id)
        if selection is None:
            self.abilities.head_for(params, None, has_adapter=False)
        if not is_checked:
            _check_lengths(params, self.limits)
            _check_stopping(params, self.limits)
            _check_terms(params)
        samplings = resolve_sampling(params, self.limits, self._draw_seed)
        # What is wrong in either mode is said in the same words in both.
        if stream:
            _check_stream(request)
        return CheckedRequest(request=request, samplings=samplings, selection=selection)

    async def num_prompt_tokens(self, checked: CheckedRequest, text: AdapterText) -> int:
        """Return how many tokens a prompt has, however many may be computed.

        Raises ValidationError, TemplateError. ``text`` is what the request's adapter brings.
        """
        request = checked.request
        params = request.parameters
        encoded = await self._prompts.encode(request.prompt, text, params.truncate, params.cut_to)
        return len(encoded.ids)

    async def complete(
        self,
        checked: CheckedRequest,
        text: AdapterText = _BASE_TEXT,
        own_head: HeadFacts | None = None,
        *,
        deadline: float = math.inf,
        limits: TenantLimits = NO_LIMITS,
        made: Made | None = None,
    ) -> ValidRequest:
        """Tokenize the prompt and check its length; raises ValidationError, TemplateError.

        ``text`` is what the request's adapter brings for that, ``own_head`` its classification head.
        ``deadline`` and ``limits`` are of its terms, as these have them. ``made``: of requests that
        differ in an adapter that brings nothing, to which this one's is added.
        """
        request, params = checked.request, checked.request.parameters
        has_adapter = checked.selection is not None
        head = self.abilities.head_for(params, own_head, has_adapter=has_adapter)
        with_spans = head is not None and head.classifies_tokens
        like = None if made is None else made.get(with_spans)
        if like is not None and like.head == head and like.samplings == checked.samplings:
            return like
        encoded = await self._encoded(checked, text, like, with_spans=with_spans)
        most = max_new_tokens(params, len(encoded.ids), self.limits)
        shape = self.abilities.shape(params, head)
        if head is None:
            self.abilities.check_size(shape, len(encoded.ids))
        valid = ValidRequest(
            prompt_ids=encoded.ids,
            prompt_text=encoded.text,
            second_start=encoded.second_start,
            spans=encoded.spans,
            samplings=checked.samplings,
            num_returned=params.n,
            sent_text=request.sent_text,
            stopping=_stopping(params, most),
            output=params.output,
            shape=shape,
            head=head,
            resumed_ids=() if request.resumption is None else request.resumption.output_ids,
            terms=_terms(request, deadline, limits),
            details=params.details or params.decoder_input_details,
            prompt_details=params.decoder_input_details,
            return_full_text=bool(params.return_full_text),
        )
        if made is not None:
            made[with_spans] = valid
        return valid

    async def _encoded(
        self,
        checked: CheckedRequest,
        text: AdapterText,
        like: ValidRequest | None,
        *,
        with_spans: bool,
    ) -> EncodedPrompt:
        """Return a prompt's tokens: those of a request that is ``like`` it, if there is one."""
        if like is not None:
            return EncodedPrompt(like.prompt_ids, like.prompt_text, like.second_start, like.spans)
        params = checked.request.parameters
        return await self._prompts.encode(
            self.abilities.prompted(checked.request),
            text,
            params.truncate,
            params.cut_to,
            with_spans=with_spans,
        )


def max_new_tokens(
    params: GenerateParameters, num_prompt_tokens: int, limits: RequestLimits
) -> int:
    """Return how many tokens may be generated; raises ValidationError when none or too many."""
    total = limits.max_total_tokens
    asked = params.max_new_tokens
    if asked is not None and num_prompt_tokens + asked > total:
        raise ValidationError(
            f"`inputs` tokens plus `max_new_tokens` must be at most {total}, "
            f"got {num_prompt_tokens} `inputs` tokens and {asked} `max_new_tokens`"
        )
    if num_prompt_tokens > limits.max_input_length:
        raise ValidationError(
            f"`inputs` must have at most {counted(limits.max_input_length, 'token')}, "
            f"got {num_prompt_tokens}; shorten it or set `truncate`"
        )
    if params.output is not OutputKind.TOKENS:
        return 0
    return total - num_prompt_tokens if asked is None else asked


def _stopping(params: GenerateParameters, most: int) -> StoppingParams:
    least = params.min_new_tokens or 0
    if least > most:
        raise ValidationError(
            f"`min_new_tokens` must be at most `max_new_tokens`, got {least}, of at most {most}"
        )
    return StoppingParams(
        max_new_tokens=most,
        min_new_tokens=least,
        stop_sequences=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos_token,
    )


def _terms(request: GenerateRequest, deadline: float, limits: TenantLimits) -> RequestTerms:
    """A request can be less urgent than its caller's key, never more."""
    caller, asked = request.caller, request.parameters.priority
    priority = caller.priority if asked is None else asked
    if caller.has_key:
        priority = max(priority, caller.priority)
    salt = request.parameters.cache_salt or ""
    return RequestTerms(caller.tenant, caller.weight, priority, salt, deadline, limits)


def _check_stream(request: GenerateRequest) -> None:
    params = request.parameters
    if params.decoder_input_details and not request.streams_prompt:
        raise ValidationError("`decoder_input_details` is not offered for streams")
    if params.best_of not in (None, 1, params.n):
        raise ValidationError(
            f"`best_of` other than {params.n or 1} is not offered for streams: which sequence is "
            "the likeliest is known at the end"
        )


def _check_lengths(params: GenerateParameters, limits: RequestLimits) -> None:
    asked = params.max_new_tokens
    if params.output is OutputKind.TOKENS and asked is not None and asked < 1:
        raise ValidationError(f"`max_new_tokens` must be above 0, got {asked}")
    if params.output is not OutputKind.TOKENS and asked:
        raise ValidationError(f"`max_new_tokens` must be 0 where none are generated, got {asked}")
    if params.min_new_tokens is not None and params.min_new_tokens < 0:
        raise ValidationError(f"`min_new_tokens` must not be negative, got {params.min_new_tokens}")
    # By either way to cut; 0 tokens are never asked for, but stand for the longest prompt.
    for asked in (params.truncate, params.cut_to or None):
        if asked is not None and not 1 <= asked <= limits.max_input_length:
            raise ValidationError(
                f"`truncate` must be from 1 to {limits.max_input_length}, got {asked}"
            )


def _check_terms(params: GenerateParameters) -> None:
    asked, salt = params.priority, params.cache_salt
    if asked is not None and not -(2**31) <= asked < 2**31:
        raise ValidationError(f"`priority` must be from {-(2**31)} to {2**31 - 1}, got {asked}")
    if params.timeout_s is not None and not 0.0 < params.timeout_s < math.inf:
        raise ValidationError(f"the timeout must be above 0 seconds, got {params.timeout_s}")
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise ValidationError(f"`cache_salt` must have from 1 to {MAX_SALT_CHARS} characters")


def _check_stopping(params: GenerateParameters, limits: RequestLimits) -> None:
    if len(params.stop) > limits.max_stop_sequences:
        raise ValidationError(
            f"`stop` takes at most {counted(limits.max_stop_sequences, 'sequence')}, "
            f"got {len(params.stop)}"
        )
    if "" in params.stop:
        raise ValidationError("`stop` must not contain an empty sequence")
    ids = params.stop_token_ids
    if len(ids) > limits.max_stop_token_ids:
        raise ValidationError(
            f"`stop_token_ids` takes at most {counted(limits.max_stop_token_ids, 'id')}, "
            f"got {len(ids)}"
        )
    for token_id in ids:
        if not 0 <= token_id < limits.vocab_size:
            raise ValidationError(
                f"`stop_token_ids`: {token_id} is not a token of this model, whose ids go "
                f"from 0 to {limits.vocab_size - 1}"
            )
