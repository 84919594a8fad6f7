"""Bodies of ``/tokenize`` and ``/detokenize``: LoRAX's, and vLLM's where they differ."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_body import Integer, Items, StrictBody
from lorax_router.service.requests import ChatPrompt, Prompt, TextPrompt

_GIVEN = ("inputs", "prompt", "messages")


class TokenizeBody(StrictBody):
    """What to tokenize: one of `inputs` (LoRAX's), `prompt` and `messages` (vLLM's)."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in _GIVEN
            ]
        }
    )

    inputs: str | None = None
    """A text; the answer is an array of its tokens with their places in it."""
    prompt: str | None = None
    """A text; the answer is an object with the ids of its tokens."""
    messages: Items[dict[str, Any]] | None = None
    """A chat, rendered by the model's template; the answer is an object with the ids."""
    model: str | None = None
    """Taken, and not looked at: the tokens are the base model's."""
    add_special_tokens: bool | None = None
    """Add the tokens that the model expects around a prompt; true if absent. A chat template
    writes them itself."""
    return_token_strs: bool = False
    """With `prompt` or `messages`: what the vocabulary has for each id, too."""
    add_generation_prompt: bool = True
    """With `messages`: end where the assistant begins to speak."""
    continue_final_message: bool = False
    """With `messages`: end within the last one."""
    tools: Items[dict[str, Any]] | None = None
    """With `messages`: tools that the template may tell of."""
    chat_template_kwargs: dict[str, Any] | None = None
    """With `messages`: what the template is given beside that."""

    def check(self) -> None:
        """Raise ValidationError unless just one thing is to be tokenized."""
        given = [name for name in _GIVEN if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValidationError(
                "one of `inputs`, `prompt` and `messages` must be given"
                + (f", got {' and '.join(f'`{name}`' for name in given)}" if given else "")
            )

    def to_prompt(self) -> Prompt:
        """Return the service's value of a ``prompt`` or of ``messages``."""
        if self.messages is None:
            return TextPrompt(self.prompt or "", self.add_special_tokens is not False)
        return ChatPrompt(
            messages=self.messages,
            tools=self.tools,
            template_kwargs=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
        )


class DetokenizeBody(StrictBody):
    """Token ids to make a text of."""

    tokens: Items[Integer]
    """Ids of the base model's vocabulary."""
    model: str | None = None
    """Taken, and not looked at."""


class TokenIdsAnswer(BaseModel):
    """The ids of a prompt's tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    """The text of token ids."""

    prompt: str
