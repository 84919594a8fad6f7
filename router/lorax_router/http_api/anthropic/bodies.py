"""Anthropic's request bodies, with LoRAX's fields of adapters beside them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import Integer, Items, StrictBody
from lorax_router.http_api.model_body import ModelBody
from lorax_router.service.constraints.formats import of_schema
from lorax_router.service.requests import GenerateParameters


class ThinkingBody(StrictBody):
    """Whether the model thinks before it answers, where its chat template can say so."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = None
    """Taken; what bounds the thinking is `max_tokens`."""


class OutputConfigBody(StrictBody):
    """What the output looks like."""

    format: dict[str, Any] | None = None
    """`{"type": "json_schema", "schema": ...}` binds the output to a JSON schema."""
    effort: str | None = None
    """Given to the chat template as `reasoning_effort`, if that reads it."""


class PromptBody(ModelBody):
    """A conversation; all that becomes a part of the prompt."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "container": (),
        "context_management": (),
        "mcp_servers": (),
    }

    messages: Items[dict[str, Any]]
    """What was said so far: `role` (user, assistant) and `content`. A last message of the
    assistant is continued."""
    system: str | Items[dict[str, Any]] | None = None
    """What the model is told before: a text, or text blocks."""
    tools: Items[dict[str, Any]] | None = None
    """What the model may call: `name`, `description`, `input_schema`."""
    tool_choice: dict[str, Any] | None = None
    """`type` (auto, any, tool, none), `name` and `disable_parallel_tool_use`."""
    thinking: ThinkingBody | None = None
    """Whether the model thinks before it answers."""
    output_config: OutputConfigBody | None = None
    """What the output looks like."""

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given beside the conversation."""
        kwargs: dict[str, Any] = {}
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            # Templates know it by one name or the other.
            kwargs |= {"enable_thinking": thinks, "thinking": thinks}
        if self.output_config is not None and self.output_config.effort is not None:
            kwargs["reasoning_effort"] = self.output_config.effort
        return kwargs


class CountTokensBody(PromptBody):
    """A conversation whose tokens are counted."""


class MessagesBody(PromptBody):
    """A conversation to go on with."""

    max_tokens: Integer
    """Most tokens to generate."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy. 1 if absent."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability."""
    top_k: Integer | None = None
    """Draw from the so many likeliest tokens."""
    stop_sequences: Items[str] | None = None
    """Texts that end the output; they are no part of it."""
    stream: bool | None = None
    """Answer with server-sent events."""
    metadata: dict[str, Any] | None = None
    """Taken, and not used."""

    @property
    def stops(self) -> list[str]:
        """The stop sequences; empty ones end nothing."""
        return [each for each in self.stop_sequences or [] if each]

    def parameters(self) -> GenerateParameters:
        """Return the service's values."""
        return GenerateParameters(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or None,
            n=1,
            max_new_tokens=self.max_tokens,
            stop=self.stops,
            constraint=self._constraint(),
        )

    def _constraint(self) -> Constraint | None:
        wanted = None if self.output_config is None else self.output_config.format
        if wanted is None:
            return None
        if wanted.get("type") != "json_schema":
            raise ValidationError("`output_config.format.type` must be json_schema")
        return of_schema(wanted.get("schema"), "output_config.format.schema")
