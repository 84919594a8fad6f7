"""The limits of requests: what the configuration asks for, bounded by model and memory."""

from __future__ import annotations

from dataclasses import dataclass

from lorax_contract.config import ConfigError

# Without other words a sequence is at most this long, whatever the model could do.
DEFAULT_MAX_TOTAL_TOKENS = 4096
# As OpenAI's.
LARGEST_N = 128
# One token in, one token out.
_LEAST_LENGTH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for at most. Lengths are in tokens."""

    max_input_length: int
    max_total_tokens: int
    vocab_size: int
    # Longest text that is tokenized at all; see `prompts.char_bound`.
    max_input_chars: int = 2**63 - 1
    max_best_of: int = 2
    # Sequences that one request may get, where its dialect can ask for several.
    max_n: int = LARGEST_N
    max_stop_sequences: int = 4
    max_stop_token_ids: int = 64
    # Alternatives per token: each costs host time in every step of the whole batch.
    max_alternatives: int = 256
    # The same of prompt tokens, all of which are told at once.
    max_prompt_alternatives: int = 20
    max_biased_tokens: int = 300


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and whole sequences may be, in tokens."""

    max_input_length: int
    max_total_tokens: int


def lengths_of_model(
    max_input_length: int | None, max_total_tokens: int | None, max_positions: int
) -> Lengths:
    """Fill in what the configuration leaves open; refuse what the model cannot do.

    ``max_positions`` is the longest sequence of the model, 0 when unbounded.
    Raises ConfigError naming the value.
    """
    default = min(max_positions or DEFAULT_MAX_TOTAL_TOKENS, DEFAULT_MAX_TOTAL_TOKENS)
    if max_total_tokens is None:
        # A longer input that was asked for by name widens the default up to the model.
        asked = 0 if max_input_length is None else max_input_length + 1
        total = max(default, min(asked, max_positions or asked))
    else:
        total = max_total_tokens
    if max_positions and total > max_positions:
        raise ConfigError(
            f"max_total_tokens: {total} is longer than the {max_positions} positions of the "
            f"model; the largest value is {max_positions}"
        )
    return Lengths(_input_length(max_input_length, total), total)


def required_length(max_input_length: int | None, max_total_tokens: int | None) -> int:
    """Return the sequence length that was asked for by name; defaults may shrink to the memory."""
    if max_total_tokens is not None:
        return max_total_tokens
    return _LEAST_LENGTH if max_input_length is None else max_input_length + 1


def lengths_in_pool(
    lengths: Lengths,
    max_input_length: int | None,
    max_total_tokens: int | None,
    *,
    pool_tokens: int,
) -> Lengths:
    """Return ``lengths`` after the KV cache turned out to hold ``pool_tokens`` tokens.

    A default shrinks to what fits; a value that was asked for is refused instead,
    since a request of that length could never run. Raises ConfigError.
    """
    if lengths.max_total_tokens <= pool_tokens:
        return lengths
    if max_total_tokens is not None:
        raise ConfigError(
            f"max_total_tokens: {max_total_tokens} does not fit the KV cache of {pool_tokens} "
            f"tokens; choose at most {pool_tokens}, or give the KV cache more memory"
        )
    if pool_tokens < _LEAST_LENGTH:
        raise ConfigError(
            f"the KV cache holds {pool_tokens} tokens, which is too little for any request; "
            "give it more memory"
        )
    return Lengths(_input_length(max_input_length, pool_tokens), pool_tokens)


def _input_length(max_input_length: int | None, total: int) -> int:
    """The longest prompt, which leaves room for at least one new token."""
    if max_input_length is None:
        return total - 1
    if max_input_length >= total:
        raise ConfigError(
            f"max_input_length: {max_input_length} leaves no room for output within "
            f"{total} tokens; choose at most {total - 1}"
        )
    if max_input_length < 1:
        raise ConfigError("max_input_length: must be at least 1")
    return max_input_length
