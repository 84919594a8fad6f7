"""Resolves the sampling options of a request by LoRAX's rules; pure."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter

from lorax_contract.errors import ValidationError
from lorax_contract.step import UNSAMPLED, LogitBias, SamplingParams
from lorax_contract.words import counted
from lorax_router.service.limits import RequestLimits
from lorax_router.service.requests import GenerateParameters

# A temperature below this is greedy: dividing by it would leave one token anyway.
GREEDY_TEMPERATURE = 1e-5
# Logits are divided by it: what is smaller makes infinities of them.
_LEAST_REPETITION_PENALTY = 1e-30
# LoRAX has 32 bits with a sign for it.
_MAX_TOP_K = 2**31 - 1
_MAX_SEED = 2**64 - 1
# As OpenAI has it: enough to ban or to force a token.
_MAX_BIAS = 100.0
# What sampling is resolved of, and what it is where a client says nothing.
_asked = attrgetter(
    "best_of", "n", "temperature", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "top_k", "top_p", "typical_p", "min_p", "logit_bias", "do_sample", "watermark", "seed",
    "return_k_alternatives", "raw_logprobs", "decoder_input_details", "num_prompt_alternatives",
)  # fmt: skip
_NOTHING_ASKED = _asked(GenerateParameters())


def resolve_sampling(
    params: GenerateParameters, limits: RequestLimits, draw_seed: Callable[[], int]
) -> tuple[SamplingParams, ...]:
    """Return the sampling of each sequence that is generated.

    A seed that the client leaves open is drawn here, once per sequence, so that the
    request is reproducible from now on. Raises ValidationError.
    """
    if params.output.pools and _asked(params) == _NOTHING_ASKED:
        return (UNSAMPLED,)
    best_of, n = _best_of(params, limits), _n(params, limits)
    base = _bounded(params, limits)
    do_sample = is_sampled(params, base)
    if best_of > n and not do_sample:
        raise ValidationError(
            "`best_of` above 1 needs sampling: set `do_sample`, or a `temperature` above 0"
        )
    return tuple(
        replace(base, do_sample=do_sample, seed=_seed(params, draw_seed, number))
        for number in range(max(best_of, n))
    )


def is_sampled(params: GenerateParameters, bounded: SamplingParams) -> bool:
    """Whether tokens are drawn: asked for, or implied by an option that only then means much."""
    if bounded.temperature == 0.0:
        return False
    implied = (
        bounded.temperature != 1.0
        or bounded.top_k > 0
        or bounded.top_p < 1.0
        or bounded.typical_p < 1.0
        or bounded.min_p > 0.0
    )
    # Like LoRAX, `best_of` takes any named option, even at its default, for sampling.
    named = (params.temperature, params.top_k, params.top_p, params.typical_p, params.min_p)
    several = (params.best_of or 1) > 1 and any(value is not None for value in named)
    return params.do_sample or implied or several


def _best_of(params: GenerateParameters, limits: RequestLimits) -> int:
    best_of = 1 if params.best_of is None else params.best_of
    if limits.max_best_of == 1 and best_of != 1:
        raise ValidationError("`best_of` other than 1 is not allowed on this server")
    # LoRAX takes 0 for one sequence.
    if not 0 <= best_of <= limits.max_best_of:
        raise ValidationError(f"`best_of` must be from 1 to {limits.max_best_of}, got {best_of}")
    if best_of > 1 and params.seed is not None and params.n is None:
        raise ValidationError("`seed` cannot be combined with `best_of` above 1")
    return max(best_of, 1)


def _n(params: GenerateParameters, limits: RequestLimits) -> int:
    """How many sequences the client gets, where its dialect can say so."""
    if params.n is None:
        return 1
    if not 1 <= params.n <= limits.max_n:
        raise ValidationError(f"`n` must be from 1 to {limits.max_n}, got {params.n}")
    if params.best_of is not None and params.best_of < params.n:
        raise ValidationError(
            f"`best_of` must be at least `n`, which is {params.n}, got {params.best_of}"
        )
    return params.n


def _bounded(params: GenerateParameters, limits: RequestLimits) -> SamplingParams:
    temperature = _number("temperature", params.temperature, 1.0)
    if temperature < 0.0:
        raise ValidationError(f"`temperature` must not be negative, got {temperature:g}")
    repetition_penalty = _number("repetition_penalty", params.repetition_penalty, 1.0)
    if repetition_penalty < _LEAST_REPETITION_PENALTY:
        raise ValidationError(
            f"`repetition_penalty` must be above 0, at least {_LEAST_REPETITION_PENALTY:g}, "
            f"got {repetition_penalty:g}"
        )
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_TEMPERATURE else temperature,
        repetition_penalty=repetition_penalty,
        frequency_penalty=_penalty("frequency_penalty", params.frequency_penalty),
        presence_penalty=_penalty("presence_penalty", params.presence_penalty),
        top_k=_top_k(params.top_k),
        top_p=_share("top_p", params.top_p, may_be_one=True),
        typical_p=_share("typical_p", params.typical_p, may_be_one=False),
        min_p=_min_p(params.min_p),
        logit_bias=_logit_bias(params.logit_bias, limits),
        watermark=params.watermark,
        num_alternatives=_num_alternatives(
            "return_k_alternatives", params.return_k_alternatives, limits.max_alternatives, limits
        ),
        raw_logprobs=params.raw_logprobs,
        prompt_logprobs=params.decoder_input_details,
        num_prompt_alternatives=_num_prompt_alternatives(params, limits),
    )


def _number(name: str, value: float | None, default: float) -> float:
    """The value as shards compute with it: finite, rounded to 32 bits."""
    if value is None:
        return default
    if not math.isfinite(value):
        raise ValidationError(f"`{name}` must be a finite number, got {value:g}")
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError as error:
        raise ValidationError(f"`{name}` is too large for a 32-bit number") from error
    return rounded


def _penalty(name: str, value: float | None) -> float:
    penalty = _number(name, value, 0.0)
    if not -2.0 <= penalty <= 2.0:
        raise ValidationError(f"`{name}` must be from -2 to 2, got {penalty:g}")
    return penalty


def _top_k(value: int | None) -> int:
    if value is None:
        return 0
    if not 0 < value <= _MAX_TOP_K:
        raise ValidationError(f"`top_k` must be from 1 to {_MAX_TOP_K}, got {value}")
    return value


def _share(name: str, value: float | None, *, may_be_one: bool) -> float:
    share = _number(name, value, 1.0)
    if value is None or 0.0 < share < 1.0 or (may_be_one and share == 1.0):
        return share
    bound = "at most 1" if may_be_one else "below 1"
    raise ValidationError(f"`{name}` must be above 0 and {bound}, got {value:g}")


def _min_p(value: float | None) -> float:
    min_p = _number("min_p", value, 0.0)
    if not 0.0 <= min_p <= 1.0:
        raise ValidationError(f"`min_p` must be from 0 to 1, got {min_p:g}")
    return min_p


def _logit_bias(biases: Mapping[int, float], limits: RequestLimits) -> LogitBias:
    if len(biases) > limits.max_biased_tokens:
        raise ValidationError(
            f"`logit_bias` takes at most {counted(limits.max_biased_tokens, 'token')}, "
            f"got {len(biases)}"
        )
    for token_id, value in biases.items():
        if not 0 <= token_id < limits.vocab_size:
            raise ValidationError(
                f"`logit_bias`: {token_id} is not a token of this model, whose ids go from 0 to "
                f"{limits.vocab_size - 1}"
            )
        if not -_MAX_BIAS <= value <= _MAX_BIAS:  # also what is no number
            raise ValidationError(
                f"`logit_bias` must be from -{_MAX_BIAS:g} to {_MAX_BIAS:g}, got {value:g} for "
                f"token {token_id}"
            )
    values = (_number("logit_bias", value, 0.0) for value in biases.values())
    return LogitBias(tuple(biases), tuple(values))


def _num_prompt_alternatives(params: GenerateParameters, limits: RequestLimits) -> int:
    if params.num_prompt_alternatives and not params.decoder_input_details:
        raise ValidationError("`num_prompt_alternatives` needs `decoder_input_details`")
    return _num_alternatives(
        "num_prompt_alternatives",
        params.num_prompt_alternatives,
        limits.max_prompt_alternatives,
        limits,
    )


def _num_alternatives(name: str, value: int | None, most: int, limits: RequestLimits) -> int:
    if value is None:
        return 0
    if not 0 < value <= most:
        raise ValidationError(f"`{name}` must be from 1 to {most}, got {value}")
    return min(value, limits.vocab_size)


def _seed(params: GenerateParameters, draw_seed: Callable[[], int], number: int) -> int:
    if params.seed is None:
        return draw_seed()
    if not 0 <= params.seed <= _MAX_SEED:
        raise ValidationError(f"`seed` must be from 0 to {_MAX_SEED}")
    # Sequences of one request differ, and the first is what a request for one would get.
    return (params.seed + number) % (_MAX_SEED + 1)
