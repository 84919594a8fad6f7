"""The body of ``/v1/responses``."""

from __future__ import annotations

from typing import Any, ClassVar

from lorax_contract.constraint import Constraint
from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import Integer, Items, StrictBody
from lorax_router.http_api.model_body import ModelBody
from lorax_router.service.constraints.formats import of_schema
from lorax_router.service.requests import GenerateParameters

# Fields of the answer that can be asked for, and are not there anyway.
_HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})


class ReasoningBody(StrictBody):
    """How the model thinks."""

    effort: str | None = None
    """Given to the chat template as `reasoning_effort`, if that reads it."""
    summary: str | None = None
    """Taken; what the model thought is there as it is, without a summary."""


class TextBody(StrictBody):
    """What the text looks like."""

    format: dict[str, Any] | None = None
    """`text`, `json_object`, or `json_schema` with a `schema`."""
    verbosity: str | None = None
    """Only `medium` is offered."""


class ResponsesBody(ModelBody):
    """An input to answer; nothing of it is kept."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (),
        "context_management": (),
        "conversation": (),
        "previous_response_id": (),
        "truncation": ("disabled",),
    }

    input: str | Items[dict[str, Any]]
    """A text of the user's, or items: `message`, `function_call`, `function_call_output`."""
    instructions: str | None = None
    """What the model is told before."""
    max_output_tokens: Integer | None = None
    """Most tokens to generate; as many as fit if absent."""
    temperature: float | None = None
    """Divides the logits; 0 is greedy. 1 if absent."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability."""
    top_k: Integer | None = None
    """Draw from the so many likeliest tokens; 0 and -1: from all."""
    seed: Integer | None = None
    """Makes drawn tokens reproducible."""
    tools: Items[dict[str, Any]] | None = None
    """What the model may call: functions."""
    tool_choice: Any = None
    """none, auto, required, a function of `tools`, or `allowed_tools`."""
    parallel_tool_calls: bool | None = None
    """Whether it may call more than one; true if absent."""
    reasoning: ReasoningBody | None = None
    """How the model thinks."""
    text: TextBody | None = None
    """What the text looks like."""
    stream: bool | None = None
    """Answer with server-sent events."""
    store: bool | None = None
    """Answers are not kept: it must not be true."""
    include: Items[str] | None = None
    """What the answer has besides; `reasoning.encrypted_content` is taken and not there."""
    metadata: dict[str, Any] | None = None
    """Part of the answer."""
    user: str | None = None
    """Taken, and not used."""

    def check_refused(self) -> None:
        """Raise ValidationError for a field that would change the answer, and cannot."""
        super().check_refused()
        if self.store:
            raise ValidationError(
                "`store` must not be true: this server keeps no answers; send the conversation "
                "with each request"
            )
        for each in self.include or []:
            if each not in _HARMLESS_INCLUDES:
                raise ValidationError(f"`include`: {each[:80]!r} is not offered by this server")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise ValidationError("`text.verbosity` is not offered by this server; leave it out")

    def parameters(self) -> GenerateParameters:
        """Return the service's values."""
        return GenerateParameters(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k in (0, -1) else self.top_k,
            n=1,
            seed=self.seed,
            max_new_tokens=self.max_output_tokens,
            constraint=self._constraint(),
        )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given beside the conversation."""
        effort = None if self.reasoning is None else self.reasoning.effort
        return {} if effort is None else {"reasoning_effort": effort}

    def _constraint(self) -> Constraint | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return None
        match wanted.get("type"):
            case "text":
                return None
            case "json_object":
                return of_schema(None, "text.format")
            case "json_schema":
                return of_schema(wanted.get("schema"), "text.format.schema")
        raise ValidationError("`text.format.type` must be text, json_object or json_schema")
