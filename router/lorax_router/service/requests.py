"""What a front end hands to the service, and what validation makes of it.

``GenerateRequest`` holds a client's words with their types checked and nothing
else; ``ValidRequest`` can be run as it is. Only ``Validator`` makes the second
from the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.step import SamplingParams, StoppingParams

# The name by which LoRAX's clients ask for no adapter.
BASE_MODEL_ADAPTER_ID = "__base_model__"


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
    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    return_k_alternatives: int | None = None
    apply_chat_template: bool = False
    seed: int | None = None
    # Whether the client sent a ``response_format``; its content is not looked at yet.
    has_response_format: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One request in the client's words."""

    # Kept out of the repr so that no log line shows a prompt by accident.
    inputs: str = field(repr=False)
    parameters: GenerateParameters = field(default_factory=GenerateParameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that the engine can run as it is; each of its values is within bounds."""

    inputs: str = field(repr=False)
    prompt_ids: list[int] = field(repr=False)
    # One entry per sequence that is generated; they differ in their seed only.
    samplings: tuple[SamplingParams, ...]
    stopping: StoppingParams
    # The front end shows details of the output.
    details: bool = False
    # The front end shows the tokens of the prompt.
    prompt_details: bool = False
    return_full_text: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt that are computed, after truncation."""
        return len(self.prompt_ids)

    def full_text(self, generated_text: str) -> str:
        """Return the text that the client gets: with the prompt when it asked for it."""
        return self.inputs + generated_text if self.return_full_text else generated_text
