"""What a front end hands to the service, and what validation makes of it.

``GenerateRequest`` holds a client's words with their types checked and nothing
else; ``ValidRequest`` can be run as it is. Only ``Validator`` makes the second
from the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorax_contract.constraint import Constraint
from lorax_contract.pooling import HeadFacts, Pooling
from lorax_contract.step import OutputKind, SamplingParams, StoppingParams
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.output_parser import NewParser, OutputParser
from lorax_router.service.chat.tools import ToolChoice
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.prompts.encoding import Span
from lorax_router.service.vectors import VectorShape

# The name by which LoRAX's clients ask for no adapter.
BASE_MODEL_ADAPTER_ID = "__base_model__"


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A text to continue, to make a vector of or to classify."""

    # No prompt in a repr: no log line shows one by accident.
    text: str = field(repr=False)
    # Whether the tokens that the model expects around a prompt are added.
    add_special_tokens: bool = True
    # A second text that is read together with it, as models are trained to that compare two.
    second: str | None = field(default=None, repr=False)
    # Equal, and nobody else's, in requests of one call with one text: it is tokenized once for them.
    shared: str = ""


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue, as they are."""

    ids: Sequence[int] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, made a text by a chat template.

    Messages, tools and documents are what templates take: plain JSON values.
    """

    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    tools: Sequence[Mapping[str, Any]] | None = field(default=None, repr=False)
    # Whether they are called.
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    documents: Sequence[Mapping[str, Any]] | None = field(default=None, repr=False)
    # What the template is given beside that.
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    # Whether the text ends where the assistant begins to speak.
    add_generation_prompt: bool = True
    # Whether it ends within the last message, which the output continues.
    continue_final_message: bool = False
    # Whether calls and reasoning are read out of the answer; else it is one text.
    is_answer_read: bool = True

    @classmethod
    def of_user(cls, text: str) -> ChatPrompt:
        """Return the chat in which a user says ``text``, and wants the answer as one text."""
        return cls(messages=[{"role": "user", "content": text}], is_answer_read=False)


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedAdapters:
    """Several adapters merged for one request."""

    ids: list[str]
    weights: list[float] = field(default_factory=list)
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateParameters:
    """The ``parameters`` of a request; None means that the client did not say."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    # Of the adapter; requests give it as part of the id.
    revision: str | None = None
    merged_adapters: MergedAdapters | None = None
    # A secret: never part of a repr, a log line or an error text.
    api_token: str | None = field(default=None, repr=False)
    # How many sequences are generated, and how many of them the client gets.
    best_of: int | None = None
    n: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    # Added to the logits of token ids.
    logit_bias: dict[int, float] = field(default_factory=dict)
    do_sample: bool = False
    # What is generated; no LoRAX field.
    output: OutputKind = OutputKind.TOKENS
    # Of a vector, if one is asked for: what it is made of, whether its length is one, and how many
    # of its numbers are wanted (the first ones). What is not said is as the model was made for.
    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    # By which name the model knows what such a text begins with.
    prompt_name: str | None = None
    max_new_tokens: int | None = None
    # Neither tokens nor stop strings end an output before it has more than so many tokens.
    min_new_tokens: int | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    # Of prompts that are too long only the last so many tokens are kept.
    truncate: int | None = None
    # Of texts that are too long the ends are cut, so that so many tokens are left, with those that
    # the tokenizer puts around texts; 0: as many as a prompt may have. Not beside ``truncate``.
    cut_to: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = None
    # Of each prompt token; goes with ``decoder_input_details``.
    num_prompt_alternatives: int | None = None
    # Logprobs of tokens are the model's own, before biases, penalties and warpers.
    raw_logprobs: bool = False
    seed: int | None = None
    # A smaller one goes first, where the scheduling policy goes by it.
    priority: int | None = None
    # Cached prefixes are shared only with requests that give the same.
    cache_salt: str | None = field(default=None, repr=False)
    # What the output is to be bound to.
    constraint: Constraint | None = None
    # Seconds from its receipt within which the last token is to be there.
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """The output of one sequence that began elsewhere and goes on here, after its last token.

    Taken at its word: no client can say so, only a front end that had the answer's first part.
    """

    output_ids: Sequence[int] = field(repr=False)
    # What the adapter was that it began with, as openings tell it; "": none.
    adapter_content: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request in the client's words."""

    prompt: Prompt
    # What stands before the output where the client wants the full text.
    sent_text: str = field(default="", repr=False)
    parameters: GenerateParameters = field(default_factory=GenerateParameters)
    # Whether a stream of its dialect has a place for the tokens of the prompt.
    streams_prompt: bool = False
    # Who asks.
    caller: Caller = ANYBODY
    # By which call.
    origin: Origin = NOWHERE
    # What it has already; with the seed of the sequence that it is, and of that one alone.
    resumption: Resumption | None = None

    def through(self, adapter_id: str) -> GenerateRequest:
        """Return the same request of another adapter."""
        return replace(self, parameters=replace(self.parameters, adapter_id=adapter_id))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that the engine can run as it is; each of its values is within bounds."""

    prompt_ids: Sequence[int] = field(repr=False)
    # What a chat template made of a chat; "" of other prompts.
    prompt_text: str = field(default="", repr=False)
    # Reads the answers to it.
    new_parser: NewParser = OutputParser
    # One entry per sequence that is generated; they differ in their seed only.
    samplings: tuple[SamplingParams, ...]
    stopping: StoppingParams
    output: OutputKind = OutputKind.TOKENS
    # How its vector looks, if it asks for one, or what its scores are made of.
    shape: VectorShape = field(default_factory=VectorShape)
    # What gives its scores, if it asks for some.
    head: HeadFacts | None = None
    # What each output is bound to.
    constraint: Constraint | None = None
    # Where the second of two texts begins; 0: nothing tells it apart.
    second_start: int = 0
    # By token of the prompt, where it stands in the text, where that was asked for.
    spans: Sequence[Span] | None = field(default=None, repr=False)
    # From which token of the prompt on its adapter acts; None: from the first.
    adapter_start: int | None = None
    # On what terms the sequences ask for their turn.
    terms: RequestTerms = ANY_TERMS
    # Output that the sequence began with elsewhere.
    resumed_ids: Sequence[int] = field(default=(), repr=False)
    # How many of them the client gets, the likeliest if these are not all; None: all, the
    # likeliest first.
    num_returned: int | None = None
    sent_text: str = field(default="", repr=False)
    # The front end shows details of the output.
    details: bool = False
    # The front end shows the tokens of the prompt.
    prompt_details: bool = False
    return_full_text: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt that are computed, after truncation."""
        return len(self.prompt_ids)

    @property
    def num_sequences(self) -> int:
        """How many sequences are generated."""
        return len(self.samplings)

    def full_text(self, generated_text: str) -> str:
        """Return the text that the client gets: with the prompt when it asked for it."""
        return self.sent_text + generated_text if self.return_full_text else generated_text
