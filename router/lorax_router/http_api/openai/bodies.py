"""OpenAI's request bodies, with the fields that vLLM and LoRAX take beside them.

Null means absent. A field that this server does not honour is refused by name where it would
change the answer, and counted as unknown where it would not.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling
from lorax_router.http_api.cutting import cut_to
from lorax_router.http_api.json_body import Integer, Items, StrictBody
from lorax_router.http_api.model_body import ModelBody
from lorax_router.http_api.pooling_names import POOLINGS, PoolingName
from lorax_router.service.constraints.formats import of_response_format, of_vllm
from lorax_router.service.requests import GenerateParameters
from lorax_router.service.text import TextStyle

_MAX_TOP_LOGPROBS = 20
_TOKEN_ID = re.compile(r"[0-9]{1,20}")
# Where vLLM binds the output.
_BINDING = (
    "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
)  # fmt: skip


class StreamOptions(StrictBody):
    """What a stream says beside its tokens."""

    include_usage: bool = False
    """Send the usage in a chunk of its own before the end."""
    continuous_usage_stats: bool = False
    """Send the usage so far with each chunk."""
    include_obfuscation: bool = False
    """Taken; nothing is added."""


class SamplingBody(ModelBody):
    """How to generate; all dialects of OpenAI share it."""

    temperature: float | None = None
    """Divides the logits; 0 is greedy. 1 if absent."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability."""
    n: Integer | None = None
    """Generate so many answers."""
    stop: str | Items[str] | None = None
    """Texts that end the output; they are no part of it."""
    seed: Integer | None = None
    """Makes drawn tokens reproducible."""
    frequency_penalty: float | None = None
    """From -2 to 2."""
    presence_penalty: float | None = None
    """From -2 to 2."""
    logit_bias: dict[str, float] | None = None
    """Added to the logits of tokens, by their ids; from -100 to 100."""
    stream: bool | None = None
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """What a stream says beside its tokens."""
    user: str | None = None
    """Taken, and not used."""
    top_k: Integer | None = None
    """Draw from the so many likeliest tokens; 0 and -1: from all."""
    min_p: float | None = None
    """Leave out tokens less likely than this times the likeliest one."""
    typical_p: float | None = None
    """Draw from the most typical tokens that together reach this probability."""
    repetition_penalty: float | None = None
    """Above 0; 1 is none."""
    ignore_eos: bool | None = None
    """Go on after an end-of-sequence token."""
    stop_token_ids: Items[Integer] | None = None
    """Token ids that end the output."""
    min_tokens: Integer | None = None
    """Do not end before so many tokens."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true if absent."""
    include_stop_str_in_output: bool | None = None
    """Let the text that ended the output be part of it."""
    cache_salt: str | None = None
    """Share cached prefixes only with requests that give the same text."""
    priority: Integer | None = None
    """A smaller one goes first, where the server schedules by priority."""
    truncate_prompt_tokens: Integer | None = None
    """Keep only the last so many tokens of the prompt."""
    response_format: Any = None
    """Bind the output: `json_object`, `json_schema`, or `text`, which binds nothing."""
    structured_outputs: Any = None
    """Bind the output, as vLLM has it: `json`, `regex`, `choice`, `grammar`."""
    guided_json: Any = None
    """Bind the output to a JSON schema."""
    guided_regex: str | None = None
    """Bind the output to a regular expression."""
    guided_choice: Items[str] | None = None
    """Bind the output to one of these texts."""
    guided_grammar: str | None = None
    """Bind the output to a Lark grammar."""

    @property
    def stops(self) -> list[str]:
        """The stop sequences; empty ones end nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [each for each in given if each]

    @property
    def text_style(self) -> TextStyle:
        """How the texts look."""
        return TextStyle(
            stops=self.stops,
            include_stop=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream tells its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check_refused(self) -> None:
        """Raise ValidationError for a field that would change the answer, and cannot."""
        super().check_refused()
        if self.stream_options is not None and not self.stream:
            raise ValidationError("`stream_options` needs `stream` to be true")

    def parameters(self, **more: Any) -> GenerateParameters:
        """Return the service's values; ``more`` are those that differ from dialect to dialect."""
        return GenerateParameters(
            # Drawing is the rule here; a temperature of 0 is greedy all the same.
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            min_p=self.min_p,
            typical_p=None if self.typical_p == 1.0 else self.typical_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            n=1 if self.n is None else self.n,
            seed=self.seed,
            stop=self.stops,
            stop_token_ids=self.stop_token_ids or [],
            ignore_eos_token=bool(self.ignore_eos),
            priority=self.priority,
            cache_salt=self.cache_salt,
            truncate=None if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens,
            logit_bias=self._logit_bias(),
            min_new_tokens=self.min_tokens or 0,
            constraint=self._constraint(),
            **more,
        )

    def _constraint(self) -> Constraint | None:
        """What the output is bound to, by whichever field; raises ValidationError."""
        fields = {name: getattr(self, name) for name in _BINDING}
        bound, also = of_response_format(self.response_format), of_vllm(fields)
        if bound is not None and also is not None:
            raise ValidationError(
                f"`{bound.field_name}` and `{also.field_name}` bind the output twice; give one "
                "of them"
            )
        return bound or also

    def _logit_bias(self) -> dict[int, float]:
        given = self.logit_bias or {}
        wrong = [each for each in given if not _TOKEN_ID.fullmatch(each)]
        if wrong:
            raise ValidationError(f"`logit_bias`: {wrong[0][:50]!r} is no token id")
        return {int(token_id): value for token_id, value in given.items()}


class CompletionBody(SamplingBody):
    """A prompt, or several, to continue."""

    prompt: str | Items[str] | Items[Integer] | Items[Items[Integer]]
    """A text, token ids, or a list of either."""
    max_tokens: Integer | None = None
    """Most tokens to generate; 16 if absent. 0 together with `echo`: none."""
    best_of: Integer | None = None
    """Generate so many answers and return the `n` likeliest."""
    echo: bool | None = None
    """Put the prompt in front of the output, with its logprobs if there are any."""
    logprobs: Integer | None = None
    """Return the logprobs of the tokens, and of so many alternatives each; at most 20."""
    add_special_tokens: bool | None = None
    """Add the tokens that the model expects around a prompt; true if absent."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts; at least one."""
        return _one_or_several("prompt", self.prompt)

    def num_logprobs(self) -> int | None:
        """How many alternatives each token has; None: no logprobs are wanted."""
        return _num_logprobs("logprobs", self.logprobs)


class EmbeddingBody(ModelBody):
    """A text, or several, to make vectors of."""

    input: str | Items[str] | Items[Integer] | Items[Items[Integer]]
    """A text, token ids, or a list of either."""
    encoding_format: Literal["float", "base64"] | None = None
    """Vectors as numbers, which is the default, or as base64 of float32 (little-endian)."""
    dimensions: Integer | None = None
    """Return only the first so many numbers of each."""
    user: str | None = None
    """Taken, and not used."""
    pooling: PoolingName | None = None
    """What a vector is made of: what the model has of the last token or of the first one (`cls`), the
    largest of each dimension (`max`), or the mean of all tokens, also with other weights. As the model
    was made if absent."""
    normalize: bool | None = None
    """Let each vector have length one; as the model was made if absent."""
    adapters: Items[str] | None = None
    """Through each of these adapters: the answer is a list, with an entry for each."""
    prompt_name: str | None = None
    """By which name the model knows what such texts begin with; its default prompt if absent."""
    truncate_prompt_tokens: Integer | None = None
    """Cut the end of texts that have more tokens than this; -1: than a prompt may have. Those that
    the tokenizer puts around texts are counted, and kept."""
    priority: Integer | None = None
    """A smaller one goes first, where the server schedules by priority."""

    @property
    def cut_to(self) -> int | None:
        """To how many tokens texts are cut; raises ValidationError."""
        return cut_to(self.truncate_prompt_tokens)

    @property
    def inputs(self) -> list[str | list[int]]:
        """All texts; at least one."""
        return _one_or_several("input", self.input)

    @property
    def pooled_by(self) -> Pooling | None:
        """What vectors are made of; None: as the model was made."""
        return None if self.pooling is None else POOLINGS[self.pooling]


def _one_or_several(
    name: str, given: str | list[str] | list[int] | list[list[int]]
) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise ValidationError(f"`{name}` must not be empty")
    if isinstance(given[0], int):
        return [given]
    return given  # type: ignore[return-value]


class Tool(StrictBody):
    """Something that the model may call."""

    type: Literal["function"]
    function: dict[str, Any]
    """`name`, `description`, `parameters` (a JSON schema) and `strict`."""


class ChatBody(SamplingBody):
    """A conversation to go on with."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "function_call": ("none", "auto"),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Items[dict[str, Any]]
    """What was said so far: `role` (system, developer, user, assistant, tool) and `content`."""
    max_tokens: Integer | None = None
    """Most tokens to generate; as many as fit if absent."""
    max_completion_tokens: Integer | None = None
    """The same, by its newer name."""
    logprobs: bool | None = None
    """Return the logprobs of the tokens."""
    top_logprobs: Integer | None = None
    """Return so many alternatives for each token; needs `logprobs`. At most 20."""
    tools: Items[Tool] | None = None
    """What the model may call."""
    tool_choice: Any = None
    """`none`, `auto`, `required`, or the one function to call."""
    parallel_tool_calls: bool | None = None
    """Whether it may call several at once; true if absent."""
    add_generation_prompt: bool | None = None
    """Let the prompt end where the assistant begins to speak; true if absent."""
    continue_final_message: bool | None = None
    """Go on with the last message, which is the assistant's."""
    chat_template_kwargs: dict[str, Any] | None = None
    """What the chat template is given beside the conversation."""
    documents: Items[dict[str, Any]] | None = None
    """What the template of a retrieving model is given."""
    reasoning_effort: str | None = None
    """Given to the chat template, if that reads it."""

    @property
    def most_tokens(self) -> int | None:
        """Most tokens to generate, by either name."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def num_logprobs(self) -> int | None:
        """How many alternatives each token has; None: no logprobs are wanted."""
        if not self.logprobs:
            if self.top_logprobs:
                raise ValidationError("`top_logprobs` needs `logprobs` to be true")
            return None
        return _num_logprobs("top_logprobs", self.top_logprobs or 0)


def _num_logprobs(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= _MAX_TOP_LOGPROBS:
        raise ValidationError(f"`{name}` must be from 0 to {_MAX_TOP_LOGPROBS}, got {value}")
    return value
