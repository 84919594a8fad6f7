"""LoRAX's request bodies, handed on as the service's values.

Null means absent for the fields where LoRAX takes it. Unknown fields are ignored, as LoRAX
ignores them, and counted.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field

from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import Integer, Items, StrictBody, said
from lorax_router.http_api.lorax.constraints import constraint_of
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    MergedAdapters,
    Prompt,
    TextPrompt,
)


class MergedAdaptersBody(StrictBody):
    """Several adapters merged for one request."""

    ids: Items[str] = Field(validation_alias=AliasChoices("ids", "adapter_ids"))
    """LoRAX's document calls them `adapter_ids`, which is taken too."""
    weights: Items[float] | None = None
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None

    def to_domain(self) -> MergedAdapters:
        """Return the service's value; names of rules in any case, as LoRAX takes them."""
        given = said(self)
        for name in ("merge_strategy", "majority_sign_method"):
            if name in given:
                given[name] = given[name].lower()
        return MergedAdapters(**given)


class ParametersBody(StrictBody):
    """How to generate; all are optional."""

    adapter_id: str | None = None
    """Adapter to use; the base model, or the server's own adapter, if absent."""
    adapter_source: str | None = None
    """Where the adapter lies: hub, local or s3; if absent, `adapter_id` may be an alias, and the
    server's default counts otherwise."""
    merged_adapters: MergedAdaptersBody | None = None
    """Adapters to merge for this request; not together with `adapter_id`."""
    adapter_parameters: MergedAdaptersBody | None = None
    """What LoRAX's document calls `merged_adapters`."""
    api_token: str | None = None
    """Token for private adapters; the Bearer token of the request if absent."""
    best_of: Integer | None = None
    """Generate so many sequences and return the likeliest first."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy."""
    repetition_penalty: float | None = None
    """Above 0; 1 is none."""
    frequency_penalty: float | None = None
    """From -2 to 2."""
    presence_penalty: float | None = None
    """From -2 to 2."""
    top_k: Integer | None = None
    """Draw from the so many likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability."""
    typical_p: float | None = None
    """Draw from the most typical tokens that together reach this probability."""
    min_p: float | None = None
    """Leave out tokens less likely than this times the likeliest one."""
    do_sample: bool = False
    """Draw tokens; implied by most sampling options."""
    max_new_tokens: Integer | None = None
    """Most tokens to generate; as many as fit if absent."""
    ignore_eos_token: bool = False
    """Go on after an end-of-sequence token."""
    return_full_text: bool | None = None
    """Put the prompt in front of the generated text."""
    stop: Items[str] = Field(default=[])
    """Texts that end the output; they stay in it. Empty ones end nothing."""
    stop_token_ids: Items[Integer] | None = None
    """Token ids that end the output."""
    truncate: Integer | None = None
    """Keep only the last so many tokens of the prompt."""
    watermark: bool = False
    """Mark the text by a preference for certain tokens, which who knows the rule can find."""
    details: bool = False
    """Return tokens, logprobs and the finish reason too."""
    decoder_input_details: bool = False
    """Return the prompt's tokens with their logprobs too; not for streams."""
    return_k_alternatives: Integer | None = None
    """Return so many alternatives for each token."""
    apply_chat_template: bool = False
    """Treat `inputs` as one user message and render the model's chat template."""
    seed: Integer | None = None
    """Makes drawn tokens reproducible."""
    priority: Integer | None = None
    """A smaller one goes first, where the server schedules by priority."""
    response_format: Any = None
    """Bind the output to JSON: `type` json_object or json_schema, a JSON schema in `schema`."""

    schema_: str | dict[str, Any] | None = Field(default=None, alias="schema")
    """Another name for the schema in `response_format`, also as text: what LoRAX's document has."""
    grammar: Any = None
    """TGI's name: `type` json, json_schema or regex, and the schema or pattern in `value`."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        given = said(self)
        given["constraint"] = constraint_of(
            response_format=given.pop("response_format", None),
            schema=given.pop("schema_", None),
            grammar=given.pop("grammar", None),
        )
        # It makes another prompt.
        given.pop("apply_chat_template", None)
        given.pop("adapter_parameters", None)
        given["stop"] = [each for each in self.stop if each]
        if self.adapter_source is not None:
            given["adapter_source"] = self.adapter_source.lower()
        if (merged := self._merged()) is not None:
            given["merged_adapters"] = merged.to_domain()
        given.setdefault("api_token", bearer_token)
        return GenerateParameters(**given)

    def _merged(self) -> MergedAdaptersBody | None:
        if self.merged_adapters is not None and self.adapter_parameters is not None:
            raise ValidationError(
                "`adapter_parameters` is another name of `merged_adapters`: give one of them"
            )
        return self.merged_adapters or self.adapter_parameters


class EmbedParametersBody(StrictBody):
    """With which adapter a vector is made; all are optional."""

    adapter_id: str | None = None
    """Adapter to use; the base model, or the server's own adapter, if absent."""
    adapter_source: str | None = None
    """Where the adapter lies: hub, local or s3."""
    merged_adapters: MergedAdaptersBody | None = None
    """Adapters to merge for this request; not together with `adapter_id`."""
    api_token: str | None = None
    """Token for private adapters; the Bearer token of the request if absent."""

    @property
    def names_any(self) -> bool:
        """Whether a field is said that names an adapter, or belongs to one."""
        own = (self.adapter_id, self.adapter_source, self.merged_adapters, self.api_token)
        return any(each is not None for each in own)

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the service's value."""
        return ParametersBody.model_validate(said(self)).to_domain(bearer_token)


class GenerateBody(StrictBody):
    """A prompt and how to continue it."""

    inputs: str
    """The prompt; not empty."""
    parameters: ParametersBody | None = None
    adapters: Items[str] | None = None
    """Through each of these adapters: the answer is a list, with an entry for each; not for streams."""

    def to_domain(
        self, bearer_token: str | None, caller: Caller = ANYBODY, origin: Origin = NOWHERE
    ) -> GenerateRequest:
        """Return the service's value."""
        parameters = self.parameters or ParametersBody()
        prompt: Prompt = TextPrompt(self.inputs)
        if parameters.apply_chat_template and self.inputs:
            prompt = ChatPrompt.of_user(self.inputs)
        return GenerateRequest(
            prompt=prompt,
            sent_text=self.inputs,
            parameters=parameters.to_domain(bearer_token),
            caller=caller,
            origin=origin,
        )


class CompatGenerateBody(GenerateBody):
    """A prompt and how to continue it, with the choice of a stream."""

    stream: bool = False
    """Answer with server-sent events."""


class AdapterBody(StrictBody):
    """An adapter to manage."""

    adapter_id: str
    """As requests name it."""
    adapter_source: str | None = None
    """Where the adapter lies: hub, local or s3; the server's default if absent."""
    revision: str | None = None
    """Branch, tag or commit on the hub; also as `adapter_id@revision`."""
    api_token: str | None = None
    """Token for private adapters; the Bearer token of the request if absent."""
    pin: bool = False
    """To load: keep the adapter ready until it is unpinned."""
    alias: str | None = None
    """To load: a name of your choosing by which requests can have the adapter."""

    def to_domain(self, bearer_token: str | None) -> GenerateParameters:
        """Return the parameters of a request with this adapter."""
        return GenerateParameters(
            adapter_id=self.adapter_id,
            adapter_source=self.adapter_source and self.adapter_source.lower(),
            revision=self.revision,
            api_token=self.api_token or bearer_token,
        )
